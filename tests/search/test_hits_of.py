"""Rows become document ids: for all queries at once, and of several pieces without a copy of all ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrieval_kd.indexes.base import Index, write_rows
from retrieval_kd.search.searcher import hits_of


@pytest.fixture(params=[1, 3], ids=["one piece", "three pieces"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Index:
    """60,000 ids in pieces of equal size, with an empty one between them."""
    ids = [f"document-{row:05d}" for row in range(60000)]
    size = len(ids) // request.param
    pieces = [pa.array(ids[start : start + size], pa.string()) for start in range(0, len(ids), size)]
    pieces[1:1] = [pa.array([], pa.string())] * (request.param - 1)
    write_rows(tmp_path, pa.chunked_array(pieces))
    nothing: Any = None
    return Index(tmp_path, nothing)


def test_the_hits_of_each_query(index: Index) -> None:
    rows = np.array([[59999, 0, 20000], [7, -1, -1], [-1, -1, -1], [19999, 40000, -1]])
    scores = np.array([[3, 2, 1], [5, 0, 0], [0, 0, 0], [9, 8, 0]], dtype=np.float32)
    ids, found = hits_of(index, scores, rows)
    assert ids == [
        ["document-59999", "document-00000", "document-20000"],
        ["document-00007"],
        [],
        ["document-19999", "document-40000"],
    ]
    assert [values.tolist() for values in found] == [[3, 2, 1], [5], [], [9, 8]]


def test_few_rows_take_little_memory(index: Index) -> None:
    """All ids are 1 MB."""
    _ = index.ids
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    former = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert index.ids_of([40000, 3, 3]) == ["document-40000", "document-00003", "document-00003"]
    finally:
        pa.set_memory_pool(former)
    assert pool.max_memory() < 10_000
