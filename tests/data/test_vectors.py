from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.vectors import Vectors, read_ids, write_ids, write_vectors
from retrieval_kd.errors import ArtifactError, OutputExistsError, UsageError

MODEL = InputRef("a" * 64, name="nobody/model")
COLLECTION = InputRef("c" * 64)
MATRIX = np.arange(6, dtype=np.float64).reshape(3, 2)


def write(out: Path, matrix: np.ndarray = MATRIX, ids: list[str] | None = None, **changes: Any) -> Vectors:
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
