"""ONNX and int8 against torch on the CPU: queries a second one at a time, documents a second, and nDCG@10.

The same encoder interface three times: torch as `encode` and `search` use it (oneDNN, batches of similar length), the
float32 export and the int8 export, in interleaved rounds. nDCG@10 is that of the parity gate: an exact search.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from retrieval_kd import export_model, make_collection
from retrieval_kd.models.encoders import open_encoder


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--dataset", default="scifact")
    parser.add_argument("--search-in", type=int, default=1000, help="documents the parity gate searches in")
    parser.add_argument("--documents", type=int, default=64, help="documents a round")
    parser.add_argument("--queries", type=int, default=32, help="queries a round, one at a time")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        print(json.dumps(_compare(arguments, Path(folder)), indent=2))


def _compare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    collection = make_collection(str(Path(os.environ["BEIR_DIR"]) / arguments.dataset), work / "collection")
    gate = {"collection": collection, "split": "test", "documents": arguments.search_in}
    models: dict[str, Any] = {"torch": arguments.model}
    parity = {}
    for name in ("onnx", "onnx-int8"):
        exported = export_model(arguments.model, format=name, out=work / name, **gate)
        models[name] = exported.path
        parity[name] = exported.manifest.details["parity"]
    encoders = {name: open_encoder(path) for name, path in models.items()}
    documents = list(collection.documents.iter_texts(0, arguments.documents))
    queries = list(collection.queries("test").values())[: arguments.queries]
    seconds: dict[str, dict[str, list[float]]] = {name: {"documents": [], "queries": []} for name in encoders}
    for round_ in range(arguments.rounds + 1):  # the first is for warming up
        for name, encoder in encoders.items():
            whole = _timed(lambda encoder=encoder: encoder.encode(documents, "document"))
            single = _timed(lambda encoder=encoder: [encoder.encode([query], "query") for query in queries])
            if round_:
                seconds[name]["documents"].append(whole)
                seconds[name]["queries"].append(single)
    speed = {
        name: {
            "documents_per_second": round(len(documents) / statistics.median(of_one["documents"]), 1),
            "queries_per_second": round(len(queries) / statistics.median(of_one["queries"]), 1),
        }
        for name, of_one in seconds.items()
    }
    return {"model": arguments.model, "dataset": arguments.dataset, "speed": speed, "parity": parity}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
