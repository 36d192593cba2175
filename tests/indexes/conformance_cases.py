"""The recipes that the conformance tests run, and the vectors or texts that they are built from and asked with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tiny import unit


@dataclass(frozen=True)
class Case:
    """A recipe and the recall@10 of its own exact scores that it must reach on the random documents."""

    recipe: dict[str, Any]
    recall: float
    documents: int = 400
    dimension: int = 32
    """Of dense vectors; the number of terms of sparse ones; a quarter of it is the length of a token's vector."""
    small: tuple[tuple[str, Any], ...] = ()
    """Keys of the recipe that differ where it is built of a single document."""
    finds_all_copies: bool = True
    """Whether 40 equal documents that lead are all seen, so that the cut between them is by id."""
    filtered: float = 1.0
    """Recall@10 among allowed rows of the hits of a search for everything without the others; 1.0: the same hits."""

    @property
    def name(self) -> str:
        shown = ("kind", "factory", "metric", "scoring", "rerank", "store")
        return "-".join(str(value) for key, value in self.recipe.items() if key in shown)


def _faiss(factory: str, recall: float, *, copies: bool = True, filtered: float = 1.0, **keys: Any) -> Case:
    """One document trains no codebook, so that it is indexed flat."""
    recipe = {"kind": "faiss", "factory": factory, **keys}
    small = (("factory", "Flat"), ("search", {}))
    return Case(recipe, recall, small=small, finds_all_copies=copies, filtered=filtered)


def _late_interaction(factory: str, recall: float, filtered: float = 1.0, **keys: Any) -> Case:
    """One document trains no codebook, so that its tokens are indexed flat."""
    small = (("factory", "Flat"), ("search", {}))
    return Case({"kind": "late-interaction", "factory": factory, **keys}, recall, small=small, filtered=filtered)


def _reranked(factory: str, store: str, recall: float, **keys: Any) -> Case:
    """``Flat`` has nothing to re-rank."""
    small = (("factory", "Flat"), ("rerank", None), ("search", {}))
    recipe = {"kind": "faiss", "factory": factory, "rerank": {"store": store}, **keys}
    return Case(recipe, recall, small=small, filtered=0.9)


def _distill_vq(factory: str, recall: float, **keys: Any) -> Case:
    """It trains on documents alone here; one document trains nothing, so that it is indexed flat."""
    recipe = {"kind": "distill-vq", "factory": factory, **keys}
    return Case(recipe, recall, small=(("kind", "faiss"), ("factory", "Flat"), ("search", {})))


CASES = [
    Case({"kind": "bm25"}, 1.0),
    Case({"kind": "sparse-exact"}, 1.0),
    Case({"kind": "seismic"}, 0.99),
    _distill_vq("OPQ16,PQ16x4", 0.5),
    _distill_vq("IVF8,RQ8x4", 0.3, search={"nprobe": 8}),
    Case({"kind": "lucene"}, 1.0),
    Case({"kind": "lucene-impact", "scale": 1000}, 0.99),
    Case({"kind": "maxsim-exact"}, 1.0),
    _late_interaction("IVF16,PQ8x4fs", 0.95, search={"nprobe": 12, "token_candidates": 300, "candidates": 120}),
    _late_interaction("IVF16,SQ8", 0.95, store="codes", search={"nprobe": 16, "token_candidates": 300}),
    _late_interaction("IVF16,SQ8", 0.9, 0.9, scoring="xtr", search={"nprobe": 16, "token_candidates": 1000}),
    _faiss("Flat", 1.0),
    _faiss("Flat", 1.0, metric="cosine"),
    _faiss("HNSW16", 0.95, copies=False, filtered=0.95, search={"ef_search": 64}),
    _faiss("IVF8,Flat", 1.0, search={"nprobe": 8}),
    _faiss("IVF8,Flat", 0.6, copies=False, search={"nprobe": 3}),
    _faiss("SQ8", 0.95),
    _faiss("PQ16x4", 0.5),
    _faiss("PCAR32,IVF4,PQ8x4,RFlat", 0.9, filtered=0.9, search={"nprobe": 4, "k_factor": 8}),
    _faiss("HNSW32,SQ8", 0.95, copies=False, filtered=0.95, search={"ef_search": 64}),
    _faiss("PQ16x4fs", 0.5),
    _faiss("IVF8,PQ16x4fs", 0.5, search={"nprobe": 8}),
    _faiss("IVF16,RaBitQ", 0.4, search={"nprobe": 16}),
    _faiss("OPQ16,PQ16x4", 0.5),
    _faiss("RQ8x4", 0.5),
    _reranked("IVF8,PQ8x4", "float16", 0.95, search={"nprobe": 8, "candidates": 200}),
    _reranked("PQ8x4", "int8", 0.9, search={"candidates": 200}),
]


@dataclass(frozen=True)
class Made:
    """What an index is built from (texts, or the values of vectors and how they are compared) and ten queries."""

    values: Any
    queries: Any
    similarity: str = "dot"
    vocabulary: list[str] | None = None


def make_text(case: Case, number: int, copies: Sequence[int], texts: Callable[..., list[str]]) -> Made:
    documents = texts(number)
    for copy in copies:
        documents[copy] = documents[0]
    return Made(documents, [documents[0], *texts(9, seed=8)])


def make_dense(case: Case, number: int, copies: Sequence[int], texts: Callable[..., list[str]]) -> Made:
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((number, case.dimension)).astype(np.float32)
    matrix[list(copies)] = matrix[0]
    return Made(matrix, np.concatenate([matrix[:1], rng.standard_normal((9, case.dimension)).astype(np.float32)]))


def make_sparse(case: Case, number: int, copies: Sequence[int], texts: Callable[..., list[str]]) -> Made:
    """All documents and queries have term 0: each is every one's hit."""
    rng = np.random.default_rng(3)
    weights = rng.random((number + 9, case.dimension)).astype(np.float32)
    weights[:, 1:] *= rng.random((number + 9, case.dimension - 1)) < 0.2
    weights[list(copies)] = weights[0]
    asked = csr_array(np.concatenate([weights[:1], weights[number:]]))
    return Made(csr_array(weights[:number]), asked, "cosine", [f"w{term}" for term in range(case.dimension)])


def make_multi_vector(case: Case, number: int, copies: Sequence[int], texts: Callable[..., list[str]]) -> Made:
    rng = np.random.default_rng(3)
    shape = case.dimension // 4
    tokens = [unit(rng.standard_normal((rng.integers(1, 9), shape))).astype(np.float32) for _ in range(number + 9)]
    for copy in copies:
        tokens[copy] = tokens[0]
    return Made(tokens[:number], [tokens[0], *tokens[number:]], "maxsim")


MAKERS: dict[str, Callable[..., Made]] = {
    "text": make_text,
    "dense": make_dense,
    "sparse": make_sparse,
    "multi-vector": make_multi_vector,
}
"""What an engine takes → the documents and queries it is tried with."""
