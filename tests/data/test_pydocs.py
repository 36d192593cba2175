from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retrieval_kd.data import pydocs, pydocs_reader
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import RetrievalKDError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return make_collection("pydocs", tmp_path_factory.mktemp("pydocs") / "out")


def test_known_documents(library: Collection) -> None:
    documents = library.documents
    merge = documents[documents.row("heapq.merge")]
    assert merge.title == "heapq.merge(*iterables, key=None, reverse=False)"
    assert merge.text.startswith("Similar to sorted(itertools.chain(*iterables)) but returns a generator,")
    assert merge.attributes == {"module": "heapq", "type": "function"}
    assert library.queries("all")["q:heapq.merge"] == "Merge multiple sorted inputs into a single sorted output."
    kinds = {"json": "module", "json.JSONDecoder": "class", "collections.OrderedDict.move_to_end": "method"}
    assert {i: documents[documents.row(i)].attributes["type"] for i in kinds} == kinds
    assert documents.text(documents.row("keyword.iskeyword")).startswith("keyword.iskeyword")


def test_one_document_an_object(library: Collection) -> None:
    ids = library.documents.ids.to_pylist()
    assert ids == sorted(set(ids))
    known = set(ids)
    assert "asyncio.wait" in known
    assert "asyncio.tasks.wait" not in known
    assert "builtins.TimeoutError" in known
    assert not known & {"asyncio.TimeoutError", "posix.open", "antigravity", "this", "json.tool.__main__"}
    assert {"builtins.dict.keys", "collections.Counter.elements"} <= known
    assert "collections.Counter.keys" not in known  # inherited
    assert not [i for i in ids if any(part.startswith("_") for part in i.split("."))]


def test_queries_have_one_relevant_document(library: Collection) -> None:
    queries = library.queries("all")
    assert len(set(queries.values())) == len(queries)
    assert all(5 <= len(text.split()) <= 40 and text == " ".join(text.split()) for text in queries.values())
    judged = {split: library.qrels(split) for split in library.splits}
    assert list(judged) == ["train", "dev", "test"]
    together = {query_id: docs for split in judged.values() for query_id, docs in split.items()}
    assert together == {query_id: {query_id.removeprefix("q:"): 1} for query_id in queries}
    assert sum(len(split) for split in judged.values()) == len(queries)
    shares = [len(split) / len(queries) for split in judged.values()]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    assert library.problems() == []


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the counts of CPython 3.11")
def test_size(library: Collection) -> None:
    assert library.manifest.counts["documents"] == pytest.approx(6190, abs=150)
    assert library.manifest.counts["queries"] == pytest.approx(4670, abs=120)


def test_nothing_of_this_machine_is_in_the_documents(
    library: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signatures show defaults, and cgi's are the environment; memory addresses change with every run."""
    monkeypatch.setenv("SOME_SECRET", "hunter2")
    monkeypatch.setenv("PYTHONHASHSEED", "123")
    again = make_collection("pydocs", tmp_path / "again")
    titles = "\n".join(document.title for document in again.documents)
    assert "hunter2" not in titles
    assert " at 0x" not in titles
    assert sys.executable not in titles
    for name, entry in library.manifest.files.items():
        assert again.manifest.files[name] == entry, name
    assert again.fingerprint == library.fingerprint


def test_the_caller_is_left_alone(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, tempfile\n"
        "with tempfile.TemporaryDirectory():\n"  # what these import when they are first used is no matter
        "    subprocess.run([sys.executable, '-c', ''], timeout=60)\n"
        "from retrieval_kd.data.pydocs import read_standard_library\n"
        "before = set(sys.modules)\n"
        "unimportable, entries = read_standard_library()\n"
        "assert len(entries) > 4000\n"
        "print(sorted(set(sys.modules) - before))\n"
        "print('torch' in sys.modules, 'antigravity' in sys.modules)\n"
    )
    root = Path(pydocs.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{script}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    added, flags = done.stdout.splitlines()
    assert added in ("[]", "['atexit']")
    assert flags == "False False"
    assert list(tmp_path.iterdir()) == []


def test_split_is_fixed() -> None:
    assert [pydocs.split_of(i) for i in ("json.dumps", "heapq.merge", "os.open")] == ["test", "train", "train"]


def entry(doc_id: str, doc: str, title: str | None = None) -> dict[str, str]:
    return {"id": doc_id, "title": title or doc_id, "module": "m", "type": "function", "doc": doc}


def test_first_paragraphs_become_queries_and_repetitions_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        entry("m.b", "one two\n three four five\n   \nThe rest.\n\nMore."),
        entry("m.a", "one two three four five"),
        entry("m.c", "one two three four"),
        entry("m.d", " ".join(["word"] * 40) + "\n\nD"),
        entry("m.e", " ".join(["word"] * 41)),
        entry("m.z", "first of z is long enough\n\nsame", "same title"),
        entry("m.y", "first of y is long enough\n\nsame", "same title"),
    ]
    monkeypatch.setattr(pydocs, "read_standard_library", lambda: (["winreg"], entries))
    made = make_collection("pydocs", tmp_path / "out")
    assert made.documents.ids.to_pylist() == ["m.a", "m.b", "m.c", "m.d", "m.e", "m.y"]
    assert list(made.documents.iter_texts()) == [
        "m.a",
        "m.b The rest.\n\nMore.",
        "m.c",
        "m.d D",
        "m.e",
        "same title same",
    ]
    assert made.queries("all") == {
        "q:m.a": "one two three four five",
        "q:m.d": " ".join(["word"] * 40),
        "q:m.y": "first of y is long enough",
    }
    details = made.manifest.details
    assert details["modules_not_importable"] == ["winreg"]
    assert (details["repeated_documents_left_out"], details["repeated_queries_left_out"]) == (1, 1)


def test_signatures() -> None:
    marker = object()

    def function(a: Any, b: Any = marker, *, c: int = 1) -> None: ...

    def titled(thing: Any, kind: str = "function") -> str:
        return pydocs_reader.signature(pydocs_reader.Found("x", "x", kind, True, thing))

    function.__annotations__ = {}
    assert titled(function) == "(a, b=<object object>, *, c=1)"
    assert titled(sys, "module") == ""
    assert titled(5) == ""


def test_a_reader_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = tmp_path / "reader.py"
    reader.write_text("raise SystemExit('no library today')")
    monkeypatch.setattr(pydocs, "READER", reader)
    with pytest.raises(RetrievalKDError, match=r"failed \(1\): no library today"):
        pydocs.read_standard_library()
    reader.write_text("import time; time.sleep(20)")
    monkeypatch.setattr(pydocs, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(RetrievalKDError, match=r"took over 0\.2 seconds"):
        pydocs.read_standard_library()
