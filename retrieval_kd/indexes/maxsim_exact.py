"""Token vectors of every document, all compared with those of a query: exact MaxSim, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.indexes.base import Index, IndexRecipe, Shape, Source, write_rows
from retrieval_kd.indexes.hits import no_hits, ordered
from retrieval_kd.indexes.late_interaction_scoring import check_queries
from retrieval_kd.plan import Draft

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

_BLOCK = 8192
"""Tokens of documents that are compared at a time; a longer document is a block of its own."""
_NUMBERS = 4_194_304
"""Similarities that memory holds at a time (16 MB), and approximate scores of a group of queries."""


class MaxSimExactRecipe(IndexRecipe):
    """No keys: the sum or the mean, as the vectors are to be compared. Nothing can change after the build."""

    kind: Literal["maxsim-exact"]


class MaxSimExactIndex(Index):
    """Late interaction, exact: the sum over query tokens of the greatest dot product with a document's token.

    Khattab and Zaharia, ColBERT, 2020. ``meanmaxsim`` divides by the query's tokens. A document without tokens is no
    hit. Tokens are stored as the vectors have them, float32 or float16.
    """

    Recipe = MaxSimExactRecipe
    takes = "multi-vector"

    @classmethod
    def build(cls, recipe: MaxSimExactRecipe, source: Source, draft: Draft) -> None:
        """Copies the token vectors; `InputError` when there are none, or for numbers that are not finite."""
        if source.vectors is None:
            raise UsageError("a maxsim-exact index is built from vectors")
        vectors = source.vectors
        offsets, tokens = vectors.multi_vector
        if not len(tokens):
            raise InputError(f"{vectors.path}: none of the {len(vectors)} documents has a token to index")
        longest = 0.0
        copy = np.lib.format.open_memmap(draft.path / "tokens.npy", "w+", tokens.dtype, tokens.shape)
        for start in range(0, len(tokens), _BLOCK):
            block = tokens[start : start + _BLOCK]
            norms = np.linalg.norm(block.astype(np.float32), axis=1)
            if not np.isfinite(norms).all():
                raise InputError(f"{vectors.path}: has NaN or infinite token vectors; encode again")
            longest = max(longest, float(norms.max()))
            copy[start : start + _BLOCK] = block
        copy.flush()
        np.save(draft.path / "offsets.npy", offsets)
        draft.counts["documents"] = write_rows(draft.path, vectors.arrow_ids)
        draft.counts["tokens"] = len(tokens)
        draft.counts["documents_without_tokens"] = int(np.count_nonzero(vectors.lengths == 0))
        draft.details.update(metric=vectors.similarity, dimension=vectors.dimension, longest_token=longest)

    @classmethod
    def estimate(cls, recipe: MaxSimExactRecipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document (4 a number of a float32 token; half of it for float16) and none besides."""
        if not isinstance(source, Shape):
            raise UsageError("a maxsim-exact index is built from vectors")
        return source.bytes_per_number * source.dimension * source.entries + 8, 0

    def open(self, recipe: MaxSimExactRecipe, search: Any) -> None:
        """Memory-maps the tokens."""
        self._tokens: np.ndarray = np.load(self.path / "tokens.npy", mmap_mode="r")
        self._offsets: np.ndarray = np.load(self.path / "offsets.npy")
        self._longest = float(self.manifest.details["longest_token"])
        self._mean = self.manifest.details["metric"] == "meanmaxsim"
        # Documents without tokens have no place in a block: reduceat has no empty segments.
        self._rows = np.flatnonzero(np.diff(self._offsets) > 0)

    @property
    def dimension(self) -> int:
        """The length of a token's vector."""
        return int(self._tokens.shape[1])

    @property
    def exact(self) -> bool:
        """True: every token of every document is compared."""
        return True

    def search(
        self, queries: Sequence[np.ndarray], k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of queries that are float32 arrays [tokens, d] each.

        All documents are compared in float32, in blocks; what can be among the best k then gets its float64 sum,
        rounded to float32: a score is the same in any company. A query without tokens has no hit. Raises `UsageError`
        for queries of another dimension or with NaN or infinite values.
        """
        scores, rows = no_hits(len(queries), len(self), k, allowed)
        check_queries(queries, self.dimension)
        asked = [place for place, query in enumerate(queries) if len(query)]
        for group in _groups(asked, [len(query) for query in queries], len(self._rows)):
            approximate = self._approximate([np.asarray(queries[place], dtype=np.float32) for place in group])
            for place, of_all in zip(group, approximate, strict=True):
                query = queries[place].astype(np.float64)
                places = slice(None) if allowed is None else np.flatnonzero(allowed[self._rows])
                found = self._rows[places][_near_best(of_all[places], k, self._slack(query))]
                scores[place], rows[place] = ordered(self._exact(query, found), found, self.rank, k)
        return scores, rows

    def _approximate(self, queries: list[np.ndarray]) -> np.ndarray:
        """Sums [Q, documents with tokens] float32, up to the rounding that depends on a token's place."""
        stacked = np.concatenate(queries)
        starts = np.cumsum([0, *(len(query) for query in queries[:-1])])
        scores = np.empty((len(queries), len(self._rows)), dtype=np.float32)
        for first, last in self._blocks(max(1, _NUMBERS // len(stacked))):
            rows = self._rows[first:last]
            begin, end = self._offsets[rows[0]], self._offsets[rows[-1] + 1]
            similarities = stacked @ self._tokens[begin:end].astype(np.float32, copy=False).T
            best = np.maximum.reduceat(similarities, self._offsets[rows] - begin, axis=1)
            scores[:, first:last] = np.add.reduceat(best, starts, axis=0)
        return scores

    def _blocks(self, most: int) -> Iterator[tuple[int, int]]:
        """Ranges of ``_rows`` whose tokens are at most ``_BLOCK`` and ``most``; one document at least."""
        ends = self._offsets[self._rows + 1]
        first = 0
        while first < len(self._rows):
            limit = self._offsets[self._rows[first]] + min(_BLOCK, most)
            last = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
            yield first, last
            first = last

    def _exact(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores [n] float32 of some documents; equal documents get equal scores."""
        sums = np.empty(len(rows))
        for i, row in enumerate(rows.tolist()):
            tokens = self._tokens[self._offsets[row] : self._offsets[row + 1]].astype(np.float64)
            sums[i] = (query @ tokens.T).max(axis=1).sum()
        return np.asarray(sums / len(query) if self._mean else sums, dtype=np.float32)

    def _slack(self, query: np.ndarray) -> float:
        """How far a float32 sum can be from the float64 one."""
        terms = self.dimension + len(query) + 2
        return terms * 2.0**-23 * self._longest * float(np.linalg.norm(query, axis=1).sum())

    def problems(self) -> list[str]:
        """Broken rows, or bounds that do not divide the tokens into documents."""
        found = super().problems()
        bounds = self._offsets
        whole = len(bounds) == len(self) + 1 and bounds[0] == 0 and bounds[-1] == len(self._tokens)
        if not whole or (np.diff(bounds) < 0).any():
            found.append(f"offsets.npy does not divide {len(self._tokens)} tokens into {len(self)} documents")
        return found


def _groups(places: Sequence[int], tokens: Sequence[int], documents: int) -> Iterator[list[int]]:
    """Queries that are compared together: within the memory for their scores and for a block of similarities."""
    group: list[int] = []
    for place in places:
        larger = sum(tokens[i] for i in group) + tokens[place]
        if group and ((len(group) + 1) * documents > _NUMBERS or larger * _BLOCK > _NUMBERS):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _near_best(scores: np.ndarray, k: int, slack: float) -> np.ndarray:
    """Places of all that can be among the best ``k`` when a score is ``slack`` off at most."""
    if len(scores) <= k:
        return np.arange(len(scores))
    boundary = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero(scores >= boundary - 2 * slack)
