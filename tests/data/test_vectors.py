from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_array

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.growing import GrowingArrays
from retrieval_kd.data.vector_writer import write_ids, write_vectors
from retrieval_kd.data.vectors import Vectors, read_ids
from retrieval_kd.errors import ArtifactError, OutputExistsError, UsageError

MODEL = InputRef("a" * 64, name="nobody/model")
COLLECTION = InputRef("c" * 64)
MATRIX = np.arange(6, dtype=np.float64).reshape(3, 2)


SPARSE = csr_array(np.array([[0, 2.5, 0, 1], [0, 0, 0, 0], [4, 0, 0, 0.5]]))
TOKENS = [np.ones((2, 3)), np.zeros((0, 3)), np.arange(3.0).reshape(1, 3)]


def write(out: Path, matrix: Any = MATRIX, ids: list[str] | None = None, **changes: Any) -> Vectors:
    values: dict[str, Any] = {"of": "documents", "split": None, "similarity": "dot", "model": MODEL}
    values |= {"collection": COLLECTION, **changes}
    return write_vectors(out, matrix, ids or ["a", "b", "ü"], **values)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    vectors = write(tmp_path / "vectors", of="queries", split="dev")
    assert vectors.matrix.dtype == np.float32
    np.testing.assert_array_equal(vectors.matrix, [[0, 1], [2, 3], [4, 5]])
    assert not vectors.matrix.flags.writeable
    assert vectors.ids == ["a", "b", "ü"]
    assert (vectors.of, vectors.split, vectors.similarity, vectors.model_ref) == ("queries", "dev", "dot", MODEL)
    assert vectors.manifest.counts == {"vectors": 3}
    assert vectors.problems() == []


def test_rows_and_ids_must_match(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 vectors but 2 ids"):
        write(tmp_path / "vectors", ids=["a", "b"])


def test_problems_are_found(tmp_path: Path) -> None:
    bad = MATRIX.copy()
    bad[0, 1], bad[2, 0] = np.nan, np.inf
    vectors = write(tmp_path / "vectors", bad, ["a", "b", "a"])
    assert vectors.problems() == ["ids are not unique", "2 vectors have NaN or infinite values"]
    write_ids(vectors.path / "ids.arrow", ["a", "b"])
    with pytest.raises(ArtifactError, match=r"ids\.arrow"):
        Vectors.load(vectors.path)
    assert Vectors(vectors.path, vectors.manifest).problems()[0] == "3 rows but 2 ids"


def test_rows_of_another_collection_or_order(tmp_path: Path) -> None:
    vectors = write(tmp_path / "vectors")
    vectors.check_rows(pa.chunked_array([["a"], ["b", "ü"]]))
    for ids in (["a", "ü", "b"], ["a", "b"], ["a", "b", "ü", "d"]):
        with pytest.raises(ArtifactError, match="its 3 rows are not the collection's"):
            vectors.check_rows(pa.chunked_array([ids]))


def test_other_values_at_the_same_place(tmp_path: Path) -> None:
    first = write(tmp_path / "vectors")
    assert write(tmp_path / "vectors").manifest.created == first.manifest.created
    with pytest.raises(OutputExistsError, match="another model"):
        write(tmp_path / "vectors", model=InputRef("b" * 64))


@pytest.mark.parametrize(
    "ids", [["a", "b"], pa.array(["a", "b"]), pa.chunked_array([["a"], ["b"]]), pa.array(["a", "b"], pa.large_string())]
)
def test_ids_from_anything(ids: Any, tmp_path: Path) -> None:
    write_ids(tmp_path / "ids.arrow", ids)
    assert read_ids(tmp_path / "ids.arrow") == ["a", "b"]


def test_sparse_vectors_are_three_arrays_and_a_vocabulary(tmp_path: Path) -> None:
    vectors = write(tmp_path / "vectors", SPARSE, vocabulary=["w", "x", None, "ü"])
    indptr, terms, weights = vectors.sparse
    assert (indptr.tolist(), terms.tolist(), weights.tolist()) == ([0, 2, 2, 4], [1, 3, 0, 3], [2.5, 1, 4, 0.5])
    assert (indptr.dtype, terms.dtype, weights.dtype) == (np.int64, np.int32, np.float32)
    assert not any(array.flags.writeable for array in vectors.sparse)
    assert (vectors.layout, vectors.dimension, len(vectors)) == ("sparse", 4, 3)
    assert vectors.vocabulary == ["w", "x", None, "ü"]
    assert vectors.rows(1, 9).toarray().tolist() == [[0, 0, 0, 0], [4, 0, 0, 0.5]]
    facts = {"layout": "sparse", "dimension": 4, "mean_nonzeros": 1.33, "empty_vectors": 1, "bytes_per_vector": 18.7}
    assert facts.items() <= vectors.manifest.details.items()
    assert vectors.problems() == []
    with pytest.raises(UsageError, match="4 terms need a vocabulary"):
        write(tmp_path / "other", SPARSE, vocabulary=["w"])


def test_token_vectors_and_where_they_begin(tmp_path: Path) -> None:
    vectors = write(tmp_path / "vectors", TOKENS)
    assert vectors.multi_vector.offsets.tolist() == [0, 2, 2, 3]
    assert vectors.multi_vector.tokens.tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 2]]
    assert [matrix.tolist() for matrix in vectors.rows(1, 3)] == [[], [[0, 1, 2]]]
    facts = {"layout": "multi-vector", "dimension": 3, "dtype": "float32", "mean_tokens": 1.0, "empty_vectors": 1}
    assert facts.items() <= vectors.manifest.details.items()
    assert vectors.manifest.details["bytes_per_vector"] == 12 + 8
    assert vectors.lengths.tolist() == [2, 0, 1]
    assert vectors.problems() == []


@pytest.mark.parametrize(
    ("values", "name", "wanted"),
    [(MATRIX, "sparse", "dense vectors; sparse"), (TOKENS, "matrix", "multi-vector vectors; dense")],
)
def test_another_layout_is_refused(values: Any, name: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"these are {wanted} ones are needed here"):
        getattr(write(tmp_path / "vectors", values), name)


@pytest.mark.parametrize(
    ("file", "array", "problem"),
    [
        ("terms.npy", [1, 4, 0, 3], "1 terms are outside the vocabulary"),
        ("terms.npy", [3, 1, 0, 3], "1 terms are out of order"),
        ("weights.npy", [1, 0, 1, 1], "1 terms are of weight 0"),
        ("weights.npy", [1, np.nan, 1, 1], "1 weights have NaN or infinite values"),
        ("weights.npy", [1, 1, 1], "4 terms but 3 weights"),
        ("indptr.npy", [0, 2, 1, 4], "indptr.npy does not divide the 4 entries into vectors"),
        ("indptr.npy", [0, 2, 2, 3], "indptr.npy does not divide the 4 entries into vectors"),
    ],
)
def test_problems_of_sparse_vectors(file: str, array: Any, problem: str, tmp_path: Path) -> None:
    made = write(tmp_path / "vectors", SPARSE, vocabulary=["w", "x", "y", "z"])
    np.save(made.path / file, np.array(array, dtype=np.load(made.path / file).dtype))
    assert problem in Vectors(made.path, made.manifest).problems()


def test_problems_of_token_vectors(tmp_path: Path) -> None:
    made = write(tmp_path / "vectors", [np.full((2, 3), np.inf), np.zeros((1, 3)), np.zeros((1, 3))])
    assert made.problems() == ["2 token vectors have NaN or infinite values"]
    np.save(made.path / "offsets.npy", np.array([0, 2, 3]))
    assert Vectors(made.path, made.manifest).problems()[:2] == [
        "offsets.npy does not divide the 4 entries into vectors",
        "2 rows but 3 ids",
    ]


def test_arrays_that_grow_are_what_numpy_saves(tmp_path: Path) -> None:
    """Also when a killed attempt left half a block behind the rows that the ledger knows."""
    whole = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "whole.npy", whole)
    arrays = GrowingArrays(tmp_path, tmp_path / "ledger.json", {"done": 0})
    arrays.state["done"] = 1
    arrays.append({"x.npy": whole[:2]})
    with (tmp_path / "x.npy").open("ab") as file:
        file.write(b"half a block of rows")
    again = GrowingArrays(tmp_path, tmp_path / "ledger.json", {"done": 0})
    assert (again.rows("x.npy"), again.rows("y.npy"), again.state) == (2, 0, {"done": 1})
    again.append({"x.npy": whole[2:3]})
    again.append({"x.npy": whole[3:]})
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"x\.npy: shorter than its ledger says"):
        again.append({"x.npy": whole})
    (tmp_path / "x.npy").unlink()
    with pytest.raises(ArtifactError, match=r"x\.npy: is gone"):
        again.append({"x.npy": whole})
