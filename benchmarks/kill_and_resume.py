"""Ten random kill -9 while two workers score with a real cross-encoder: the file must equal an undisturbed one.

    python benchmarks/kill_and_resume.py --beir $BEIR_DIR/scifact [--queries 24] [--kills 10] [--out FILE.json]

The cross-encoder is MiniLM-L6 (the built-in model's weights, a seeded random head): speed and bytes are those of a real
one. Every other kill ends the whole command, the others one worker. Reported: whether the bytes are equal, and how many
shards were done twice (at most one a worker a kill).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from retrieval_kd import build_index, make_collection, search_run
from retrieval_kd.data.run import Run
from retrieval_kd.models.load import find_model


def make_inputs(folder: Path, beir: Path, queries: int) -> None:
    """A collection, BM25's 20 best documents of some queries, a cross-encoder, its recipe."""
    import torch
    from sentence_transformers import CrossEncoder

    collection = make_collection(str(beir), folder / "collection")
    build_index("indexes/bm25", collection=collection, out=folder / "bm25")
    search_run(folder / "bm25", collection, "test", folder / "whole", k=20)
    whole = Run.load(folder / "whole")
    kept = whole.query_ids[:queries]
    hits = [whole.hits(query_id) for query_id in kept]
    part = Run.from_hits(kept, [docs for docs, _ in hits], [scores for _, scores in hits])
    part.save(folder / "candidates", recipe={"kind": "part"}, inputs={"collection": collection.ref()})
    torch.manual_seed(0)
    CrossEncoder(str(find_model("builtin").path), num_labels=1).save_pretrained(str(folder / "model"))
    (folder / "recipe.yaml").write_text(
        f"kind: cross-encoder\nmodel: {folder / 'model'}\nmax_length: 128\npairs_per_shard: 20\n"
    )


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    """`score --workers 2` in a process of its own."""
    command = [sys.executable, "-m", "retrieval_kd", "score", str(folder / "recipe.yaml"), "--workers", "2"]
    command += ["--collection", str(folder / "collection"), "--candidates", str(folder / "candidates")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (folder / f"{out}.log").open("ab") as log:
        return subprocess.Popen([*command, "--out", str(folder / out)], env=environment, stdout=log, stderr=log)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The command's worker processes."""
    try:
        children = psutil.Process(process.pid).children()
        return [child for child in children if "retrieval_kd.teachers.worker" in child.cmdline()]
    except psutil.NoSuchProcess:  # one of them ended meanwhile
        return []


def shard_times(folder: Path) -> dict[str, int]:
    """Shard → time of its last change: a new time is a shard that was done."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beir", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, arguments.beir, arguments.queries)
        began = time.monotonic()
        assert start(folder, "undisturbed").wait() == 0
        undisturbed_seconds = time.monotonic() - began
        partial = folder / "disturbed.partial"
        process = start(folder, "disturbed")
        times: dict[str, int] = {}
        repeated = kills = 0
        began = time.monotonic()
        while process.poll() is None and kills < arguments.kills:
            known = len(times)
            now = shard_times(partial)
            repeated += sum(times[shard] != now[shard] for shard in times.keys() & now.keys())
            times |= now
            if len(times) > known and len(workers_of(process)) == 2:
                time.sleep(float(rng.uniform(0, 1)))
                if kills % 2:
                    process.kill()
                    process.wait()
                    process = start(folder, "disturbed")
                elif workers := workers_of(process):
                    workers[int(rng.integers(len(workers)))].kill()
                kills += 1
            time.sleep(0.02)
        assert process.wait() == 0, (folder / "disturbed.log").read_text()[-2000:]
        seconds = time.monotonic() - began
        one, other = (
            {path.name: path.read_bytes() for path in (folder / run).glob("*.parquet")}
            for run in ("undisturbed", "disturbed")
        )
        manifests = [json.loads((folder / run / "manifest.json").read_text()) for run in ("undisturbed", "disturbed")]
        found = {
            "pairs": manifests[0]["counts"]["pairs"],
            "shards": len(one),
            "kills": kills,
            "equal": one == other and manifests[0]["fingerprint"] == manifests[1]["fingerprint"],
            "finished_shards_done_again": repeated,
            "seconds_undisturbed": round(undisturbed_seconds, 1),
            "seconds_disturbed": round(seconds, 1),
        }
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    if not found["equal"] or kills < arguments.kills or repeated:
        raise SystemExit("the file differs, a finished shard was done again, or there were too few kills")


if __name__ == "__main__":
    main()
