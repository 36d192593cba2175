"""A small collection and vectors of it, made here, for every test of the indexes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.sources import make_collection
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.data.vectors import Vectors

WORDS = [f"{a}{b}" for a in ("al", "be", "ga", "de", "ep", "ze") for b in ("ko", "mi", "ru", "ta", "no")]
MODEL = InputRef("f" * 64, name="nobody/model")


@pytest.fixture
def synthetic_texts() -> Callable[..., list[str]]:
    """A function that makes texts of 3 to 25 words, some far more frequent; every tenth repeats its predecessor."""

    def make(number: int, seed: int = 7) -> list[str]:
        rng = np.random.default_rng(seed)
        weights = 1 / np.arange(1, len(WORDS) + 1)
        texts: list[str] = []
        for row in range(number):
            words = rng.choice(WORDS, size=rng.integers(3, 26), p=weights / weights.sum())
            texts.append(texts[-1] if row % 10 == 9 else " ".join(words))
        return texts

    return make


@pytest.fixture
def collect(tmp_path: Path) -> Callable[..., Collection]:
    """A function that makes a collection artifact of texts whose ids are ``d0``, ``d1``, …, or begin at ``start``."""

    def make(texts: Sequence[str], name: str = "collection", *, start: int = 0) -> Collection:
        beir = tmp_path / f"{name}-beir"
        (beir / "qrels").mkdir(parents=True, exist_ok=True)
        rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts, start)]
        (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (beir / "queries.jsonl").write_text(json.dumps({"_id": "q0", "text": "alko"}) + "\n")
        (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq0\td{start}\t1\n")
        return make_collection(str(beir), tmp_path / name)

    return make


@pytest.fixture
def embed(tmp_path: Path) -> Callable[..., Vectors]:
    """A function that makes a vectors artifact of a matrix, a sparse one or a list; row i is document ``d<i>``."""

    def make(matrix: Any, similarity: str = "dot", name: str = "vectors", **changes: object) -> Vectors:
        values: dict[str, object] = {"of": "documents", "split": None, "collection": InputRef("c" * 64), **changes}
        ids = [f"d{i}" for i in range(len(matrix) if isinstance(matrix, list) else matrix.shape[0])]
        return write_vectors(tmp_path / name, matrix, ids, similarity=similarity, model=MODEL, **values)  # type: ignore[arg-type]

    return make
