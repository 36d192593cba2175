"""How a FAISS index is searched: all rows or the allowed ones, on the CPU or on GPUs, and the one order of hits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from retrieval_kd.indexes.faiss_device import MOST_GPU_HITS
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.indexes.faiss_structure import searched_part

_SCAN_BELOW = 0.1
"""A graph leads past what is allowed: below this share of allowed rows they are compared one by one."""

_FETCHED = 1 << 22
"""Hits of one call, where more are fetched than are wanted: some 100 MB of scores, rows and their order."""


class NativeSearch:
    """One FAISS index as it is searched. Scores [Q, n] float32 descending and rows [Q, n] int64, -1 at the end."""

    def __init__(self, index: Any, on_gpus: Any | None = None) -> None:
        self.index = index
        self._on_gpus = on_gpus
        self._selects: bool | None = None
        self._effort: int | None = getattr(getattr(searched_part(index), "hnsw", None), "efSearch", None)

    def best(
        self, queries: np.ndarray, number: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best ``number`` (at most as many as are allowed) as FAISS orders them.

        GPUs answer unless rows are filtered or more hits are wanted than they give.
        """
        if allowed is not None:
            return self._best_allowed(queries, number, allowed)
        if self._on_gpus is not None and number <= MOST_GPU_HITS:
            found: tuple[np.ndarray, np.ndarray] = self._on_gpus.search(queries, number)
        elif self._effort is not None and self._effort < number:  # FAISS would stop before it has found so many
            found = self.index.search(queries, number, params=_parameters(self.index, None, number))
        else:
            found = self.index.search(queries, number)
        return found

    def _best_allowed(self, queries: np.ndarray, number: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        faiss = import_faiss()
        share = float(allowed.mean())
        index, queries = _without_transforms(self.index, queries)
        graph = isinstance(index, faiss.IndexHNSW | faiss.IndexNSG)
        if graph and share < _SCAN_BELOW:
            return _select(faiss.downcast_index(index.storage), queries, number, allowed)
        if not self._takes_selectors(index):
            return _fetch_more(index, queries, number, allowed)
        scores, rows = _select(index, queries, number, allowed, widen=1 / share)
        if self._effort is None or (rows >= 0).all():
            return scores, rows
        if graph:  # it did not come by enough of them
            return _select(faiss.downcast_index(index.storage), queries, number, allowed)
        return _fetch_more(index, queries, number, allowed)

    def _takes_selectors(self, index: Any) -> bool:
        """Whether this type of index filters by itself; asked once, with a search among no rows."""
        if self._selects is None:
            nothing = np.zeros(index.ntotal, dtype=bool)
            try:
                _select(index, np.zeros((1, index.d), dtype=np.float32), 1, nothing)
                self._selects = True
            except RuntimeError:
                self._selects = False
        return self._selects


def _without_transforms(index: Any, queries: np.ndarray) -> tuple[Any, np.ndarray]:
    """The index behind the transforms of ``index``, and the queries transformed."""
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    if not isinstance(part, faiss.IndexPreTransform):
        return part, queries
    for step in range(part.chain.size()):
        queries = part.chain.at(step).apply(queries)
    return _without_transforms(part.index, queries)


def _select(
    index: Any, queries: np.ndarray, number: int, allowed: np.ndarray, *, widen: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The best allowed rows of an index that filters by itself."""
    selector = import_faiss().IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    found: tuple[np.ndarray, np.ndarray] = index.search(
        queries, number, params=_parameters(index, selector, number, widen=widen)
    )
    return found


def _parameters(index: Any, selector: Any, number: int, *, widen: float = 1.0) -> Any:
    """The search parameters that ``index`` has set, with a selector.

    A graph's effort is at least the number of hits, times ``widen``. FAISS takes parameters as a whole: what is left
    out would fall back to its defaults.
    """
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    if isinstance(part, faiss.IndexRefine):
        inner = _parameters(part.base_index, selector, math.ceil(number * part.k_factor), widen=widen)
        return faiss.IndexRefineSearchParameters(k_factor=part.k_factor, base_index_params=inner)
    if isinstance(part, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(part.index, selector, number, widen=widen))
    if isinstance(part, faiss.IndexIVF):
        own = {"sel": selector, "nprobe": part.nprobe, "max_codes": part.max_codes}
        if isinstance(part, faiss.IndexIVFPQ):
            return faiss.IVFPQSearchParameters(
                **own, polysemous_ht=part.polysemous_ht, scan_table_threshold=part.scan_table_threshold
            )
        return faiss.SearchParametersIVF(**own)
    if isinstance(part, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=math.ceil(max(part.hnsw.efSearch, number) * widen))
    return faiss.SearchParameters(sel=selector)


def _fetch_more(index: Any, queries: np.ndarray, number: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best allowed rows of an index that cannot filter: more are fetched until enough of them are allowed."""
    scores = np.full((len(queries), number), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), number), -1, dtype=np.int64)
    waiting = np.arange(len(queries))
    fetch = number / float(allowed.mean())
    while len(waiting):
        fetch = min(len(allowed), int(np.ceil(1.5 * fetch)) + 8)
        left = []
        step = max(1, _FETCHED // fetch)
        for start in range(0, len(waiting), step):
            part = waiting[start : start + step]
            found_scores, found_rows = index.search(queries[part], fetch)
            keep = (found_rows >= 0) & allowed[found_rows]
            first = np.argsort(~keep, axis=1, kind="stable")[:, :number]
            kept = np.take_along_axis(keep, first, axis=1)
            scores[part] = np.where(kept, np.take_along_axis(found_scores, first, axis=1), -np.inf)
            rows[part] = np.where(kept, np.take_along_axis(found_rows, first, axis=1), -1)
            left.append(part[~(kept[:, -1] | (found_rows[:, -1] < 0) | (fetch == len(allowed)))])
        waiting = np.concatenate(left)
        fetch *= 4
    return scores, rows


def in_order(scores: np.ndarray, rows: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``scores`` and ``rows`` [Q, n] by score, then by id (``rank``), both descending; row -1 last, with score -inf."""
    scores = np.where(rows < 0, np.float32(-np.inf), scores)
    order = np.lexsort((np.where(rows < 0, len(rank), rank[rows]), -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def padded(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``k`` columns, or as many more of no hits."""
    missing = k - rows.shape[1]
    if missing <= 0:
        return scores[:, :k], rows[:, :k]
    width = ((0, 0), (0, missing))
    return np.pad(scores, width, constant_values=-np.inf), np.pad(rows, width, constant_values=-1)
