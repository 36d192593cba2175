"""Distill-VQ against FAISS's own PQ, OPQ, IVF, RQ, RaBitQ and SQ: nDCG@10 and overlap@10 with exact search, by bytes.

Bytes are those of a document's code; what is stored once (codebooks, centroids, rotation) is in ``fixed_bytes``, and an
id of 8 bytes goes with each document of an IVF index. Test queries take part in nothing but the last search.
``--sweep`` trains with other settings and reports queries held out of the training split, no test query.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from retrieval_kd import encode, make_collection
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.measures import evaluate_run

RECIPES = Path(__file__).resolve().parents[1] / "indexes"
NPROBES = (1, 4, 16, 64)
SWEEP: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"temperature": value} for value in (0.02, 0.05, 0.1, 0.2, 1.0)],
    "learning rate": [{"learning_rate": value} for value in (1e-4, 3e-4, 1e-3, 3e-3)],
    "reconstruction": [{"reconstruction": value} for value in (0.0, 3.0, 10.0, 30.0)],
    "sampling": [
        {"documents": 5},
        {"documents": 15, "top": 200},
        {"documents": 50, "top": 50},
        {"documents": 50, "top": 200},
    ],
    "queries from documents": [{"pseudo_share": 0.0}, {"pseudo_share": 0.8}, {"own_document": True}],
    "selection": [{"selection": "straight-through"}, {"selection": "fixed"}],
    "rotation": [{"rotation_learning_rate": value} for value in (1e-6, 1e-5, 1e-4)],
    "map of queries": [{"query_learning_rate": value} for value in (0.0, 1e-4, 1e-3, 3e-3, 1e-2)],
    "loss": [{"loss": value} for value in ("kl", "reverse-kl", "margin-mse", "ranknet", "mse")],
}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", nargs="+", default=["pydocs", "scifact", "nfcorpus"])
    parser.add_argument("--bytes", nargs="+", type=int, default=[8, 16, 32, 48])
    parser.add_argument("--rq-bytes", nargs="+", type=int, default=[8, 16], help="sizes at which FAISS trains RQ")
    parser.add_argument("--methods", default="", help="only methods whose name begins so")
    parser.add_argument("--lists", type=int, default=64)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--work", type=Path, help="folder that keeps collections and vectors")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="+", type=Path, help="earlier outputs to join and draw, instead of measuring")
    parser.add_argument("--picture", type=Path, help="a PNG: bytes against nDCG@10")
    parser.add_argument("--sweep", nargs="+", metavar="FACTORY", help="settings of these factories instead")
    parser.add_argument("--groups", nargs="+", default=list(SWEEP), help="what --sweep varies")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = [row for path in arguments.rows or () for row in json.loads(path.read_text())["rows"]]
    with TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        for name in () if rows else arguments.dataset:
            data = _Data(name, work / name, arguments.model)
            for row in _swept(data, arguments) if arguments.sweep else _compared(data, arguments):
                rows.append({"dataset": name, **row})
                _write(rows, arguments)  # what was measured stays when the rest is not waited for
    _write(rows, arguments)
    print(json.dumps({"model": arguments.model, "rows": rows}, indent=1))
    if arguments.picture:
        _draw(rows, arguments.picture)


def _write(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.out:
        arguments.out.write_text(json.dumps({"model": arguments.model, "rows": rows}, indent=1) + "\n")


class _Data:
    """A collection, its vectors and its test queries; encoded once into ``folder``."""

    def __init__(self, name: str, folder: Path, model: str) -> None:
        source = name if name == "pydocs" else str(Path(os.environ.get("BEIR_DIR", "")) / name)
        there = (folder / "collection").exists()
        collection = Collection.load(folder / "collection") if there else make_collection(source, folder / "collection")
        self.vectors = {}
        for part, split in (("documents", None), ("train", "train"), ("test", "test")):
            path = folder / part
            self.vectors[part] = Vectors.load(path) if path.exists() else encode(model, collection, path, queries=split)
        self.documents, self.test = self.vectors["documents"], self.vectors["test"]
        self.qrels = collection.qrels("test")
        self.indexes = folder / "indexes"
        self.exact = np.argsort(-(self.test.matrix @ self.documents.matrix.T), axis=1, kind="stable")[:, :10]

    def build(self, factory: str, *, learns: bool, training: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The index and what it cost; one that learns is built by the shipped recipe of its kind of codes."""
        self.indexes.mkdir(parents=True, exist_ok=True)
        recipe: dict[str, Any] = {"kind": "faiss", "factory": factory}
        if learns:
            shipped = RECIPES / ("distill-vq-rq.yaml" if "RQ" in factory else "distill-vq.yaml")
            recipe = {"extends": str(shipped), "factory": factory, "training": training}
        lists = "IVF" in factory
        if lists:
            recipe["search"] = {"nprobe": 16}
        path = self.indexes / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        given: dict[str, Any] = {"vectors": self.documents, "queries": self.vectors["train"] if learns else None}
        cost = estimate_index(path, **given)
        began, processor = time.perf_counter(), time.process_time()
        index = build_index(path, **given, out=self.indexes / "index", force=True)
        return index, {
            "bytes": cost["bytes_per_document"] - (8 if lists else 0),
            "fixed_bytes": round(cost["bytes"] - cost["bytes_per_document"] * len(self.documents)),
            "seconds": round(time.perf_counter() - began, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        }

    def measured(self, index: Any) -> dict[str, float]:
        """nDCG@10 and overlap@10 of the test queries."""
        scores, rows = index.search(self.test.matrix, 10)
        found = [of_query[of_query >= 0] for of_query in rows]
        hits = [values[: len(of_query)] for of_query, values in zip(found, scores, strict=True)]
        run = Run.from_hits(self.test.ids, [index.ids_of(of_query) for of_query in found], hits)
        shared = [len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, self.exact, strict=True)]
        values = evaluate_run(run, self.qrels, ["nDCG@10"])["nDCG@10"]
        return {
            "ndcg@10": round(float(np.mean(list(values.values()))), 4),
            "overlap@10": round(float(np.mean(shared)), 4),
        }


def _compared(data: _Data, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for method, factory, learns in _methods(arguments):
        if not method.startswith(arguments.methods):
            continue
        epochs = {} if arguments.epochs is None else {"epochs": arguments.epochs}
        index, cost = data.build(factory, learns=learns, training=epochs)
        if learns:
            details = index.manifest.details
            cost["shipped_epoch"] = details["shipped_epoch"]
            cost["shipped_lists"] = details["shipped_lists"]
        for nprobe in NPROBES if "IVF" in factory else (None,):
            if nprobe is not None:
                index.set_search({"nprobe": nprobe})
            yield {"method": method, "factory": factory, "nprobe": nprobe, **cost, **data.measured(index)}


def _methods(arguments: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    yield "exact", "Flat", False
    yield "SQ8", "SQ8", False
    yield "SQ4", "SQ4", False
    yield "RaBitQ", "RaBitQ", False
    for size in arguments.bytes:
        lists = f"IVF{arguments.lists}"
        yield "PQ", f"PQ{size}x8", False
        yield "OPQ+PQ", f"OPQ{size},PQ{size}x8", False
        yield "Distill-VQ (OPQ+PQ)", f"OPQ{size},PQ{size}x8", True
        yield "OPQ+IVF+PQ", f"OPQ{size},{lists},PQ{size}x8", False
        yield "Distill-VQ (OPQ+IVF+PQ)", f"OPQ{size},{lists},PQ{size}x8", True
        if size in arguments.rq_bytes:
            yield "RQ", f"RQ{size}x8", False
        yield "Distill-VQ (RQ)", f"RQ{size}x8", True


def _swept(data: _Data, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for factory in arguments.sweep:
        settings = [("default", {}), *((group, keys) for group in arguments.groups for keys in SWEEP[group])]
        for group, keys in settings:
            if "rotation_learning_rate" in keys and "OPQ" not in factory:
                continue
            epochs = {} if arguments.epochs is None else {"epochs": arguments.epochs}
            index, cost = data.build(factory, learns=True, training={**epochs, **keys})
            details = index.manifest.details
            held_out = {name: round(details[name], 4) for name in ("overlap_before", "overlap_after")}
            yield {"factory": factory, "group": group, "changed": keys, **held_out, **cost}


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bytes against nDCG@10, one panel a collection; IVF at all its lists."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        shown = [row for row in rows if row["dataset"] == name and row["nprobe"] in (None, max(NPROBES))]
        for method in dict.fromkeys(row["method"] for row in shown):
            line = sorted((row["bytes"], row["ndcg@10"]) for row in shown if row["method"] == method)
            if method == "exact":
                panel.axhline(line[0][1], color="black", linewidth=0.8, label="exact, 1,536 bytes")
                continue
            style = "o-" if method.startswith("Distill") else "x--"
            panel.plot(*zip(*line, strict=True), style if len(line) > 1 else "s", label=method)
        sizes = sorted({int(row["bytes"]) for row in shown if row["method"] != "exact"})
        panel.set(title=name, xscale="log", xlabel="bytes a document", ylabel="nDCG@10")
        panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        panel.minorticks_off()
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
