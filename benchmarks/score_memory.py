"""Resident memory and the driver's own time while a trivial teacher scores 10,000 and 5,000,000 pairs.

    python benchmarks/score_memory.py [--pairs 5000000] [--out FILE.json]

Each size runs in a process of its own over the same collection (20,000 documents, 50,000 queries); the largest resident
size that the system saw is compared. The teacher's score is a constant: what is left is the driver's time, of which
writing the shards is told apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retrieval_kd import registry
from retrieval_kd.artifact import InputRef
from retrieval_kd.data.run import Run
from retrieval_kd.data.sources import make_collection
from retrieval_kd.teachers import shards
from retrieval_kd.teachers.base import Scored, Teacher, TeacherRecipe
from retrieval_kd.teachers.score import score

DOCUMENTS, QUERIES, DEPTH = 20_000, 50_000, 100


class TrivialTeacher(Teacher):
    class Recipe(TeacherRecipe):
        kind: Literal["trivial"]

    score_kind = "logit"  # type: ignore[assignment]

    def ref(self) -> InputRef:
        return InputRef("0" * 64, name="trivial")

    def details(self) -> dict[str, Any]:
        return {"model": "trivial"}

    def score(self, shard: Any, texts: Any) -> Scored:
        lengths = [np.array([len(text) for text in of_query]) for of_query in texts]
        return Scored([n.astype(np.float32) for n in lengths], [np.zeros(len(n), dtype=np.int32) for n in lengths])


def make_inputs(folder: Path, sizes: list[int]) -> None:
    """A collection with texts of 100 words, and a run artifact for each size."""
    beir = folder / "beir"
    beir.mkdir()
    rng = np.random.default_rng(0)
    with (beir / "corpus.jsonl").open("w") as file:
        for i in range(DOCUMENTS):
            text = " ".join(f"w{w}" for w in rng.integers(0, 5000, 100))
            file.write(json.dumps({"_id": f"doc-{i}", "title": "", "text": text}) + "\n")
    with (beir / "queries.jsonl").open("w") as file:
        for i in range(QUERIES):
            file.write(json.dumps({"_id": f"query-{i}", "text": f"w{i % 5000} w{i % 77}"}) + "\n")
    collection = make_collection(str(beir), folder / "collection")
    scores = np.arange(DEPTH, 0, -1, dtype=np.float32)
    for pairs in sizes:
        queries = max(1, pairs // DEPTH)
        hits = [[f"doc-{(i * 31 + j * 7) % DOCUMENTS}" for j in range(DEPTH)] for i in range(queries)]
        run = Run.from_hits([f"query-{i}" for i in range(queries)], hits, [scores] * queries)
        run.save(folder / f"run-{pairs}", recipe={"kind": "made"}, inputs={"collection": collection.ref()})
    (folder / "trivial.yaml").write_text("kind: trivial\n")


def largest_resident_size() -> float:
    """MB. Not ``ru_maxrss``, which a child inherits from the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(folder: Path, pairs: int) -> dict[str, float]:
    """Seconds and the largest resident size (MB) of scoring one run, in this process."""
    registry.TEACHERS["trivial"] = registry.Entry("__main__:TrivialTeacher", "for the benchmark")
    writing = 0.0
    write = shards.write_shard

    def timed(*arguments: Any) -> None:
        nonlocal writing
        start = time.perf_counter()
        write(*arguments)
        writing += time.perf_counter() - start

    shards.write_shard = timed
    start = time.perf_counter()
    scores = score(
        str(folder / "trivial.yaml"),
        collection=folder / "collection",
        candidates=[folder / f"run-{pairs}"],
        out=folder / f"scores-{pairs}",
    )
    seconds = time.perf_counter() - start
    assert scores.manifest.counts["pairs"] == pairs
    return {
        "pairs": pairs,
        "seconds": seconds,
        "writing_seconds": writing,
        "megabytes": largest_resident_size(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), int(arguments.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        sizes = [10_000, arguments.pairs]
        make_inputs(Path(name), sizes)
        found = []
        for pairs in sizes:
            command = [sys.executable, __file__, "--measure", name, str(pairs)]
            found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    for row in found:
        print(
            f"{row['pairs']:>10,} pairs: {row['megabytes']:7.1f} MB resident at most, {row['seconds']:7.1f} s, "
            f"{1e6 * row['seconds'] / row['pairs']:6.1f} µs a pair, "
            f"{1e6 * row['writing_seconds'] / row['pairs']:5.1f} µs of them writing"
        )
    growth = found[1]["megabytes"] - found[0]["megabytes"]
    print(f"growth: {growth:.1f} MB (limit: 200 MB)")
    if arguments.out:
        arguments.out.write_text(json.dumps({"runs": found, "growth_megabytes": growth}, indent=2) + "\n")
    if growth >= 200:
        raise SystemExit("memory grows with the number of pairs")


if __name__ == "__main__":
    main()
