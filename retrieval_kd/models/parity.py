"""How near an exported model is to the torch model: vectors, scores, and nDCG@10 of an exact search by each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import InputError, RetrievalKDError, UsageError, did_you_mean
from retrieval_kd.models.onnx import deviation
from retrieval_kd.models.vectors_of_texts import Encoded, MultiVectors, SparseVectors

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.run import Run

MEASURE = "nDCG@10"
_DEPTH = 10
_BLOCK = 512
"""Documents that are searched at a time."""
_OTHERS = 30
"""Documents that a cross-encoder ranks for a query beside the judged ones."""
_SEED = 13

Vectors = Encoded | SparseVectors | MultiVectors
Encode = Callable[[Sequence[str], str], Vectors]
"""(texts, task) → their vectors."""
Scores = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(queries, documents) → the logit [n] of each pair."""


@dataclass(frozen=True)
class Tolerance:
    """What an exported model may differ from torch; None bounds nothing."""

    max_difference: float | None = None
    """Of a number of a vector, or of a logit."""
    min_cosine: float | None = None
    """Of a vector by torch and by the exported model."""
    min_kendall_tau: float | None = None
    """Of a cross-encoder's order of pairs."""
    max_ndcg_loss: float | None = None
    """nDCG@10 of torch minus that of the exported model, where a collection and a split are given."""

    def broken(self, found: Mapping[str, Any]) -> list[str]:
        """What lies outside, in words."""
        problems = []
        for field in fields(self):
            bound, value = getattr(self, field.name), found.get(field.name.split("_", 1)[1])
            wrong = bound is not None and value is not None
            if wrong and not (value <= bound if field.name.startswith("max") else value >= bound):
                problems.append(f"{field.name.split('_', 1)[1].replace('_', ' ')} is {value:.6g}, allowed {bound:g}")
        return problems


TOLERANCES = {
    "onnx": Tolerance(max_difference=1e-3, min_cosine=0.9999, min_kendall_tau=0.999, max_ndcg_loss=0.001),
    "onnx-int8": Tolerance(min_cosine=0.9, min_kendall_tau=0.8, max_ndcg_loss=0.01),
}
"""Format → what is allowed where nothing else is said."""


def tolerance_of(format: str, **bounds: float | None) -> Tolerance:
    """What is allowed for a format, with the ``bounds`` that are given (not None). `UsageError` for an unknown one."""
    if format not in TOLERANCES:
        raise UsageError(f"unknown format '{format}'{did_you_mean(format, TOLERANCES)}")
    return replace(TOLERANCES[format], **{name: bound for name, bound in bounds.items() if bound is not None})


@dataclass(frozen=True)
class Task:
    """Queries to search for, their judgements, and the documents to search, ids descending."""

    split: str
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    rows: np.ndarray
    collection: Collection

    def ndcg(self, run: Run) -> float:
        """The mean nDCG@10 of a run over the split's queries."""
        from retrieval_kd.measures import evaluate_run

        values = evaluate_run(run, self.qrels, [MEASURE])[MEASURE]
        return float(np.mean(list(values.values())))


def make_task(collection: Collection, split: str, documents: int | None) -> Task:
    """The search of a split in all documents, or in ``documents``: the relevant ones and others by chance, seeded.

    Raises `InputError` when the split's relevant documents are more than ``documents``.
    """
    qrels = collection.qrels(split)
    total = len(collection.documents)
    rows = np.arange(total)
    if documents is not None and documents < total:
        relevant = {doc_id for judged in qrels.values() for doc_id, grade in judged.items() if grade > 0}
        kept = np.unique(collection.documents.rows(sorted(relevant)))
        if len(kept) > documents:
            raise InputError(f"split '{split}' has {len(kept)} relevant documents; sample at least as many")
        others = np.setdiff1d(rows, kept)
        chance = np.random.default_rng(_SEED).choice(others, documents - len(kept), replace=False)
        rows = np.concatenate([kept, chance])
    ids = collection.documents.ids_of(rows)
    falling = sorted(range(len(rows)), key=ids.__getitem__, reverse=True)
    return Task(split, collection.queries(split), qrels, rows[falling], collection)


def compare_vectors(expected: Iterable[Vectors], found: Iterable[Vectors]) -> dict[str, float]:
    """The largest difference of a number and the lowest cosine of a vector; both hold the same texts' vectors.

    Raises `RetrievalKDError` when a text was cut elsewhere or has another number of token vectors.
    """
    difference, cosine = 0.0, 1.0
    for one, other in zip(expected, found, strict=True):
        if not np.array_equal(one.tokens_lost, other.tokens_lost):
            raise RetrievalKDError("the exported model cuts its texts at other places than torch")
        if isinstance(one, MultiVectors) and not np.array_equal(one.lengths, other.lengths):  # type: ignore[union-attr]
            raise RetrievalKDError("the exported model gives another number of token vectors than torch")
        a, b = _matrices(one, other)
        if not a.shape[0]:  # texts without a token that counts
            continue
        difference = max(difference, float(abs(a - b).max()))
        lengths = np.sqrt(_dots(a, a)), np.sqrt(_dots(b, b))
        norms = lengths[0] * lengths[1]
        both_empty = (lengths[0] == 0) & (lengths[1] == 0)
        cosines = np.where(both_empty, 1.0, _dots(a, b) / np.where(norms > 0, norms, 1.0))
        cosine = min(cosine, float(cosines.min(initial=1.0)))
    return {"difference": difference, "cosine": cosine}


def compare_scores(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The largest difference of a cross-encoder's logits [n], and Kendall's tau of the order of the pairs.

    Tau is 0 where an order was lost, and left out where torch's scores, of a single pair or all equal, have none.
    """
    far = deviation(found, expected)
    if np.ptp(expected) == 0:
        return {"difference": far.max}
    return {"difference": far.max, "kendall_tau": far.kendall_tau or 0.0}


def _matrices(one: Vectors, other: Vectors) -> tuple[Any, Any]:
    """Both vectors as float64 matrices of the same width: of texts, or of tokens; sparse ones as CSR."""
    from scipy.sparse import csr_array

    if isinstance(one, SparseVectors) and isinstance(other, SparseVectors):
        width = 1 + max(int(vectors.terms.max(initial=0)) for vectors in (one, other))
        ends = [np.concatenate([[0], np.cumsum(vectors.lengths)]) for vectors in (one, other)]
        a, b = (
            csr_array((vectors.weights.astype(np.float64), vectors.terms, end), shape=(len(end) - 1, width))
            for vectors, end in zip((one, other), ends, strict=True)
        )
        return a, b
    a, b = (v.tokens if isinstance(v, MultiVectors) else v.vectors for v in (one, other))  # type: ignore[union-attr]
    return a.astype(np.float64), b.astype(np.float64)


def _dots(a: Any, b: Any) -> np.ndarray:
    """The dot product [n] of row i with row i."""
    return np.einsum("ij,ij->i", a, b) if isinstance(a, np.ndarray) else np.asarray(a.multiply(b).sum(axis=1)).ravel()


def search(task: Task, encode: Encode, similarity: str) -> Run:
    """The run [10 hits a query] of an exact search with vectors by ``encode``."""
    from retrieval_kd.data.run import Run

    queries = encode(list(task.queries.values()), "query")
    best = np.full((len(task.queries), 0), -np.inf, dtype=np.float32)
    places = np.zeros((len(task.queries), 0), dtype=np.int64)
    for start in range(0, len(task.rows), _BLOCK):
        rows = task.rows[start : start + _BLOCK]
        scores = _similarities(queries, encode(task.collection.documents.texts(rows), "document"), similarity)
        best = np.concatenate([best, scores], axis=1)
        places = np.concatenate([places, np.tile(np.arange(start, start + len(rows)), (len(best), 1))], axis=1)
        # Documents are in the order of falling ids, which a stable sort keeps among equal scores.
        order = np.argsort(-best, axis=1, kind="stable")[:, :_DEPTH]
        best, places = np.take_along_axis(best, order, 1), np.take_along_axis(places, order, 1)
    hits = [row[np.isfinite(scores)] for row, scores in zip(places, best, strict=True)]
    ids = [task.collection.documents.ids_of(task.rows[row]) for row in hits]
    return Run.from_hits(list(task.queries), ids, [row[np.isfinite(row)] for row in best])


def rank_pairs(task: Task, scores: Scores) -> Run:
    """The run of a cross-encoder that ranks, for each query, its judged documents and 30 others (seeded)."""
    from retrieval_kd.data.run import Run

    chance = np.random.default_rng(_SEED)
    documents = task.collection.documents
    ids, texts = [], []
    for query_id in task.queries:
        others = documents.ids_of(chance.choice(task.rows, min(_OTHERS, len(task.rows)), replace=False))
        candidates = list(dict.fromkeys([*task.qrels[query_id], *others]))
        ids.append(candidates)
        texts.append(documents.texts(documents.rows(candidates)))
    queries = [text for text, found in zip(task.queries.values(), ids, strict=True) for _ in found]
    values = scores(queries, [text for found in texts for text in found])
    return Run.from_hits(list(task.queries), ids, np.split(values, np.cumsum([len(found) for found in ids])[:-1]))


def _similarities(queries: Vectors, documents: Vectors, similarity: str) -> np.ndarray:
    """Scores [queries, documents] float32; minus infinity for what shares no term or has no token."""
    if isinstance(queries, MultiVectors) and isinstance(documents, MultiVectors):
        return _maxsim(queries, documents, mean=similarity == "meanmaxsim")
    a, b = _matrices(queries, documents)
    scores = a @ b.T
    scores = scores if isinstance(scores, np.ndarray) else scores.toarray()
    if similarity == "cosine":
        norms = np.sqrt(np.outer(_dots(a, a), _dots(b, b)))
        scores = scores / np.where(norms > 0, norms, 1.0)
    if isinstance(queries, SparseVectors):
        scores = np.where(scores == 0, -np.inf, scores)
    return np.asarray(scores, dtype=np.float32)


def _maxsim(queries: MultiVectors, documents: MultiVectors, *, mean: bool) -> np.ndarray:
    scores = np.full((len(queries.lengths), len(documents.lengths)), -np.inf, dtype=np.float32)
    some = np.flatnonzero(documents.lengths)
    if not len(some):
        return scores
    starts = (np.cumsum(documents.lengths) - documents.lengths)[some]
    for i, tokens in enumerate(np.split(queries.tokens, np.cumsum(queries.lengths)[:-1])):
        best = np.maximum.reduceat(tokens @ documents.tokens.T, starts, axis=1)
        scores[i, some] = best.mean(axis=0) if mean else best.sum(axis=0)
    return scores
