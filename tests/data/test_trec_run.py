from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.run import Run
from retrieval_kd.errors import DataError, InputError, OutputExistsError, UsageError
from retrieval_kd.plan import Plan

RECIPE = {"kind": "test"}


def small() -> Run:
    scores = [np.array([1.0, 3.0, 1.0]), np.array([]), np.array([0.1])]
    return Run.from_hits(["q2", "q0", "q1"], [["a", "b", "c"], [], ["é"]], scores)


def rows(run: Run) -> list[tuple[str, list[str], list[float]]]:
    return [(query_id, doc_ids, scores.tolist()) for query_id, doc_ids, scores in run]


def test_ties_are_broken_by_document_id_descending() -> None:
    run = small()
    assert run.query_ids == ["q2", "q1"]
    assert (len(run), run.total) == (2, 4)
    assert rows(run) == [("q2", ["b", "c", "a"], [3.0, 1.0, 1.0]), ("q1", ["é"], [float(np.float32(0.1))])]
    assert run.hits("q2")[1].dtype == np.float32
    doc_ids, scores = run.hits("q0")
    assert (doc_ids, scores.tolist(), scores.dtype) == ([], [], np.float32)


@given(st.lists(st.tuples(st.text(min_size=1), st.sampled_from([0.0, -1.0, 2.5])), unique_by=lambda hit: hit[0]))
@settings(max_examples=50, deadline=None)
def test_the_order_is_that_of_python_strings(hits: list[tuple[str, float]]) -> None:
    hits = [(doc_id, score) for doc_id, score in hits if doc_id.isprintable()]
    run = Run.from_hits(["q"], [[doc_id for doc_id, _ in hits]], [np.array([score for _, score in hits])])
    expected = sorted(sorted(hits, reverse=True), key=lambda hit: -hit[1])
    assert run.hits("q")[0] == [doc_id for doc_id, _ in expected]


def test_nothing_found() -> None:
    run = Run.from_hits([], [], [])
    assert (run.query_ids, run.total, rows(run)) == ([], 0, [])


def test_from_hits_refuses() -> None:
    with pytest.raises(DataError, match=r"query 'q', document 'b': score nan is not finite \(1 such rows\)"):
        Run.from_hits(["q"], [["a", "b"]], [np.array([1.0, np.nan])])
    with pytest.raises(DataError, match="score inf is not finite"):
        Run.from_hits(["q"], [["a"]], [np.array([1e39])])
    with pytest.raises(DataError, match=r"query 'r' has document 'a' twice \(1 such rows\)"):
        Run.from_hits(["q", "r"], [["a"], ["a", "a"]], [np.array([1.0]), np.array([1.0, 2.0])])
    with pytest.raises(UsageError, match="listed twice"):
        Run.from_hits(["q", "q"], [["a"], ["b"]], [np.array([1.0]), np.array([1.0])])
    with pytest.raises(UsageError, match="query 'q': 1 documents but 2 scores"):
        Run.from_hits(["q"], [["a"]], [np.array([1.0, 2.0])])
    with pytest.raises(UsageError, match="2 queries, 1 lists"):
        Run.from_hits(["q", "r"], [["a"]], [np.array([1.0])])


def test_trec_text(tmp_path: Path) -> None:
    saved = small().save(tmp_path / "x.trec", recipe=RECIPE, inputs={})
    assert (tmp_path / "x.trec").read_text(encoding="utf-8") == (
        "q2 Q0 b 1 3.0 retrieval-kd\n"
        "q2 Q0 c 2 1.0 retrieval-kd\n"
        "q2 Q0 a 3 1.0 retrieval-kd\n"
        "q1 Q0 é 1 0.1 retrieval-kd\n"
    )
    assert rows(saved) == rows(small())
    assert list(tmp_path.iterdir()) == [tmp_path / "x.trec"]


def test_trec_is_read_whatever_its_ranks_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "a.trec"
    path.write_bytes(b"q1\tQ0\td1\t1\t-2\tx\n\nq2 Q0 d1 7 1e-3 x\r\n  q1 0   d2 0 5 y \n")
    assert rows(Run.load(path)) == [("q1", ["d2", "d1"], [5.0, -2.0]), ("q2", ["d1"], [float(np.float32(1e-3))])]
    path.write_bytes(b"")
    assert Run.load(path).total == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 d2 2 1.0", r"bad\.trec:3: 5 columns"),
        ("q1 Q0 d2 2 1.0 tag more", r"bad\.trec:3: 7 columns"),
        ("q1 Q0 d2 2 high tag", r"bad\.trec:3: score 'high' is not a finite number"),
        ("q1 Q0 d2 2 nan tag", r"bad\.trec:3: score 'nan'"),
        ("q1 Q0 d2 2 -inf tag", r"bad\.trec:3: score '-inf'"),
        ("q1 Q0 d2 2 1e39 tag", r"bad\.trec:3: score '1e39'"),
        ("q1 Q0 d1 2 0.5 tag", r"bad\.trec:3: query 'q1' has document 'd1' twice"),
    ],
)
def test_bad_trec(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.trec"
    path.write_text(f"q1 Q0 d1 1 1.0 tag\n\n{line}\n")
    with pytest.raises(DataError, match=message):
        Run.load(path)


def test_bad_utf8(tmp_path: Path) -> None:
    (tmp_path / "bad.trec").write_bytes(b"q1 Q0 \xff 1 1.0 tag\n")
    with pytest.raises(DataError, match="an id up to line 1 is not valid UTF-8"):
        Run.load(tmp_path / "bad.trec")


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
@example([3.4028234663852886e38, 1.401298464324817e-45, -0.0, 16777217.0, 0.1])
@settings(max_examples=30, deadline=None)
def test_scores_round_trip_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    run = Run.from_hits(["q"], [[f"d{i}" for i in range(len(values))]], [np.array(values, dtype=np.float32)])
    path = tmp_path_factory.getbasetemp() / "round.trec"
    again = run.save(path, recipe=RECIPE, inputs={}, force=True)
    assert again.hits("q")[0] == run.hits("q")[0]
    assert again.hits("q")[1].tolist() == run.hits("q")[1].tolist()


def test_ids_that_trec_cannot_express(tmp_path: Path) -> None:
    run = Run.from_hits(["q"], [["a b", "c", ""]], [np.array([1.0, 2.0, 3.0])])
    with pytest.raises(DataError, match=r"2 ids are empty or hold white space.*'', 'a b'"):
        run.save(tmp_path / "x.trec", recipe=RECIPE, inputs={})
    assert rows(run.save(tmp_path / "x", recipe=RECIPE, inputs={})) == rows(run)


def test_existing_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.trec"
    small().save(path, recipe=RECIPE, inputs={})
    small().save(path, recipe=RECIPE, inputs={})
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match="other content"):
        small().save(path, recipe=RECIPE, inputs={})
    assert path.read_text() == "mine"
    assert small().save(path, recipe=RECIPE, inputs={}, force=True).total == 4


def test_artifact(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    inputs = {"index": InputRef("f" * 64)}
    saved = small().save(tmp_path / "run", recipe=RECIPE, inputs=inputs, details={"k": 3})
    assert rows(saved) == rows(small())
    assert saved.manifest is not None
    assert saved.manifest.counts == {"queries": 2, "hits": 4}
    assert saved.manifest.details == {"k": 3}
    assert saved.ref() == InputRef(saved.manifest.fingerprint, tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "run.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "string", "float", "int32"]
    assert table["rank"].to_pylist() == [1, 2, 3, 1]
    assert table["query_id"].to_pylist() == ["q2", "q2", "q2", "q1"]
    again = small().save(tmp_path / "run", recipe=RECIPE, inputs=inputs)
    assert again.manifest == saved.manifest


def test_refs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only in memory"):
        small().ref()
    ref = small().save(tmp_path / "x.trec", recipe=RECIPE, inputs={}).ref()
    assert (ref.path, ref.name) == (None, str(tmp_path / "x.trec"))


def broken(tmp_path: Path, **columns: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = {"query_id": ["q", "q", "p"], "doc_id": ["b", "a", "a"], "score": np.array([2, 1, 1], np.float32)}
    table = {**good, "rank": pa.array([1, 2, 1], pa.int32()), **columns}
    with Plan("run", RECIPE, {}).write(tmp_path / "run", force=True) as draft:
        pq.write_table(
            pa.table({name: value for name, value in table.items() if value is not None}), draft.path / "run.parquet"
        )
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rank": np.array([1, 3, 1], np.int32)}, r"row 1: rank does not follow .* \(1 such rows\)"),
        ({"score": np.array([1, 2, 1], np.float32)}, r"row 0: rank does not follow"),
        ({"score": np.array([1, 1, 1], np.float32), "doc_id": ["a", "b", "a"]}, r"row 0: rank does not follow"),
        ({"query_id": ["q", "p", "q"]}, r"row 1: rank does not follow"),
        ({"doc_id": ["a", "a", "a"]}, r"row 1: query 'q' has document 'a' twice"),
        ({"score": np.array([2, np.inf, 1], np.float32)}, r"row 1: .*score inf is not finite"),
        ({"score": np.array([2.0, 1.0, 1.0])}, "scores are float64"),
        ({"rank": None}, r"run\.parquet: .*rank"),
        ({"doc_id": ["a", None, "b"]}, "column 'doc_id' is missing or has empty rows"),
    ],
)
def test_broken_artifacts(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Run.load(broken(tmp_path, **columns))


def test_a_good_artifact_loads(tmp_path: Path) -> None:
    assert rows(Run.load(broken(tmp_path))) == [("q", ["b", "a"], [2.0, 1.0]), ("p", ["a"], [1.0])]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory"):
        Run.load(tmp_path / "nothing")
