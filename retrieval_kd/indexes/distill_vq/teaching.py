"""What is taught: queries, the documents that their teachers think best, and batches of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrieval_kd.errors import ArtifactError, InputError, first
from retrieval_kd.indexes.faiss_build import BATCH, normalised
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.scores import Scores
    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.indexes.distill_vq.recipe import Training

HELD_OUT = 50, 500
"""Queries that are held out at least (of enough) and at most: with fewer the best epoch is luck."""


class Documents:
    """The memory-mapped vectors of documents, of length 1 where they are compared by cosine."""

    def __init__(self, matrix: np.ndarray, *, cosine: bool) -> None:
        self.matrix = matrix
        self.cosine = cosine

    def __len__(self) -> int:
        return len(self.matrix)

    def rows(self, rows: np.ndarray | slice) -> np.ndarray:
        """Some of them [n, d] float32."""
        part = np.ascontiguousarray(self.matrix[rows], dtype=np.float32)
        return normalised(part) if self.cosine else part

    def batches(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All of them, and where they are."""
        for start in range(0, len(self), BATCH):
            part = slice(start, min(start + BATCH, len(self)))
            yield part, self.rows(part)


@dataclass(frozen=True)
class Pupils:
    """Queries with what their teachers say of documents."""

    vectors: np.ndarray
    """[Q, d] float32."""
    own: np.ndarray
    """[Q] int64: the row of the document that stands as a query and is no result of its own; else -1."""
    top: np.ndarray
    """[Q, K] int32: rows of the greatest inner products, best first, without its own."""
    scored: tuple[tuple[np.ndarray, np.ndarray], ...] | None = None
    """Rows (ascending) and scores that score files have of each query, or None without score files."""

    def __len__(self) -> int:
        return len(self.vectors)

    def part(self, places: np.ndarray) -> Pupils:
        """Some of the queries."""
        scored = None if self.scored is None else tuple(self.scored[place] for place in places.tolist())
        return Pupils(self.vectors[places], self.own[places], self.top[places], scored)

    def best_scored(self, place: int, k: int) -> np.ndarray:
        """The rows of the ``k`` highest scores of a score file."""
        rows, scores = self.scored[place] if self.scored is not None else (np.empty(0, np.int64), np.empty(0))
        return np.asarray(rows[np.argsort(-scores, kind="stable")[:k]])


@dataclass(frozen=True)
class Lesson:
    """A batch: each document once, and for every query which of them count."""

    queries: np.ndarray
    """[B, d]."""
    rows: np.ndarray
    """[n] ascending."""
    mask: np.ndarray
    """[B, n] bool: all but a query's own document."""
    drawn: np.ndarray
    """[B, m] columns that were drawn for the query itself (its best first)."""
    scores: np.ndarray
    """[B, n] float32 of score files."""
    known: np.ndarray
    """[B, n] bool: where there are scores."""


def real_queries(
    queries: Vectors, documents: Documents, top: int, files: Sequence[Scores], ids: Sequence[str]
) -> Pupils:
    """The queries of a split or a log.

    Raises `InputError` for NaN and infinite values, `ArtifactError` when score files know none of the queries.
    """
    vectors = Documents(queries.matrix, cosine=documents.cosine).rows(slice(None))
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
    if bad:
        raise InputError(
            f"{queries.path}: {len(bad)} query vectors have NaN or infinite values "
            f"(queries {first(queries.ids[row] for row in bad)}); encode again"
        )
    own = np.full(len(vectors), -1, dtype=np.int64)
    scored = _scored(files, queries.ids, ids) if files else None
    return Pupils(vectors, own, best(vectors, own, documents, top, "queries"), scored)


def pseudo_queries(documents: Documents, number: int, top: int, seed: int, *, own_document: bool) -> Pupils:
    """Documents that stand as queries: ``number`` of them, drawn with ``seed``."""
    rows = np.sort(np.random.default_rng([seed, 1]).permutation(len(documents))[:number]).astype(np.int64)
    vectors = documents.rows(rows)
    own = np.full(len(rows), -1, dtype=np.int64) if own_document else rows
    return Pupils(vectors, own, best(vectors, own, documents, top, "documents as queries"))


def best(queries: np.ndarray, own: np.ndarray, documents: Documents, top: int, what: str) -> np.ndarray:
    """Rows [Q, top] int32 of the greatest inner products, best first, by exact search, without a query's own row.

    Documents are read in batches. There are fewer columns when there are fewer documents.
    """
    faiss = import_faiss()
    alone = not (own >= 0).any()
    wanted = min(top + (0 if alone else 1), len(documents))
    scores = np.full((len(queries), wanted), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), wanted), -1, dtype=np.int64)
    with progress(f"exact search for {len(queries):,} {what}", len(documents)) as advance:
        for place, part in documents.batches():
            near, found = faiss.knn(queries, part, min(wanted, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
            scores, rows = np.hstack([scores, near]), np.hstack([rows, found + place.start])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
            scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
            advance(len(part))
    if alone:
        return rows.astype(np.int32)
    last = np.argsort(rows == own[:, None], axis=1, kind="stable")  # the own row, if it is there, goes to the end
    kept: np.ndarray = np.take_along_axis(rows, last, axis=1)[:, : max(1, wanted - 1)]
    return kept.astype(np.int32)


def split(pupils: Pupils, share: float, seed: int) -> tuple[Pupils, Pupils]:
    """Those to train on, and those held out: ``share`` of them, in the bounds of `HELD_OUT`, at most a third.

    A query that a log has several times counts once: what was held out is never trained on. Raises `InputError` when
    all are the same.
    """
    _, first_of, number = np.unique(pupils.vectors, axis=0, return_index=True, return_inverse=True)
    number, first_of = np.argsort(np.argsort(first_of))[number.ravel()], np.sort(first_of)  # by first appearance
    different = len(first_of)
    if different < 2:
        raise InputError(f"all {len(pupils)} queries that teach have the same vector; at least 2 are needed")
    order = np.random.default_rng([seed, 2]).permutation(different)
    least, most = HELD_OUT
    held = max(1, min(max(round(share * different), min(least, different // 3)), most))
    to_train = np.ones(different, dtype=bool)
    to_train[order[:held]] = False
    return pupils.part(np.flatnonzero(to_train[number])), pupils.part(np.sort(first_of[order[:held]]))


def lessons(real: Pupils | None, pseudo: Pupils | None, keys: Training, seed: Sequence[int]) -> Iterator[Lesson]:
    """The batches of an epoch, which visits every query of the first (``real``, else ``pseudo``) once."""
    rng = np.random.default_rng(list(seed))
    main = real if real is not None else pseudo
    assert main is not None
    share = keys.pseudo_share if real is not None and pseudo is not None else 0.0
    beside = round(share * keys.batch)
    each = max(1, keys.batch - beside)
    order = rng.permutation(len(main))
    for start in range(0, len(main), each):
        groups = [(main, order[start : start + each])]
        if beside and pseudo is not None:
            groups.append((pseudo, rng.integers(0, len(pseudo), beside)))
        yield _lesson([pupils.part(places) for pupils, places in groups], keys, rng)


def steps(real: Pupils | None, pseudo: Pupils | None, keys: Training) -> int:
    """The batches of an epoch."""
    main = real if real is not None else pseudo
    assert main is not None
    beside = round(keys.pseudo_share * keys.batch) if real is not None and pseudo is not None else 0
    return -(-len(main) // max(1, keys.batch - beside))


def _lesson(groups: Sequence[Pupils], keys: Training, rng: np.random.Generator) -> Lesson:
    drawn, rows_of, scores_of = [], [], []
    for pupils in groups:
        for place in range(len(pupils)):
            top = pupils.top[place].astype(np.int64)
            chosen = [_drawn(top, keys.documents, rng)]
            if pupils.scored is not None and len(pupils.scored[place][0]):
                chosen.append(_drawn(pupils.best_scored(place, keys.top), keys.documents, rng))
            drawn.append(np.concatenate(chosen))
            rows, scores = pupils.scored[place] if pupils.scored is not None else (_NONE, _NONE)
            rows_of.append(rows)
            scores_of.append(scores)
    own = np.concatenate([pupils.own for pupils in groups])
    unique = np.unique(np.concatenate(drawn))
    scores = np.zeros((len(drawn), len(unique)), dtype=np.float32)
    known = np.zeros_like(scores, dtype=bool)
    for i, (rows, values) in enumerate(zip(rows_of, scores_of, strict=True)):
        if len(rows):
            near = np.minimum(np.searchsorted(rows, unique), len(rows) - 1)
            known[i] = rows[near] == unique
            scores[i, known[i]] = values[near[known[i]]]
    width = max(map(len, drawn))
    columns = np.stack([np.searchsorted(unique, np.resize(rows, width)) for rows in drawn])
    queries = np.concatenate([pupils.vectors for pupils in groups])
    return Lesson(queries, unique, unique[None] != own[:, None], columns, scores, known)


_NONE = np.empty(0, dtype=np.int64)


def _drawn(best_first: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """The best document and ``number`` of the others, each once."""
    others = rng.permutation(len(best_first) - 1)[:number] + 1
    return best_first[np.concatenate([[0], others]).astype(np.int64)]


def _scored(
    files: Sequence[Scores], query_ids: Sequence[str], ids: Sequence[str]
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    row_of = {document: row for row, document in enumerate(ids)}
    place_of = {query: place for place, query in enumerate(query_ids)}
    found: list[dict[int, list[float]]] = [{} for _ in query_ids]
    unknown: list[str] = []
    for file in files:
        for line in file:
            if line.query_id not in place_of:
                continue
            of_query = found[place_of[line.query_id]]
            for document, score in zip(line.doc_ids, line.scores.tolist(), strict=True):
                if document in row_of:
                    of_query.setdefault(row_of[document], []).append(score)
                else:
                    unknown.append(document)
    if unknown:
        raise ArtifactError(
            f"{files[0].path}: scores {len(unknown)} documents that have no vector (first: {first(unknown)})"
        )
    if not any(found):
        raise ArtifactError(f"{files[0].path}: scores none of the {len(query_ids)} queries; score the same split")
    result = []
    for of_query in found:
        rows = np.array(sorted(of_query), dtype=np.int64)
        # several files are several teachers: their mean where each knows the pair
        full = [row for row in rows.tolist() if len(of_query[row]) == len(files)]
        result.append((np.array(full, np.int64), np.array([np.mean(of_query[row]) for row in full], np.float32)))
    return tuple(result)
