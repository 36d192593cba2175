"""Grouping by query out of core: equal to a dict, and its memory does not follow the file."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval_kd.data.score_formats import grouping
from retrieval_kd.data.score_formats.grouping import Spill
from retrieval_kd.data.score_formats.pairs import Pairs, Source


def batch(rows: list[tuple[str, str, float]]) -> Pairs:
    queries, documents, scores = zip(*rows, strict=True)
    places = np.arange(len(rows))
    return Pairs(pa.array(queries), pa.array(documents), np.array(scores, dtype=np.float32), places)


@pytest.mark.parametrize("in_memory", [1, 7, 10**6])
def test_equal_to_a_dict(in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts above the limit are divided again, down to the last bit of the hash."""
    monkeypatch.setattr(grouping, "_ROWS_IN_MEMORY", in_memory)
    generator = np.random.default_rng(1)
    pairs = [(f"q{q}", f"d{d}", float(q * d)) for q, d in generator.integers(0, 12, (300, 2)).tolist()]
    expected: dict[str, dict[str, float]] = {}
    for query, document, score in pairs:
        expected.setdefault(query, {})[document] = score
    counts: Counter[str] = Counter()
    with Spill(tmp_path) as spill:
        for start in range(0, 300, 50):
            spill.add(batch(pairs[start : start + 50]))
        assert spill.rows == 300
        found = list(spill.queries(Source(tmp_path / "x"), counts))
    assert [row.query_id for row in found] == sorted(expected, key=lambda one: (zlib.crc32(one.encode()), one))
    for row in found:
        assert row.doc_ids == list(expected[row.query_id])
        assert row.scores.tolist() == list(expected[row.query_id].values())
    assert counts == {"repeated_pairs": 300 - sum(map(len, expected.values()))}
    assert list(tmp_path.iterdir()) == []


def test_queries_of_one_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``plumless`` and ``buckeroo`` have the same CRC-32: they stay two queries, by id."""
    monkeypatch.setattr(grouping, "_ROWS_IN_MEMORY", 1)
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    with Spill(tmp_path) as spill:
        spill.add(batch([("plumless", "a", 1), ("buckeroo", "a", 2), ("plumless", "b", 3)]))
        found = list(spill.queries(Source(tmp_path / "x"), Counter()))
    assert [(row.query_id, row.doc_ids, row.scores.tolist()) for row in found] == [
        ("buckeroo", ["a"], [2.0]),
        ("plumless", ["a", "b"], [1.0, 3.0]),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_follow_the_file(tmp_path: Path) -> None:
    """Five times the rows: 480,000 more pairs, 70 MB as Python lists, raise the peak by less than 40."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "convert_memory.py"
    write_triples = runpy.run_path(str(benchmark))["write_triples"]
    for rows in (60_000, 300_000):
        write_triples(tmp_path / f"{rows}.tsv", rows)
    command = [sys.executable, str(benchmark), "--measure", str(tmp_path / "60000.tsv"), str(tmp_path / "300000.tsv")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["pairs"] + one["repeated_pairs"] for one in found] == [120_000, 600_000]
    assert found[0]["growth_mb"] > 40
    assert found[1]["growth_mb"] < 40
