"""The new collection: the same documents, other splits kept, queries that can be traced, refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_queries
from tiny_queries import made_from, make, noted

from retrieval_kd.artifact import Manifest
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.query_origins import FILE, QueryOrigin
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import DataError, InputError, OutputExistsError, RecipeError, UsageError
from retrieval_kd.indexes.build import build_index
from retrieval_kd.models.encode import encode
from retrieval_kd.pipeline import run_pipeline
from retrieval_kd.queries.make import estimate_queries, make_queries
from retrieval_kd.search.run import search_run
from retrieval_kd.verify import check, lost_inputs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return tiny_queries.make_documents(tmp_path_factory.mktemp("queries"))


def test_documents_are_the_same_and_other_splits_stay(source: Collection, tmp_path: Path) -> None:
    made = make(source, tmp_path / "made", "title")
    for name in ("documents.arrow", "lookup.npy", "qrels/train.parquet", "qrels/test.parquet"):
        assert (made.path / name).read_bytes() == (source.path / name).read_bytes()
    assert list(made.documents) == list(source.documents)
    assert made.splits == ["test", "train", "made"]
    for split in source.splits:
        assert made.queries(split) == source.queries(split)
        assert made.qrels(split) == source.qrels(split)
    assert made.queries("all") == {
        **tiny_queries.QUERIES,
        "made-title-0": "Binary search",
        "made-title-1": "Heaps",
    }
    assert made.qrels("made") == {"made-title-0": {"d1": 1, "d3": 1}, "made-title-1": {"d4": 1}}
    assert made.name == source.name
    assert check(made.path) == []
    assert lost_inputs(made.path) == []


def test_origins_and_counts(source: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two titles are equal but for case and white space; two documents have none; HEAPS is a query that stays."""
    made = make(source, tmp_path / "made", "title")
    assert made.origins == [
        QueryOrigin("made-title-0", "made", "title", "d1", None, None, None),
        QueryOrigin("made-title-0", "made", "title", "d3", None, None, None),
        QueryOrigin("made-title-1", "made", "title", "d4", None, None, None),
    ]
    names = ("synthetic_queries", "documents_read", "documents_without_query", "duplicates", "equal_to_kept_queries")
    assert noted(made, *names) == (2, 5, 2, 1, 1)
    assert noted(made, "documents", "queries", "empty_documents", "qrels_made", "qrels_test") == (5, 6, 1, 3, 2)
    assert made.manifest.details["synthetic"] == {"made": {"kind": "title"}}
    assert "documents without query: 2" in caplog.text
    assert "too short" not in caplog.text


def test_the_same_again_is_done_and_another_is_refused(source: Collection, tmp_path: Path) -> None:
    out = tmp_path / "made"
    before = make(source, out, "title").manifest
    assert make(source, out, "title").manifest == before
    with pytest.raises(OutputExistsError, match="another recipe"):
        make(source, out, "title", min_words=2)


def test_a_split_that_is_there_is_replaced_on_demand(source: Collection, tmp_path: Path) -> None:
    """q2 was of train alone and goes; q1 is in test too, and nobody judged q3: both stay."""
    with pytest.raises(InputError, match=r"has a split 'train' already.*--set split=synthetic.*replace=true"):
        make(source, tmp_path / "refused", "title", split="train")
    made = make(source, tmp_path / "made", "title", split="train", replace=True)
    assert made.splits == ["test", "train"]
    assert list(made.queries("all")) == ["q1", "q3", "q4", "train-title-0", "train-title-1"]
    assert list(made.queries("train")) == ["train-title-0", "train-title-1"]
    assert made.qrels("test") == source.qrels("test")
    assert check(made.path) == []


def test_queries_beside_queries(source: Collection, tmp_path: Path) -> None:
    """Origins of a split made before stay, and go with it when it is replaced."""
    titles = make(source, tmp_path / "titles", "title")
    both = make(titles, tmp_path / "both", "first-sentence", split="more", documents=1)
    assert both.splits == ["test", "train", "made", "more"]
    assert both.origins[:3] == titles.origins
    assert {origin.split for origin in both.origins[3:]} == {"more"}
    assert both.manifest.details["synthetic"] == {"made": {"kind": "title"}, "more": {"kind": "first-sentence"}}
    assert check(both.path) == []
    again = make(both, tmp_path / "again", "title", documents=4, replace=True, qrels=False)
    assert (again.splits, again.unjudged_splits) == (["test", "train", "more"], ["made"])
    assert check(again.path) == []


def test_without_qrels_a_split_still_has_its_queries(source: Collection, tmp_path: Path) -> None:
    made = make(source, tmp_path / "made", "title", qrels=False)
    assert list(made.queries("made").values()) == ["Binary search", "Heaps"]
    assert made_from(made) == {"Binary search": ["d1", "d3"], "Heaps": ["d4"]}
    with pytest.raises(InputError, match=r"'made' has queries and no qrels.*positive: teacher"):
        made.qrels("made")
    with pytest.raises(InputError, match=r"no split 'nonsense' .*train, made"):
        made.queries("nonsense")
    index = build_index("indexes/bm25", collection=made, out=tmp_path / "bm25")
    run = search_run(index, made, "made", tmp_path / "run", k=2)
    assert [query_id for query_id, _, _ in run] == ["made-title-0", "made-title-1"]


def test_a_random_part_of_the_documents(collection: Collection, tmp_path: Path) -> None:
    """The same with the same seed, and more documents include the former ones."""
    documents = {}
    for name, keys in {"5": {}, "same": {}, "8": {"documents": 8}, "seed": {"seed": 1}}.items():
        made = make(collection, tmp_path / name, "first-sentence", **{"documents": 5, **keys})
        documents[name] = [origin.doc_id for origin in made.origins]
    assert len(documents["5"]) == 5
    assert documents["5"] == sorted(documents["5"])
    assert documents["same"] == documents["5"] != documents["seed"]
    assert set(documents["5"]) < set(documents["8"])
    assert len(documents["8"]) == 8


def test_nothing_to_make_a_query_from(tmp_path: Path) -> None:
    empty = tiny_queries.make_documents(tmp_path, {"d1": ("", ""), "d4": ("", " ")}, splits=("test",))
    for kind in ("title", "first-sentence", "ict"):
        with pytest.raises(DataError, match=rf"kind '{kind}' made no query .*documents without query 2"):
            make(empty, tmp_path / kind, kind)
        assert not list((tmp_path / f"{kind}.partial").glob("*.arrow"))
    short = tiny_queries.make_documents(tmp_path / "short", {"d1": ("One", ""), "d4": ("Two", "")}, splits=("test",))
    with pytest.raises(DataError, match=r"made no query .*too short 2"):
        make(short, tmp_path / "titles", "title", min_words=2)


def test_a_collection_without_documents(tmp_path: Path) -> None:
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").touch()
    (tmp_path / "beir" / "queries.jsonl").touch()
    with pytest.raises(DataError, match="there are no documents"):
        make_queries("queries/titles", collection=str(tmp_path / "beir"), out=tmp_path / "made")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "all"}, "'all' means every query"),
        ({"split": "../x"}, "split: String should match pattern"),
        ({"min_words": 3, "max_words": 2}, "max_words: 2 is less than min_words, 3"),
        ({"per_document": 2}, "unknown key 'per_document'"),
        ({"min_word": 2}, r"unknown key 'min_word' \(did you mean 'min_words'"),
    ],
)
def test_recipes_that_cannot_be(source: Collection, keys: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make(source, tmp_path / "made", "title", **keys)


def test_a_log_for_a_kind_that_reads_none(source: Collection, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'title' makes queries from documents and reads no query log"):
        make(source, tmp_path / "made", "title", query_log=tmp_path / "log.txt")


def test_an_unknown_kind_names_the_nearest(source: Collection, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown kind 'titel' in queries \(did you mean 'title'\?\)"):
        make(source, tmp_path / "made", "titel")


def test_what_it_would_do(source: Collection) -> None:
    assert estimate_queries("queries/titles", collection=source) == {"documents": 5, "queries_at_most": 5}
    found = estimate_queries("queries/ict", collection=source, overrides=["documents=3"])
    assert found == {"documents": 3, "queries_at_most": 6}
    asked = ["prompt=Ask about {document}", "per_document=1"]
    price = estimate_queries("queries/api", collection=source, overrides=asked)
    words = [len(f"{title} {text}".split()) for title, text in tiny_queries.DOCUMENTS.values()]
    assert words == [13, 12, 10, 1, 0]
    assert price["approximate_tokens"] == int(1.3 * 5 * (36 / 5 + 3))
    assert (price["requests"], price["queries_at_most"], price["approximate_input_cost"]) == (5, 5, 0.0)


# ---- what `check` finds


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"query_id": "nobody"}, "origins.parquet names 1 unknown query ids: 'nobody'"),
        ({"doc_id": "d9"}, "origins.parquet names 1 unknown document ids: 'd9'"),
        ({"doc_id": "d2"}, "qrels of split made lack the document of 1 queries: 'made-title-1'"),
        ({"doc_id": None}, "come from neither a document nor a line: 'made-title-1'"),
        ({"split": "nowhere"}, "origins.parquet names a split 'nowhere' that is not there"),
        ({"split": "test"}, "origins.parquet lacks 1 queries of split made: 'made-title-1'"),
    ],
)
def test_a_query_that_cannot_be_traced(
    source: Collection, tmp_path: Path, change: dict[str, str | None], problem: str
) -> None:
    made = make(source, tmp_path / "made", "title")
    table = pq.read_table(made.path / FILE)
    rows = table.to_pylist()
    rows[-1].update(change)
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), made.path / FILE)
    problems = Collection(made.path, Manifest.read(made.path)).problems()
    assert any(problem in found for found in problems), problems


# ---- in a pipeline


def test_queries_are_a_step_of_a_pipeline(tmp_path: Path) -> None:
    """`queries` is a verb where a step begins with it, and still an argument of `encode`."""
    collection = tiny_queries.make_documents(tmp_path)
    model = str(tiny.make_dense(tmp_path / "dense"))
    steps = {
        "collection": {"queries": "queries/titles", "collection": "$corpus", "set": {"replace": True, "min_words": 1}},
        "vectors": {"encode": model, "collection": "$collection", "queries": "train"},
    }
    values = {"kind": "pipeline", "variables": {"corpus": "nowhere"}, "steps": steps}
    name = tiny.write_recipe(tmp_path / "pipeline.yaml", values)
    paths = run_pipeline(name, tmp_path / "run", [f"variables.corpus={collection.path}"])
    assert Vectors.load(paths["vectors"]).ids == ["train-title-0", "train-title-1"]
    assert json.loads((paths["collection"] / "manifest.json").read_text())["recipe"]["queries"]["kind"] == "title"


def test_vectors_and_runs_of_the_source_are_of_another_collection(source: Collection, tmp_path: Path) -> None:
    """Training and evaluation use one collection: what was made from its source is refused, not mixed in."""
    made = make(source, tmp_path / "made", "title")
    model = tiny.make_dense(tmp_path / "dense")
    vectors = encode(model, source, tmp_path / "vectors")
    assert made.fingerprint != source.fingerprint
    assert vectors.manifest.inputs["collection"]["fingerprint"] == source.fingerprint
    np.testing.assert_array_equal(vectors.matrix, encode(model, made, tmp_path / "made-vectors").matrix)
