"""Vectors of every layout for exports to other engines, and what they find by our own exact indexes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.sources import make_collection
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.indexes.build import build_index

MODEL = InputRef("f" * 64, name="nobody/model")
INDEXES = {"dense": "flat", "sparse": "sparse-exact", "multi-vector": "maxsim-exact"}
SIMILARITIES = [
    ("dense", "dot"),
    ("dense", "cosine"),
    ("sparse", "dot"),
    ("sparse", "cosine"),
    ("multi-vector", "maxsim"),
]
DOCUMENTS, QUERIES, TERMS = 60, 8, 30


def write(
    out: Path,
    values: Any,
    similarity: str = "dot",
    *,
    ids: Sequence[str] | None = None,
    of: str = "documents",
    **rest: Any,
) -> Vectors:
    """Vectors of documents ``d0``, ``d1``, … (of queries ``q0``, …)."""
    number = len(values) if isinstance(values, list) else values.shape[0]
    names = ids or [f"{of[0]}{i}" for i in range(number)]
    given = {"model": MODEL, "collection": InputRef("c" * 64), "split": None if of == "documents" else "test", **rest}
    return write_vectors(out, values, names, of=of, similarity=similarity, **given)


def random_values(layout: str, number: int, seed: int) -> Any:
    """Vectors without ties; some have no term or no token."""
    rng = np.random.default_rng(seed)
    if layout == "dense":
        return rng.normal(size=(number, 12)).astype(np.float32)
    if layout == "multi-vector":
        return [
            rng.normal(size=(1 + (i * 5 + 2) % 7 if i % 9 else 0, 6)).astype(np.float32) for i in range(1, number + 1)
        ]
    weights = rng.exponential(size=(number, TERMS)) * (rng.random((number, TERMS)) < 0.3)
    weights[number // 2] = 0
    return csr_array(weights.astype(np.float32))


def make_pair(folder: Path, layout: str, similarity: str) -> tuple[Vectors, Vectors]:
    """Vectors of documents and of queries; sparse ones have dots, spaces, quotes and a missing token among theirs."""
    tokens: list[str | None] = [
        f"t.{i}" if i % 3 == 0 else f't {i} "ü' if i % 3 == 1 else f"##t{i}" for i in range(TERMS)
    ]
    tokens[7] = None
    rest = {"vocabulary": tokens} if layout == "sparse" else {}
    documents = write(folder / "documents", random_values(layout, DOCUMENTS, 1), similarity, **rest)
    return documents, write(folder / "queries", random_values(layout, QUERIES, 2), similarity, of="queries", **rest)


Hits = list[list[tuple[str, float]]]


def exact_hits(documents: Vectors, queries: Vectors, k: int = 10) -> Hits:
    """What our exact index of the layout finds: document ids and scores, best first."""
    index = build_index(INDEXES[documents.layout], vectors=documents, out=documents.path.with_name("index"))
    scores, rows = index.search(queries.rows(0, len(queries)), k)
    kept = [row >= 0 for row in rows]
    return [
        list(zip(index.ids_of(row[keep]), score[keep].tolist(), strict=True))
        for row, score, keep in zip(rows, scores, kept, strict=True)
    ]


def assert_same_hits(found: Hits, expected: Hits) -> None:
    """The same documents in the same order, with scores that agree to 1e-5."""
    assert [[doc for doc, _ in hits] for hits in found] == [[doc for doc, _ in hits] for hits in expected]
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose([score for _, score in theirs], [score for _, score in ours], rtol=1e-5, atol=1e-6)


def make_books(folder: Path) -> Collection:
    """Two documents with attributes of every type, one of whose names no engine takes."""
    beir = folder / "books-beir"
    (beir / "qrels").mkdir(parents=True)
    rows = [
        {
            "_id": "d0",
            "title": "Émile",
            "text": "On\neducation",
            "year": 1762,
            "price": 2.5,
            "in print": True,
            "vector": "x",
        },
        {"_id": "d1", "title": "", "text": 'A "quoted" word', "price": None, "in print": False, "2nd": "y"},
    ]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q0", "text": "education"}) + "\n")
    (beir / "qrels" / "test.tsv").write_text("q0\td0\t1\n")
    return make_collection(str(beir), folder / "books")


def lines(path: Path, name: str) -> list[Any]:
    """The JSON lines of a part."""
    return [json.loads(line) for line in (path / name).read_text(encoding="utf-8").splitlines()]
