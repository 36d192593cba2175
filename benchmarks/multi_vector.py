"""Late interaction by retrieved tokens (gather, XTR) against exact MaxSim: recall, nDCG@10, bytes, milliseconds.

The vectors are those of `retrieval-kd encode`, of documents and of a split's queries. Every index answers the same
queries one at a time, with one thread, in turns. recall@10 is the share of the exact index's ten hits.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import yaml

from retrieval_kd import Index, Vectors, build_index
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.measures import evaluate_run

MEASURE = "nDCG@10"
EXACT = "exact"
INDEXES: dict[str, dict[str, Any]] = {
    EXACT: {"kind": "maxsim-exact"},
    "gather float16": {"factory": "IVF1024,PQ32x4fs"},
    "gather int8": {"factory": "IVF1024,PQ32x4fs", "store": "int8"},
    "gather codes": {"factory": "IVF1024,SQ8", "store": "codes"},
    "xtr": {"factory": "IVF1024,SQ8", "scoring": "xtr"},
}
SEARCHES: dict[str, list[dict[str, Any]]] = {
    EXACT: [{}],
    "gather float16": [
        {"nprobe": 4, "token_candidates": 256},
        {"nprobe": 8, "token_candidates": 512},
        {"nprobe": 16, "token_candidates": 1024},
        {"nprobe": 16, "token_candidates": 1024, "candidates": 512},
    ],
    "gather int8": [{"nprobe": 16, "token_candidates": 1024}],
    "gather codes": [{"nprobe": 16, "token_candidates": 1024}],
    "xtr": [{"nprobe": 32, "token_candidates": 1024}, {"nprobe": 128, "token_candidates": 8192}],
}


def main() -> None:
    """Prints one JSON object, after the indexes are in ``--work``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", required=True, help="token vectors of the documents")
    parser.add_argument("--queries", required=True, help="token vectors of a split's queries")
    parser.add_argument("--collection", required=True, help="for the qrels of that split")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--timed", type=int, default=50, help="queries that are timed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    queries = Vectors.load(arguments.queries)
    collection = Collection.load(arguments.collection)
    faiss.omp_set_num_threads(1)
    indexes = {name: _built(name, arguments) for name in INDEXES}
    asked = {f"{name} {json.dumps(search)}": (name, search) for name in SEARCHES for search in SEARCHES[name]}
    opened = {label: Index.load(indexes[name].path.parent, search=search) for label, (name, search) in asked.items()}
    every = queries.rows(0, len(queries))
    exact = next(index for label, index in opened.items() if asked[label][0] == EXACT)
    reference = exact.search(every, 10)[1]
    milliseconds = _latencies(opened, every[: arguments.timed])
    qrels = collection.qrels(str(queries.split))
    table = {}
    for label, index in opened.items():
        details = indexes[asked[label][0]].manifest.details
        scores, rows = index.search(every, 10)
        table[label] = {
            "recall@10": round(float(np.mean([np.isin(a, b).mean() for a, b in zip(reference, rows, strict=True)])), 4),
            MEASURE: round(_ndcg(index, queries.ids, scores, rows, qrels), 4),
            "bytes_per_document": round(details["bytes"] / len(index)),
            "milliseconds": round(float(np.median(milliseconds[label])), 1),
            "build_seconds": details["build_seconds"],
        }
    print(json.dumps({"documents": len(exact), "queries": len(queries), "recipes": INDEXES, "table": table}, indent=2))


def _built(name: str, arguments: argparse.Namespace) -> Index:
    recipe = arguments.work / f"{name.replace(' ', '-')}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump({"kind": "late-interaction", **INDEXES[name]}))
    return build_index(recipe, vectors=arguments.vectors, out=recipe.with_suffix(""))


def _latencies(indexes: Mapping[str, Index], queries: list[np.ndarray]) -> dict[str, list[float]]:
    """The milliseconds of every index's single queries; the indexes take turns."""
    found: dict[str, list[float]] = {label: [] for label in indexes}
    for query in queries:
        for label, index in indexes.items():
            began = time.perf_counter()
            index.search([query], 10)
            found[label].append(1000 * (time.perf_counter() - began))
    return found


def _ndcg(index: Index, ids: list[str], scores: np.ndarray, rows: np.ndarray, qrels: Any) -> float:
    hits = [index.ids_of(of_one[of_one >= 0]) for of_one in rows]
    run = Run.from_hits(ids, hits, [values[of_one >= 0] for values, of_one in zip(scores, rows, strict=True)])
    return float(np.mean(list(evaluate_run(run, qrels, [MEASURE])[MEASURE].values())))


if __name__ == "__main__":
    main()
