"""A range of vectors and chosen rows of several, against the rows themselves, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_indexes import sparse_documents, write_documents

from retrieval_kd.data import vector_rows
from retrieval_kd.data.vector_rows import VectorRange, gather_vectors
from retrieval_kd.data.vectors import Vectors


def values(layout: str, number: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    if layout == "sparse":
        documents = sparse_documents(number, seed).tolil()
        documents[1] = 0  # without a term
        return documents.tocsr()
    if layout == "multi-vector":
        return [rng.random((rng.integers(0, 4) if row else 2, 3)).astype(np.float32) for row in range(number)]
    return rng.random((number, 4)).astype(np.float32)


def plain(vectors: Vectors) -> list[list[Any]]:
    rows = vectors.rows(0, len(vectors))
    return [row.tolist() for row in (rows if isinstance(rows, list) else getattr(rows, "toarray", lambda: rows)())]


@pytest.mark.parametrize("layout", ["dense", "sparse", "multi-vector"])
def test_a_range(layout: str, tmp_path: Path) -> None:
    whole = write_documents(tmp_path / "v", values(layout, 9, 1), [f"d{row}" for row in range(9)])
    part = VectorRange(whole, 3, 7)
    assert len(part) == 4 and part.ids == ["d3", "d4", "d5", "d6"] and part.layout == layout
    assert plain(part) == plain(whole)[3:7]
    assert part.lengths.tolist() == whole.lengths[3:7].tolist()
    assert part.problems() == []
    assert len({whole.fingerprint, part.fingerprint, VectorRange(whole, 3, 8).fingerprint}) == 3


@pytest.mark.parametrize("layout", ["dense", "sparse", "multi-vector"])
def test_gathered_rows(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_rows, "_STEP", 2)
    parts = [
        write_documents(tmp_path / str(i), values(layout, number, i), [f"{i}-{row}" for row in range(number)])
        for i, number in enumerate((5, 3))
    ]
    part_of, row_of = np.array([0, 1, 1, 0, 0, 1]), np.array([4, 2, 0, 1, 0, 1])
    gathered = gather_vectors(tmp_path / "work", parts, part_of, row_of)
    chosen = list(zip(part_of.tolist(), row_of.tolist(), strict=True))
    assert gathered.ids == [f"{part}-{row}" for part, row in chosen]
    assert plain(gathered) == [plain(parts[part])[row] for part, row in chosen]
    assert gathered.layout == layout and gathered.dimension == parts[0].dimension
    assert gathered.problems() == []
