"""One model's vectors in every engine for them: the same run, up to what each engine states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_encoders
from scipy.sparse import csr_array
from tiny_sparse_vectors import overlap, skewed

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.indexes.build import build_index
from retrieval_kd.measures import evaluate_run
from retrieval_kd.models.encode import encode

SCALE = 1000


def test_the_same_run_of_a_splade_model(collection: Collection, tmp_path: Path) -> None:
    """All lists are read, so that Seismic finds all; a Lucene score is off by a half of 1 / scale for each term."""
    model = tiny_encoders.make_splade(tmp_path / "model")
    vectors = encode(model, collection, tmp_path / "vectors")
    queries = encode(model, collection, tmp_path / "queries", queries="train").rows(0, 30)
    keys: dict[str, list[str]] = {
        "sparse-exact": [],
        "seismic": ["search.query_cut=100", "search.heap_factor=0.1"],
        "lucene-impact": [f"scale={SCALE}"],
    }
    runs = {}
    for kind, overrides in keys.items():
        index = build_index(kind, vectors=vectors, out=tmp_path / kind, overrides=overrides)
        runs[kind] = index.search(queries, 40)
    scores, rows = runs["sparse-exact"]
    for ours, theirs in zip(runs["seismic"], runs["sparse-exact"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for place, (values, found) in enumerate(zip(*runs["lucene-impact"], strict=True)):
        exact = dict(zip(rows[place].tolist(), scores[place].tolist(), strict=True))
        most = queries[place : place + 1].sum() / (2 * SCALE) + 1e-4
        np.testing.assert_allclose(values, [exact[row] for row in found.tolist()], atol=most, rtol=0)
    ids = list(collection.queries("train"))
    quality = {}
    for kind, (values, found) in runs.items():
        run = Run.from_hits(ids, [tiny.ids_of(line) for line in found.tolist()], list(values))
        of_each = evaluate_run(run, collection.qrels("train"), ["nDCG@10"])["nDCG@10"]
        quality[kind] = float(np.mean(list(of_each.values())))
    assert quality["seismic"] == quality["sparse-exact"]
    assert abs(quality["lucene-impact"] - quality["sparse-exact"]) <= 0.01
    assert overlap(runs["lucene-impact"][1][:, :10], rows[:, :10]) >= 0.97


def test_stated_agreement_on_skewed_vectors(embed: Callable[..., Vectors], tmp_path: Path) -> None:
    """At the recipes' own settings the best ten agree: .97 for Seismic, .97 for Lucene (scale 100)."""
    vectors = embed(skewed(1500, 2000, seed=1), vocabulary=[f"w{term}" for term in range(2000)])
    queries = skewed(50, 2000, seed=2, entries=15)
    rows = {
        kind: build_index(f"indexes/{kind}", vectors=vectors, out=tmp_path / kind).search(queries, 10)[1]
        for kind in ("sparse-exact", "seismic", "lucene-impact")
    }
    assert overlap(rows["seismic"], rows["sparse-exact"]) >= 0.97
    assert overlap(rows["lucene-impact"], rows["sparse-exact"]) >= 0.97


@pytest.mark.parametrize("kind", ["seismic", "lucene-impact"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_order_of_a_querys_terms_does_not_matter(
    kind: str, similarity: str, embed: Callable[..., Vectors], tmp_path: Path
) -> None:
    """Terms that fall, and one that is given in two parts."""
    vectors = embed(csr_array(np.array([[1, 2, 0], [0, 1, 3], [2, 0, 1.0]])), similarity, vocabulary=["a", "b", "c"])
    index = build_index(kind, vectors=vectors, out=tmp_path / kind)
    mixed = csr_array((np.array([1.0, 0.5, 2, 0.5]), np.array([2, 1, 0, 1]), np.array([0, 4])), shape=(1, 3))
    for ours, theirs in zip(index.search(mixed, 3), index.search(csr_array([[2.0, 1, 1]]), 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
