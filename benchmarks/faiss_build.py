"""Building a FAISS index: documents a second and peak memory of `build_index` against FAISS called directly.

Both train on the same sample and add the same batches of a memory-mapped file, each in a process of its own, in
interleaved rounds. The vectors are synthetic: unit vectors around 10,000 centres.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

BATCH = 65536
SAMPLE = 262144
SEED = 1234


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--factory", default="IVF4096,PQ32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a folder for vectors and indexes, kept (default: a temporary one)")
    parser.add_argument("--one", choices=["ours", "faiss"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(arguments)))
        return
    with TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        arguments.work.mkdir(parents=True, exist_ok=True)
        print(json.dumps(_compare(arguments), indent=2))


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    if not (arguments.work / "vectors").exists():
        _make_vectors(arguments)
    measured: dict[str, list[dict[str, float]]] = {"ours": [], "faiss": []}
    for round_ in range(arguments.rounds):
        names = ["ours", "faiss"] if round_ % 2 == 0 else ["faiss", "ours"]
        for name in names:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--work", str(arguments.work), "--one", name],
                stdout=subprocess.PIPE,
                check=True,
            )
            measured[name].append(json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, Any] = {
        "n": arguments.n,
        "dimension": arguments.dimension,
        "factory": arguments.factory,
        "threads": arguments.threads,
    }
    for name, rounds in measured.items():
        seconds = statistics.median(of_one["seconds"] for of_one in rounds)
        result[name] = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(statistics.median(of_one["cpu_seconds"] for of_one in rounds), 2),
            "documents_per_second": round(arguments.n / seconds, 1),
            "peak_rss_mb": round(max(of_one["peak_rss_mb"] for of_one in rounds)),
            "peak_anonymous_mb": round(max(of_one["peak_anonymous_mb"] for of_one in rounds)),
            "before_mb": round(rounds[0]["before_mb"]),
            "index_mb": round(rounds[0]["index_mb"], 1),
            "rounds": rounds,
        }
    result["time_ratio"] = round(result["ours"]["seconds"] / result["faiss"]["seconds"], 3)
    result["cpu_ratio"] = round(result["ours"]["cpu_seconds"] / result["faiss"]["cpu_seconds"], 3)
    return result


def _make_vectors(arguments: argparse.Namespace) -> None:
    """A vectors artifact, its matrix written in chunks."""
    from retrieval_kd.artifact import InputRef
    from retrieval_kd.data.vector_writer import write_ids
    from retrieval_kd.plan import Plan

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((10_000, arguments.dimension), dtype=np.float32)
    inputs = {"model": InputRef("f" * 64, name="synthetic"), "collection": InputRef("c" * 64)}
    with Plan("vectors", {"kind": "synthetic", "n": arguments.n}, inputs).write(arguments.work / "vectors") as draft:
        shape = (arguments.n, arguments.dimension)
        matrix = np.lib.format.open_memmap(draft.path / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, arguments.n, BATCH):
            stop = min(start + BATCH, arguments.n)
            part = centres[rng.integers(0, len(centres), stop - start)]
            part += rng.standard_normal(part.shape, dtype=np.float32)
            matrix[start:stop] = part / np.linalg.norm(part, axis=1, keepdims=True)
        matrix.flush()
        write_ids(draft.path / "ids.arrow", [f"d{row}" for row in range(arguments.n)])
        draft.counts["vectors"] = arguments.n
        draft.details.update(layout="dense", of="documents", split=None, similarity="dot", dimension=shape[1])


def _one(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory of one build in this process, without imports and checksums of the vectors."""
    import faiss

    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.indexes.build import build_index

    vectors = Vectors.load(arguments.work / "vectors")
    recipe = arguments.work / "recipe.yaml"
    recipe.write_text(f"kind: faiss\nfactory: {arguments.factory}\nthreads: {arguments.threads}\n")
    shutil.rmtree(arguments.work / "index", ignore_errors=True)
    before = _anonymous()
    peak = _Peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    if arguments.one == "ours":
        index = build_index(recipe, vectors=vectors, out=arguments.work / "index")
        size = index.manifest.files["index.faiss"]["bytes"]
    else:
        file = arguments.work / "direct.faiss"
        _directly(faiss, vectors.path / "vectors.npy", file, arguments)
        size = file.stat().st_size
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_anonymous_mb": peak.end(),
        "before_mb": before,
        "index_mb": size / 2**20,
    }


def _directly(faiss: Any, matrix_file: Path, file: Path, arguments: argparse.Namespace) -> None:
    matrix = np.load(matrix_file, mmap_mode="r")
    faiss.omp_set_num_threads(arguments.threads)
    index = faiss.index_factory(matrix.shape[1], arguments.factory, faiss.METRIC_INNER_PRODUCT)
    index.do_polysemous_training = False  # as `build_index` sets it: it costs time and changes no score
    chosen = np.sort(np.random.default_rng(SEED).choice(len(matrix), min(SAMPLE, len(matrix)), replace=False))
    index.train(matrix[chosen])
    for start in range(0, len(matrix), BATCH):
        index.add(np.ascontiguousarray(matrix[start : start + BATCH]))
    faiss.write_index(index, str(file))


def _anonymous() -> float:
    """Megabytes of this process's memory that belong to no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class _Peak:
    """The most anonymous memory, looked at every 20 ms."""

    def __init__(self) -> None:
        self._most = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._most = max(self._most, _anonymous())

    def end(self) -> float:
        """The peak in megabytes."""
        self._stop.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    main()
