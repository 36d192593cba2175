from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.irds import split_name
from retrieval_kd.data.sources import find_source, make_collection, open_collection
from retrieval_kd.errors import ArtifactError, DataError, InputError


def test_a_folder_becomes_an_artifact_once(beir: Path, own_cache: Path) -> None:
    first = open_collection(beir)
    assert first.path.parent == own_cache / "retrieval-kd" / "collections"
    assert first.name == "pets"
    again = open_collection(str(beir))
    assert (again.path, again.manifest.created) == (first.path, first.manifest.created)
    with (beir / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d6", "text": "new"}\n')
    changed = open_collection(beir)
    assert len(changed.documents) == 6
    assert changed.path != first.path


def test_an_artifact_is_opened_where_it_is(beir: Path, tmp_path: Path, own_cache: Path) -> None:
    made = make_collection(str(beir), tmp_path / "out")
    assert open_collection(tmp_path / "out").path == made.path
    assert open_collection(made) is made
    assert not own_cache.exists()


def test_a_damaged_cache_is_made_again(beir: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = open_collection(beir)
    (first.path / "queries.arrow").write_bytes(b"")
    again = open_collection(beir)
    assert len(again.queries("all")) == 3
    assert "making it again" in caplog.text


def test_a_cache_that_cannot_be_made(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        open_collection(beir)


def test_unknown_names(beir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pydoc: no such directory \(did you mean 'pydocs'\?\)"):
        open_collection("pydoc")
    with pytest.raises(InputError, match="no such directory"):
        make_collection(str(tmp_path / "nothing"), tmp_path / "out")
    with pytest.raises(InputError, match=r"has no corpus\.jsonl"):
        make_collection(str(tmp_path), tmp_path / "out")
    with pytest.raises(ArtifactError, match="not an artifact"):
        open_collection(tmp_path)
    make_collection(str(beir), tmp_path / "out")
    with pytest.raises(InputError, match="is an artifact already"):
        make_collection(str(tmp_path / "out"), tmp_path / "other")


class Doc(NamedTuple):
    doc_id: str
    title: str
    abstract: str
    url: str
    year: int

    def default_text(self) -> str:
        return f"{self.title} {self.abstract}"


def dataset(folder: Path, name: str, queries: str, qrels: str, docs: str | None = None) -> None:
    """Registers an ir_datasets dataset that reads local files."""
    import ir_datasets
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
    from ir_datasets.util import LocalDownload

    def file(kind: str, text: str) -> Any:
        path = folder / f"{name.replace('/', '-')}.{kind}"
        path.write_text(text)
        return LocalDownload(path)

    parts = [TsvQueries(file("queries", queries)), TrecQrels(file("qrels", qrels), {0: "no", 1: "yes"})]
    if docs is not None:
        parts.insert(0, TsvDocs(file("docs", docs), doc_cls=PlainDoc))
    if name not in ir_datasets.registry:
        ir_datasets.registry.register(name, ir_datasets.Dataset(*parts))


class PlainDoc(NamedTuple):
    doc_id: str
    text: str
    url: str


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ir_datasets

    monkeypatch.setattr(ir_datasets.registry, "_registered", dict(ir_datasets.registry._registered))
    docs = "d2\tdogs bark\thttp://2\nd1\tcats sleep\thttp://1\n"
    dataset(tmp_path, "toy-pets/train", "q1\twho sleeps\n", "q1 0 d1 1\nq1 0 d2 0\n", docs)
    dataset(tmp_path, "toy-pets/test", "q2\twho barks\nq1\twho sleeps\n", "q2 0 d2 1\n")


@pytest.mark.usefixtures("registered")
def test_irds(tmp_path: Path) -> None:
    made = make_collection("irds:toy-pets/train,toy-pets/test", tmp_path / "out")
    assert made.name == "toy-pets/train,toy-pets/test"
    assert [tuple(document) for document in made.documents] == [
        ("d2", "", "dogs bark", {"url": "http://2"}),
        ("d1", "", "cats sleep", {"url": "http://1"}),
    ]
    assert made.splits == ["train", "test"]
    assert made.queries("all") == {"q1": "who sleeps", "q2": "who barks"}
    assert made.qrels("train") == {"q1": {"d1": 1, "d2": 0}}
    assert made.qrels("test") == {"q2": {"d2": 1}}
    assert made.problems() == []


@pytest.mark.usefixtures("registered")
def test_irds_through_the_cache() -> None:
    first = open_collection("irds:toy-pets/train")
    assert isinstance(first, Collection)
    assert (first.splits, open_collection("irds:toy-pets/train").path) == (["train"], first.path)


@pytest.mark.usefixtures("registered")
def test_irds_refuses(tmp_path: Path) -> None:
    import ir_datasets

    for ids, message in {
        "toy-pets/tran": r"knows no such id \(did you mean 'toy-pets/train'\?\)",
        "toy-pets/train,toy-pets/train": "names toy-pets/train twice",
        "toy-pets/train,": "an id is empty",
        "toy-pets/test": "has no docs",
        "toy-pets/train,vaswani,antique/test": "the same split",
    }.items():
        with pytest.raises(InputError, match=message):
            make_collection(f"irds:{ids}", tmp_path / "out")
    dataset(tmp_path, "toy-pets/dev", "q1\tanother text\n", "q1 0 d1 1\n")
    with pytest.raises(DataError, match=r"irds:toy-pets/dev: query 1: query id 'q1' is already at .*/train: query 1"):
        make_collection("irds:toy-pets/train,toy-pets/dev", tmp_path / "out")
    ir_datasets.registry.register("toy-lost", only_documents(no_network))
    with pytest.raises(InputError, match=r"irds:toy-lost: cannot be downloaded or read \(no network\)"):
        make_collection("irds:toy-lost", tmp_path / "out")


def no_network() -> Any:
    raise ConnectionError("no network")


def only_documents(read: Callable[[], Any]) -> Any:
    """An ir_datasets dataset of documents that ``read`` gives."""
    import ir_datasets
    from ir_datasets.formats import BaseDocs

    class Docs(BaseDocs):
        def docs_iter(self) -> Any:
            return read()

        def docs_cls(self) -> type:
            return Doc

    return ir_datasets.Dataset(Docs())


def test_irds_titles_and_default_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ir_datasets

    papers = [Doc("d1", "Cats", "They sleep.", "http://1", 1999), Doc("d2", "", "Only this.", "", 2000)]

    monkeypatch.setattr(ir_datasets.registry, "_registered", {"toy-papers": only_documents(lambda: iter(papers))})
    made = make_collection("irds:toy-papers", tmp_path / "out")
    assert [tuple(document) for document in made.documents] == [
        ("d1", "Cats", "They sleep.", {"abstract": "They sleep.", "url": "http://1"}),
        ("d2", "", "Only this.", {"abstract": "Only this.", "url": ""}),
    ]
    assert (made.splits, made.queries("all")) == ([], {})


def test_split_names() -> None:
    names = ["beir/scifact/test", "msmarco-passage/dev/small", "vaswani", "nq/train", "msmarco-passage/trec-dl-2019"]
    assert [split_name(name) for name in names] == ["test", "dev", "test", "train", "test"]


def test_sources_are_cheap_to_name() -> None:
    """Naming a dataset loads and downloads nothing."""
    assert find_source("irds:beir/scifact/test").ref().name == "irds:beir/scifact/test"
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()
