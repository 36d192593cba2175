"""The verb `tune_index`: the fastest search parameters of a FAISS index that reach a recall against exact search."""

from __future__ import annotations

import json
import logging
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.artifact import Manifest, published_path
from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import ArtifactError, InputError, RetrievalKDError, UsageError
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Index, input_names
from retrieval_kd.indexes.faiss_build import normalised, threads
from retrieval_kd.indexes.faiss_package import import_faiss

if TYPE_CHECKING:
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

TUNED = "tuned.json"
"""In the index's root, beside its generations; it holds for the one whose fingerprint it names."""
_MOST_QUERIES = 1000
_BLOCK = 8192
_NEAR = 16
"""Documents beyond k whose exact score may tie with the k-th."""
_CANDIDATE_FACTORS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class OperatingPoint:
    """Search parameters, the recall they reach and the milliseconds a query takes, one at a time in one thread."""

    search: dict[str, Any]
    recall: float
    ms: float


@dataclass(frozen=True)
class Tuned:
    """The point that was chosen, what it was chosen for, and all points that no other beats in recall and time."""

    search: dict[str, Any]
    recall: float
    ms: float
    target: float
    k: int
    queries: int
    fingerprint: str
    """The generation of the index that was measured."""
    points: list[OperatingPoint]
    file: str


def tune_index(
    index: str | Path | Index,
    *,
    queries: str | Path | Vectors,
    vectors: str | Path | Vectors | None = None,
    recall: float = 0.95,
    k: int = 10,
    out: Path | None = None,
) -> Tuned:
    """The fastest search parameters whose recall@k is at least ``recall``, written to ``tuned.json`` in the index.

    The recall is that of the hits of exact search over ``vectors`` (default: those the index was built from), for at
    most 1000 of the ``queries``; the time is of one query in one thread. A search uses the point when it is given the
    search parameter ``tuned=true``. Raises `RetrievalKDError` with the best recall there is when none is enough,
    `UsageError` for an index without such parameters, `ArtifactError` for vectors by another model.
    """
    if not 0 < recall <= 1 or k < 1:
        raise UsageError(f"recall is above 0 and at most 1, k at least 1 (got {recall} and {k})")
    home = published_path(index.path) if isinstance(index, Index) else Path(index)
    opened = Index.load(home, verify=not isinstance(index, Index))  # one of our own: its parameters change
    pieces: list[Any] = getattr(opened, "segments", [opened])
    axes = _axes(pieces, k, len(opened))
    if not axes:
        raise UsageError(f"{home}: a {opened.manifest.recipe['kind']} index has no search parameters to tune")
    asked = _sample(_queries(queries, opened))
    right = _exact_hits(opened, _documents(opened, vectors), asked, k)
    with threads(1):
        measured = _Measured(opened, pieces, asked, right, k)
        point = measured.fastest(axes, recall)
        points = measured.optimal()
    if point.recall < recall:
        raise RetrievalKDError(
            f"{home}: the best recall@{k} is {point.recall:.4f}, with {_shown(point.search)} "
            f"({point.ms:.2f} ms a query); lower --recall, or build an index that keeps more (rerank, a larger code)"
        )
    file = out or home / TUNED
    tuned = Tuned(point.search, point.recall, point.ms, recall, k, len(asked), opened.fingerprint, points, str(file))
    write_atomically(file, json.dumps(asdict(tuned), indent=2).encode())
    log.info("%s: recall@%s %.4f at %.2f ms a query with %s", home, k, point.recall, point.ms, _shown(point.search))
    return tuned


def tuned_search(path: Path) -> dict[str, Any]:
    """The search parameters in the ``tuned.json`` of the index that ``path`` is a generation of.

    Those of another generation are not used, which is said: the result is then empty. Raises `UsageError` when the
    index was never tuned.
    """
    root = published_path(path)
    file = root / TUNED
    if not file.is_file():
        raise UsageError(f"{root}: was never tuned (retrieval-kd tune {root} --queries QV)")
    try:
        tuned = json.loads(file.read_text(encoding="utf-8"))
        fingerprint, search = str(tuned["fingerprint"]), dict(tuned["search"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: damaged ({error}); tune again") from error
    if fingerprint != Manifest.read(path).fingerprint:
        log.warning("%s: is of another generation of the index and not used; tune again", file)
        return {}
    return search


class _Measured:
    """Operating points of one index, measured once each."""

    def __init__(self, index: Index, pieces: list[Any], queries: np.ndarray, right: list[set[int]], k: int) -> None:
        self._index, self._pieces, self._queries, self._right, self._k = index, pieces, queries, right, k
        self._points: dict[tuple[Any, ...], OperatingPoint] = {}

    def fastest(self, axes: Mapping[str, list[Any]], recall: float) -> OperatingPoint:
        """The fastest point that reaches ``recall``; the best there is when none does.

        More of any parameter is taken to cost time and never recall. So each parameter's least value is found with
        the others at their most, and no point is measured that has at least as much of all as one that is enough.
        """
        most = {name: values[-1] for name, values in axes.items()}
        best = self._at(most)
        if best.recall < recall:
            return best
        useful = {}
        for name, values in axes.items():
            least = bisect_left(values, True, key=partial(self._reaches, recall, most, name))
            useful[name] = values[min(least, len(values) - 1) :]
        enough: list[tuple[tuple[int, ...], OperatingPoint]] = []
        for places in sorted(product(*(range(len(values)) for values in useful.values())), key=lambda p: (sum(p), p)):
            if any(all(a <= b for a, b in zip(other, places, strict=True)) for other, _ in enough):
                continue
            point = self._at({name: useful[name][place] for name, place in zip(useful, places, strict=True)})
            if point.recall >= recall:
                enough.append((places, point))
        return min((point for _, point in enough), key=lambda point: point.ms)

    def _reaches(self, recall: float, most: dict[str, Any], name: str, value: Any) -> bool:
        return self._at({**most, name: value}).recall >= recall

    def optimal(self) -> list[OperatingPoint]:
        """The measured points that no other beats in recall and time, by time."""
        operating = import_faiss().OperatingPoints()
        points = list(self._points.values())
        for number, point in enumerate(points):
            operating.add(point.recall, point.ms, "", number)
        kept = operating.optimal_pts
        chosen = [kept.at(place).cno for place in range(kept.size())]
        return sorted((points[number] for number in chosen if number >= 0), key=lambda point: point.ms)

    def _at(self, search: dict[str, Any]) -> OperatingPoint:
        key = tuple(search.values())
        if key not in self._points:
            for piece in self._pieces:
                piece.set_search(search)
            self._index.search(self._queries[:1], self._k)  # what is read or built at the first search
            began = time.perf_counter()
            found = [self._index.search(query[None], self._k)[1][0].tolist() for query in self._queries]
            seconds = time.perf_counter() - began
            wanted = min(self._k, min(map(len, self._right)))
            hits = sum(
                min(wanted, len(right.intersection(rows))) for right, rows in zip(self._right, found, strict=True)
            )
            count = len(self._queries)
            self._points[key] = OperatingPoint(
                search, round(hits / (wanted * count), 6), round(1e3 * seconds / count, 4)
            )
        return self._points[key]


def _axes(pieces: list[Any], k: int, documents: int) -> dict[str, list[Any]]:
    """The values to try of each search parameter, ascending: FAISS's own ranges, and all lists or documents last."""
    if not all(hasattr(piece, "tunable") for piece in pieces):
        return {}
    found: dict[str, list[Any]] = {}
    for piece in pieces:
        for name in piece.tunable:
            values = found.get(name, []) + _values(piece.native, name, k, documents)
            found[name] = sorted(set(values))
    return found


def _values(index: Any, name: str, k: int, documents: int) -> list[Any]:
    if name == "candidates":
        return [min(k * factor, documents) for factor in _CANDIDATE_FACTORS]
    native = structure.PARAMETERS[name]
    values = _faiss_range(index, native) or [1, 2, 4, 8, 16, 32, 64]
    if name == "nprobe":
        values.append(structure.searched_part(index).nlist)
    return [float(value) if name == "k_factor" else int(value) for value in values]


def _faiss_range(index: Any, native: str) -> list[float]:
    """The values that FAISS's own tuning tries for a parameter; none where it tries nothing."""
    faiss = import_faiss()
    space = faiss.ParameterSpace()
    space.initialize(index)
    for place in range(space.parameter_ranges.size()):
        found = space.parameter_ranges.at(place)  # kept while its values are read
        if found.name == native:
            values: list[float] = faiss.vector_to_array(found.values).tolist()
            return values
    return []


def _queries(given: str | Path | Vectors, index: Index) -> np.ndarray:
    """The query vectors, checked to be by the index's model."""
    from retrieval_kd.data.vectors import Vectors

    vectors = given if isinstance(given, Vectors) else Vectors.load(given)
    if vectors.of != "queries":  # each would find itself, and by another prompt than queries have
        raise ArtifactError(f"{vectors.path}: these are vectors of {vectors.of}; encode a split with --queries SPLIT")
    if index.manifest.inputs["model"]["fingerprint"] not in vectors.stands_for:
        raise ArtifactError(f"{vectors.path}: these vectors were made by another model than the index's")
    if not len(vectors):
        raise InputError(f"{vectors.path}: holds no vectors")
    return vectors.matrix


def _sample(queries: np.ndarray) -> np.ndarray:
    if len(queries) <= _MOST_QUERIES:
        return np.array(queries)
    return np.array(queries[np.linspace(0, len(queries) - 1, _MOST_QUERIES).astype(np.int64)])


def _documents(index: Index, given: str | Path | Vectors | None) -> list[Vectors]:
    from retrieval_kd.data.vectors import Vectors

    if given is not None:
        return [given if isinstance(given, Vectors) else Vectors.load(given)]
    return [Vectors.load(index.locate(name)) for name in input_names(index.manifest.inputs, "vectors")]


def _exact_hits(index: Index, parts: list[Vectors], queries: np.ndarray, k: int) -> list[set[int]]:
    """For each query the rows of the index whose inner product is among the best ``k``, ties with the k-th included.

    Of a document that was deleted and added again the last vector counts.
    """
    cosine = index.manifest.details["metric"] == "cosine"
    asked = normalised(queries) if cosine else queries
    best_scores = np.empty((len(asked), 0), dtype=np.float32)
    best_rows = np.empty((len(asked), 0), dtype=np.int64)
    seen = np.zeros(len(index), dtype=bool)
    for vectors in reversed(parts):
        rows_of = _rows_in(index, vectors.ids)
        rows_of = np.where((rows_of >= 0) & ~seen[rows_of], rows_of, -1)
        seen[rows_of[rows_of >= 0]] = True
        for start in range(0, len(rows_of), _BLOCK):
            rows = rows_of[start : start + _BLOCK]
            block = np.asarray(vectors.matrix[start : start + _BLOCK])[rows >= 0]
            rows = rows[rows >= 0]
            scores = asked @ (normalised(block) if cosine else block).T
            best_scores = np.concatenate([best_scores, scores], axis=1)
            best_rows = np.concatenate([best_rows, np.broadcast_to(rows, scores.shape)], axis=1)
            order = np.argsort(-best_scores, axis=1, kind="stable")[:, : k + _NEAR]
            best_scores = np.take_along_axis(best_scores, order, axis=1)
            best_rows = np.take_along_axis(best_rows, order, axis=1)
    live = len(index) if index.live is None else int(index.live.sum())
    found = int(np.count_nonzero(seen))
    if found != live:
        raise ArtifactError(
            f"{published_path(index.path)}: {live} documents, the vectors of {found} are in "
            f"{', '.join(str(vectors.path) for vectors in parts)}; give the vectors it was built from"
        )
    last = best_scores[:, min(k, best_scores.shape[1]) - 1]
    near = best_scores >= (last - 1e-6 * np.abs(last))[:, None]
    return [set(rows[tied].tolist()) for rows, tied in zip(best_rows, near, strict=True)]


def _rows_in(index: Index, ids: list[str]) -> np.ndarray:
    """The live row [n] of the index for each id, -1 for none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    live = np.arange(len(index)) if index.live is None else np.flatnonzero(index.live)
    known = index.ids if index.live is None else index.ids.take(pa.array(live))
    places = pc.index_in(pa.array(ids, pa.string()), value_set=known).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where(places < 0, -1, live[places])


def _shown(search: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in search.items())
