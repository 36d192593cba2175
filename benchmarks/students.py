"""What every kind of student keeps of its teacher: before and after distillation, and on labels alone.

For each dataset: candidates of BM25 and of the built-in bi-encoder; a teacher that is the normalised mean of both
(`scores ensemble`); for each kind of student the start, the distilled student and one trained on labels alone for the
same number of steps. All start from the same layers of the built-in model. Test queries are used for measuring only.
Everything that exists in ``--work`` is kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from retrieval_kd import (
    build_index,
    encode,
    ensemble_scores,
    evaluate,
    make_collection,
    score,
    search_run,
    train,
)
from retrieval_kd.eval.significance import resampled_means

COMMON = ["base=builtin", "layers=[0,5]", "query_length=32", "batch_size=16", "precision=bf16"]
COMMON += ["groups={documents: 4, positive: qrels, negatives: random}", "development={against: nothing}"]
HOW = ("start", "distilled", "labels")
SPARSE = ["learning_rate=5e-4", "texts_at_once=8"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "dense": ("indexes/flat", ["learning_rate=3e-4"]),
    "splade": ("indexes/sparse-exact", [*SPARSE, "recompute=true"]),
    "splade-doc": ("indexes/sparse-exact", SPARSE),
    "late-interaction": ("indexes/maxsim-exact", ["learning_rate=3e-4"]),
}
"""Kind → the index that searches it exactly, and what its recipe needs for so short a training."""
TEMPERATURES = {"splade": 10, "splade-doc": 5}
"""Of kinds whose first scores are far above 1: without, the quickest way to a smaller loss is to forget all terms."""


def main() -> None:
    """Prints one JSON object; ``--work`` keeps models and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=["scifact", "nfcorpus"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--document-length", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-students"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    found = {name: _dataset(name, arguments) for name in arguments.datasets}
    budget = {"steps": arguments.steps, "document_length": arguments.document_length, "common": COMMON}
    print(json.dumps({**budget, "datasets": found}, indent=2))


def _dataset(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    work = arguments.work / name
    collection = make_collection(str(Path(os.environ["BEIR_DIR"]) / name), work / "collection")
    teacher = {split: _teacher(work, collection, split) for split in ("train", "test")}
    runs: dict[str, Any] = {
        "BM25": work / "bm25-test",
        "bi-encoder": work / "bi-encoder-test",
        "teacher-re-ranking": teacher["test"],
    }
    rows: dict[str, dict[str, Any]] = {}
    for kind in arguments.kinds:
        for how in HOW:
            run, facts = _student(kind, how, work, collection, teacher["train"], arguments)
            runs[f"{kind}-{how}"] = run
            rows[f"{kind}-{how}"] = facts
    overrides = ["measures=[nDCG@10, R@100]"]
    report = evaluate(
        "eval/default", collection=collection, split="test", runs=runs, out=work / "report", overrides=overrides
    )
    for system, measures in _with_intervals(report).items():
        rows.setdefault(system, {}).update(measures)
    return rows


def _with_intervals(report: Any) -> dict[str, dict[str, str]]:
    """System → measure → mean and 95 % bootstrap interval over queries."""
    import pandas as pd

    values = pd.read_parquet(report.path / "per_query.parquet")
    found: dict[str, dict[str, str]] = {}
    for (system, measure), of_one in values.groupby(["system", "measure"], sort=False):
        means = resampled_means(of_one["value"].to_numpy()[None], 10_000, 0)[:, 0]
        low, high = np.percentile(means, [2.5, 97.5])
        found.setdefault(system, {})[measure] = f"{of_one['value'].mean():.4f} [{low:.3f}, {high:.3f}]"
    return found


def _teacher(work: Path, collection: Any, split: str) -> Path:
    """Scores of the candidates of BM25 and of the built-in bi-encoder: the mean of both teachers, normalised."""
    build_index("indexes/bm25", collection=collection, out=work / "bm25")
    documents = encode("builtin", collection, work / "teacher-documents")
    queries = encode("builtin", collection, work / f"teacher-{split}-queries", queries=split)
    build_index("indexes/flat", vectors=documents, out=work / "bi-encoder")
    depth = 100 if split == "test" else 30
    search_run(work / "bm25", collection, split, work / f"bm25-{split}", k=depth)
    search_run(work / "bi-encoder", collection, split, work / f"bi-encoder-{split}", k=depth, vectors=queries.path)
    vectors = [documents.path, queries.path]
    candidates: list[str | Path] = [work / f"bm25-{split}", work / f"bi-encoder-{split}"]
    if split == "train":
        candidates.append(f"qrels:{split}")
    inputs = {"collection": collection, "candidates": candidates}
    members = [
        score("teachers/bi-encoder", **inputs, vectors=vectors, out=work / f"dense-{split}").path,
        score("teachers/bm25", **inputs, out=work / f"lexical-{split}").path,
    ]
    overrides = ["scale=20.0"]
    return ensemble_scores(
        "teachers/ensemble-heterogeneous", members, out=work / f"teacher-{split}", overrides=overrides
    ).path


def _student(
    kind: str, how: str, work: Path, collection: Any, teacher: Path, budget: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """The test run of a student that is trained, encoded and searched exactly; and what it costs."""
    home = work / f"{kind}-{how}"
    index, overrides = KINDS[kind]
    steps = 0 if how == "start" else budget.steps
    overrides = [*COMMON, *overrides, _losses(kind, how), f"steps={steps}", f"document_length={budget.document_length}"]
    inputs: dict[str, Any] = {"candidates": work / "bm25-train"} if how == "labels" else {"scores": [teacher]}
    model = train(f"students/{kind}", collection=collection, **inputs, out=home / "model", overrides=overrides)
    vectors = encode(model.path, collection, home / "vectors")
    build_index(index, vectors=vectors, out=home / "index")
    search_run(home / "index", collection, "test", home / "run", k=100)
    facts = {"training_seconds": model.manifest.details.get("training_seconds"), **_costs(home, vectors, collection)}
    return home / "run", facts


def _losses(kind: str, how: str) -> str:
    """Labels by InfoNCE over the batch, the teacher by KL over the group."""
    if how == "start":
        return "losses=[{kind: kl}]"  # unused: no step is taken
    tau = TEMPERATURES.get(kind)
    labels = f"{{kind: info-nce{f', temperature: {tau}' if tau else ''}}}"
    # kl is multiplied by the square of the temperature: the weight takes that away again
    teacher = f"{{kind: kl{f', student_temperature: {tau}, weight: {1 / tau**2:g}' if tau else ''}}}"
    return f"losses=[{labels}, {teacher}]" if how == "distilled" else f"losses=[{labels}]"


def _costs(home: Path, vectors: Any, collection: Any) -> dict[str, Any]:
    """Bytes a document; for sparse vectors nonzeros and FLOPS (multiply-adds of a query and a document)."""
    documents = len(collection.documents)
    size = sum(file.stat().st_size for file in vectors.path.glob("*.npy"))
    facts: dict[str, Any] = {"bytes_per_document": round(size / documents)}
    if vectors.layout == "sparse":
        from retrieval_kd.models.sparse_statistics import sparse_cost

        queries = encode(home / "model", collection, home / "query-vectors", queries="test")
        of_queries, of_documents = (
            SimpleNamespace(lengths=v.lengths, terms=v.sparse.terms) for v in (queries, vectors)
        )
        cost = sparse_cost(of_queries, of_documents)
        facts["nonzeros_per_document"] = round(cost.document_terms, 1)
        facts["nonzeros_per_query"] = round(cost.query_terms, 1)
        facts["flops"] = round(cost.flops, 3)
    if vectors.layout == "multi-vector":
        facts["vectors_per_document"] = round(float(vectors.lengths.mean()), 1)
    return facts


if __name__ == "__main__":
    main()
