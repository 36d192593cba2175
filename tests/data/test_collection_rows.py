"""Some documents of collections as a collection, against the documents themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.collection_rows import CollectionRows
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import DataError


@pytest.fixture
def parts(tmp_path: Path) -> list[Collection]:
    """Collections a (a0 to a4) and b (b0 to b2) with titles, texts and an attribute."""
    made = []
    for name, number in (("a", 5), ("b", 3)):
        beir = tmp_path / f"{name}-beir"
        (beir / "qrels").mkdir(parents=True)
        rows = [{"_id": f"{name}{i}", "title": f"T{i}", "text": f"{name} {i}", "year": i} for i in range(number)]
        (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (beir / "queries.jsonl").write_text(json.dumps({"_id": "q0", "text": "x"}) + "\n")
        (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq0\t{name}0\t1\n")
        made.append(make_collection(str(beir), tmp_path / name))
    return made


def test_rows_of_several(parts: list[Collection]) -> None:
    rows = CollectionRows(parts, np.array([1, 0, 1, 0]), np.array([2, 4, 0, 0])).documents
    assert len(rows) == 4 and rows.ids.to_pylist() == ["b2", "a4", "b0", "a0"]
    assert [rows.text(row) for row in range(4)] == ["T2 b 2", "T4 a 4", "T0 b 0", "T0 a 0"]
    assert list(rows.iter_texts()) == rows.texts(range(4)) and list(rows.iter_texts(1, 3)) == ["T4 a 4", "T0 b 0"]
    assert rows[1] == ("a4", "T4", "a 4", {}) and rows.attributes == []
    assert rows.rows(["a0", "b2"]).tolist() == [3, 0] and not rows.known("a1")
    with pytest.raises(DataError, match=r"1 of 2 document ids are unknown: 'a1'"):
        rows.rows(["a0", "a1"])


def test_a_range(parts: list[Collection]) -> None:
    part = CollectionRows.of_range(parts[0], 1, 4)
    assert part.documents.ids.to_pylist() == ["a1", "a2", "a3"]
    assert list(part.documents.iter_texts()) == list(parts[0].documents.iter_texts(1, 4))
    assert len({part.fingerprint, parts[0].fingerprint, CollectionRows.of_range(parts[0], 1, 5).fingerprint}) == 3
