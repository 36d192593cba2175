"""nDCG@10 of a shallow student before and after it was adapted to a collection without any of its labels.

    python benchmarks/domain_adaptation.py [--beir $BEIR_DIR/cranfield] [--queries queries/ict …] [--out FILE.json]

Runs `pipelines/domain-adaptation` once for each recipe of queries: the built-in model teaches two of its own six layers
through BM25's candidates of synthetic queries. The collection's queries and judgements are for the evaluation alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from retrieval_kd import Collection, Model, Report, run_pipeline
from retrieval_kd.eval.efficiency import machine
from retrieval_kd.software import software_versions

PIPELINE = "pipelines/domain-adaptation"


def measured(corpus: Path, queries: str, steps: int | None, out: Path) -> dict[str, Any]:
    """Counts, training seconds and the mean nDCG@10 of each system with its interval."""
    variables = {"corpus": corpus, "queries": queries, "steps": steps}
    overrides = [f"variables.{name}={value}" for name, value in variables.items() if value is not None]
    began = time.perf_counter()
    paths = run_pipeline(PIPELINE, out, overrides)
    report = Report.load(paths["report"])
    collection, adapted = Collection.load(paths["collection"]), Model.load(paths["adapted"])
    return {
        "queries": queries,
        "synthetic_queries": collection.manifest.counts["synthetic_queries"],
        "training_queries": adapted.manifest.counts["queries"],
        "steps": adapted.manifest.counts["steps"],
        "training_seconds": adapted.manifest.details["training_seconds"],
        "seconds": round(time.perf_counter() - began, 1),
        "nDCG@10": {system["name"]: round(system["means"]["nDCG@10"], 4) for system in report.metrics["systems"]},
        "comparisons": report.sentences,
    }


def main() -> None:
    """Prints one JSON object; ``--out`` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beir", type=Path, default=Path(os.environ.get("BEIR_DIR", ".")) / "cranfield")
    parser.add_argument("--queries", nargs="+", default=["queries/titles", "queries/ict"])
    parser.add_argument("--steps", type=int, help="other than the student's recipe says")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measured(arguments.beir, queries, arguments.steps, Path(folder) / str(i))
            for i, queries in enumerate(arguments.queries)
        ]
    result = {
        "collection": arguments.beir.name,
        "threads": arguments.threads,
        "rows": rows,
        "machine": machine(),
        "software": software_versions(),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
