"""Searching a FAISS index: queries one at a time and in a batch, `Index.search` against FAISS called on the same file.

Both take the same k, parameters and query vectors, in one thread and in interleaved rounds. `searcher` is what
`Searcher` does after encoding: the search, and ids of the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from faiss_build import _make_vectors

FACTORIES = {"Flat": {}, "IVF1024,PQ32": {"nprobe": 16}, "HNSW32": {"ef_search": 64}}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--factory", action="append", help=f"default: {', '.join(FACTORIES)}")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, help="a folder for vectors and indexes, kept (default: a temporary one)")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        arguments.work.mkdir(parents=True, exist_ok=True)
        if not (arguments.work / "vectors").exists():
            _make_vectors(arguments)
        found = {name: _compare(name, arguments) for name in arguments.factory or FACTORIES}
        print(
            json.dumps({"n": arguments.n, "k": arguments.k, "queries": arguments.queries, "indexes": found}, indent=2)
        )


def _compare(factory: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import faiss

    from retrieval_kd.indexes.build import build_index
    from retrieval_kd.search.searcher import Searcher

    recipe = arguments.work / "search-recipe.yaml"
    search = FACTORIES.get(factory, {})
    recipe.write_text(json.dumps({"kind": "faiss", "factory": factory, "threads": 2, "search": search}))
    vectors = arguments.work / "vectors"
    index = build_index(recipe, vectors=vectors, out=arguments.work / f"index-{factory.replace(',', '-')}")
    faiss.omp_set_num_threads(1)
    direct = faiss.read_index(str(index.path / "index.faiss"))
    names = {"nprobe": "nprobe", "ef_search": "efSearch"}
    for name, value in search.items():
        faiss.ParameterSpace().set_index_parameter(direct, names[name], value)
    matrix = np.load(vectors / "vectors.npy", mmap_mode="r")
    rng = np.random.default_rng(7)
    chosen = np.sort(rng.choice(len(matrix), arguments.queries, replace=False))
    noise = rng.standard_normal((arguments.queries, matrix.shape[1])).astype(np.float32)
    queries = (matrix[chosen] + 0.02 * noise).astype(np.float32)
    k = arguments.k
    searcher = Searcher(index, _Given(queries), None)  # type: ignore[arg-type]
    texts = [str(place) for place in range(len(queries))]
    ways: dict[str, tuple[Callable[[int], object], Callable[[], object]]] = {
        "faiss": (lambda i: direct.search(queries[i : i + 1], k), lambda: direct.search(queries, k)),
        "ours": (lambda i: index.search(queries[i : i + 1], k), lambda: index.search(queries, k)),
        "searcher": (lambda i: searcher.search_many(texts[i : i + 1], k), lambda: searcher.search_many(texts, k)),
    }
    single: dict[str, np.ndarray] = {name: np.full(len(queries), np.inf) for name in ways}
    rounds: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    batches: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(arguments.rounds + 1):  # the first is for warming up
        times = {name: np.empty(len(queries)) for name in ways}
        for i in range(len(queries)):
            order = list(ways) if (i + round_) % 2 else list(ways)[::-1]
            for name in order:
                times[name][i] = _timed(lambda name=name, i=i: ways[name][0](i))
        for name, (_, whole) in ways.items():
            seconds = _timed(whole)
            if round_:
                rounds[name].append(times[name])
                batches[name].append(seconds)
                single[name] = np.minimum(single[name], times[name])
    result: dict[str, Any] = {"search": search}
    for name in ways:
        everything = np.concatenate(rounds[name])
        result[name] = {
            "p50_ms": round(1e3 * float(np.percentile(everything, 50)), 4),
            "p99_ms": round(1e3 * float(np.percentile(everything, 99)), 4),
            "best_of_rounds_p50_ms": round(1e3 * float(np.percentile(single[name], 50)), 4),
            "batch_queries_per_second": round(len(queries) / statistics.median(batches[name]), 1),
        }
    for name in ("ours", "searcher"):
        result[f"{name}_to_faiss"] = {
            "p50": round(result[name]["p50_ms"] / result["faiss"]["p50_ms"], 3),
            "p99": round(result[name]["p99_ms"] / result["faiss"]["p99_ms"], 3),
            "batch": round(statistics.median(batches[name]) / statistics.median(batches["faiss"]), 3),
        }
    return result


class _Given:
    """An encoder that has encoded its queries already: a text is the number of one, and texts are consecutive."""

    def __init__(self, queries: np.ndarray) -> None:
        self._queries = queries
        self._none_cut = np.zeros(len(queries), dtype=np.int32)

    def encode(self, texts: list[str], of: str) -> Any:
        from retrieval_kd.models.vectors_of_texts import Encoded

        return Encoded(self._queries[int(texts[0]) : int(texts[-1]) + 1], self._none_cut[: len(texts)])


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
