"""Engines of learned sparse vectors against exact search: queries a second, recall@10, bytes a document, build seconds.

The exact inverted file; Seismic at several points of its search and with a smaller build; Lucene through pyserini's jar
at two scales. Beside them, on the same files, Seismic and Anserini's searcher called directly, without filters, exact
scores and the order of ties. One thread; queries one at a time, in interleaved rounds, medians. The time of the
processor is stated too: on a machine that does other work it is the fairer one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from retrieval_kd import build_index
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.java import java_class

BUILDS: dict[str, tuple[str, list[str], list[dict[str, Any]]]] = {
    "sparse-exact": ("sparse-exact", [], [{}]),
    "seismic": (
        "seismic",
        [],
        [{"query_cut": cut, "heap_factor": factor} for cut, factor in ((5, 1.0), (10, 0.8), (20, 0.7), (100, 0.5))],
    ),
    "seismic, smaller": ("seismic", ["n_postings=200", "summary_energy=0.2"], [{}]),
    "lucene-impact, scale 10": ("lucene-impact", ["scale=10"], [{}]),
    "lucene-impact, scale 100": ("lucene-impact", ["scale=100"], [{}]),
}
"""Name → kind, overrides of its recipe, and points of the search."""


@dataclass
class Contestant:
    """What answers one query with rows, and how it did."""

    find: Callable[[int], np.ndarray]
    facts: dict[str, Any]
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", required=True, help="sparse vectors of documents")
    parser.add_argument("--queries", required=True, help="sparse vectors of queries, by the same model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--k", type=int, default=10)
    arguments = parser.parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # Seismic's
    with TemporaryDirectory() as folder:
        print(json.dumps(_compare(arguments, Path(folder)), indent=2))


def _compare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    vectors, asked = Vectors.load(arguments.vectors), Vectors.load(arguments.queries)
    queries = [asked.rows(place, place + 1) for place in range(len(asked))]
    contestants = {}
    for name, (kind, overrides, points) in BUILDS.items():
        built = build_index(kind, vectors=vectors, out=work / name, overrides=overrides)
        facts = {
            "bytes_per_document": round(built.manifest.details["bytes"] / len(built), 1),
            "build_seconds": built.manifest.details["build_seconds"],
        }
        for point in points:
            index = Index.load(work / name, search=point)
            label = ", ".join([name, *(f"{key} {value}" for key, value in point.items())])
            contestants[label] = Contestant(_ours(index, queries, arguments.k), facts)
            if kind == "seismic":
                contestants[f"{label}, called directly"] = Contestant(_seismic(index, queries, arguments.k), facts)
        if kind == "lucene-impact":
            direct = _anserini(built, queries, arguments.k)
            contestants[f"{name}, Anserini's searcher, whole query weights"] = Contestant(direct, facts)
    exact = [contestants["sparse-exact"].find(place) for place in range(len(queries))]
    for round_ in range(arguments.rounds + 1):  # the first is for warming up
        for contestant in contestants.values():
            began, processor = time.perf_counter(), time.thread_time()
            for place in range(len(queries)):
                contestant.find(place)
            if round_:
                contestant.wall.append(time.perf_counter() - began)
                contestant.processor.append(time.thread_time() - processor)
    return {
        "documents": len(vectors),
        "queries": len(queries),
        "terms_per_document": round(float(vectors.lengths.mean()), 1),
        "terms_per_query": round(float(asked.lengths.mean()), 1),
        "engines": {name: _figures(contestant, exact) for name, contestant in contestants.items()},
    }


def _ours(index: Index, queries: list[Any], k: int) -> Callable[[int], np.ndarray]:
    return lambda place: index.search(queries[place], k)[1][0]


def _seismic(index: Any, queries: list[Any], k: int) -> Callable[[int], np.ndarray]:
    """Seismic's own search of an index's file with the parameters in force."""
    from retrieval_kd.indexes.seismic import NATIVE, SeismicIndex

    assert isinstance(index, SeismicIndex)
    import seismic

    engine = seismic.SeismicIndexRaw.load(str(index.path / NATIVE))
    parameters = index.search_values

    def find(place: int) -> np.ndarray:
        query = queries[place]
        known = query.indices < engine.dim
        terms, weights = query.indices[known].astype(np.int32), query.data[known]
        cut, factor = parameters["query_cut"], parameters["heap_factor"]
        return np.array([row for _, row in engine.search(terms, weights, k, cut, factor, 0, True)], dtype=np.int64)

    return find


def _anserini(index: Index, queries: list[Any], k: int) -> Callable[[int], np.ndarray]:
    """The searcher that pyserini wraps, over an index's files."""
    searcher = java_class("io.anserini.search.SimpleImpactSearcher")(str((index.path / "lucene").resolve()))
    places = {doc_id: row for row, doc_id in enumerate(index.ids.to_pylist())}
    whole = java_class("java.lang.Integer")

    def find(place: int) -> np.ndarray:
        weights = java_class("java.util.HashMap")()
        for term, weight in zip(queries[place].indices.tolist(), queries[place].data.tolist(), strict=True):
            weights.put(str(term), whole(round(weight * 100)))
        return np.array([places[hit.docid] for hit in searcher.search(weights, k)], dtype=np.int64)

    return find


def _figures(contestant: Contestant, exact: list[np.ndarray]) -> dict[str, Any]:
    shares = []
    for place, best in enumerate(exact):
        wanted = set(best[best >= 0].tolist())
        if wanted:
            shares.append(len(wanted & set(contestant.find(place).tolist())) / len(wanted))
    return {
        "recall": round(statistics.mean(shares), 4),
        "queries_per_second": round(len(exact) / statistics.median(contestant.wall), 1),
        "processor_ms_per_query": round(1000 * statistics.median(contestant.processor) / len(exact), 3),
        **contestant.facts,
    }


if __name__ == "__main__":
    main()
