from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
import trivial

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.scores import Scores
from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.teachers import workers as workers_module
from retrieval_kd.teachers.score import score

SHARDS = 30


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    trivial.register_for_workers(monkeypatch, tmp_path / "site")
    return tiny.write_recipe(tmp_path / "trivial.yaml", {"kind": "trivial", "pairs_per_shard": 6})


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def workers_of(pid: int) -> list[psutil.Process]:
    try:
        return [p for p in psutil.Process(pid).children() if "retrieval_kd.teachers.worker" in p.cmdline()]
    except psutil.NoSuchProcess:
        return []


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def wait_for_a_new_shard(folder: Path, pid: int) -> None:
    before = len(shard_bytes(folder))
    wait_for(lambda: len(list(folder.glob("*.parquet"))) > before and workers_of(pid))


def test_two_workers_write_the_same_file(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates]}
    alone = score(recipe, **arguments, out=tmp_path / "alone")
    pair = score(recipe, **arguments, out=tmp_path / "pair", workers=2, overrides=[f"log={log}", "seconds=0.01"])
    assert shard_bytes(pair.path) == shard_bytes(alone.path) and len(pair.shards) == SHARDS
    assert (pair.fingerprint, pair.manifest.counts) == (alone.fingerprint, alone.manifest.counts)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, *_ in lines}) == 2 and str(os.getpid()) not in {pid for pid, *_ in lines}
    assert Counter(query for _, query, _ in lines) == {f"train-{i}": 1 for i in range(30)}


def test_a_document_that_kills_its_worker_is_named_and_the_rest_goes_on(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates]}
    scores = score(recipe, **arguments, out=tmp_path / "s", workers=2, overrides=["kills=w7"])
    assert scores.manifest.counts["failed_pairs"] == 6 and scores.manifest.counts["pairs"] == 174
    failed = (scores.path / "failed.jsonl").read_text()
    assert failed.count('"doc_id": "d07"') == failed.count("\n") == 6 and "SIGKILL" in failed
    assert "document 'd07' cannot be scored" in caplog.text
    kept = [(row.query_id, row.doc_ids, row.scores.tolist()) for row in scores]
    whole = score(recipe, **arguments, out=tmp_path / "whole")
    without = [[(d, s) for d, s in zip(r.doc_ids, r.scores.tolist(), strict=True) if d != "d07"] for r in whole]
    assert [list(zip(docs, values, strict=True)) for _, docs, values in kept] == without


def test_an_error_of_the_teacher_is_the_commands_error(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """A worker finds that its vectors' folder is gone, say: the class is lost, the exit code and the words are not."""
    folder = tmp_path / "site"
    (folder / "sitecustomize.py").write_text(
        (folder / "sitecustomize.py").read_text()
        + "import trivial\nfrom retrieval_kd.errors import InputError\n"
        + "def prepare(self, job): raise InputError('the disk was taken away')\n"
        + "trivial.TrivialTeacher.prepare = prepare\n"
    )
    with pytest.raises(RetrievalKDError, match="the disk was taken away") as raised:
        score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "s", workers=2)
    assert raised.value.exit_code == InputError.exit_code


def test_a_worker_that_cannot_start_is_an_error(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    (tmp_path / "site" / "sitecustomize.py").write_text("import os\nos._exit(9)\n")
    with pytest.raises(RetrievalKDError, match=r"died 3 times while it loaded its teacher \(.*exit code 9\)"):
        score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "s", workers=1)


def test_prepare_runs_in_one_worker_at_a_time(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    (folder / "sitecustomize.py").write_text(
        (folder / "sitecustomize.py").read_text()
        + "import time, trivial\nfrom pathlib import Path\n"
        + "def prepare(self, job):\n"
        + "    with Path(self.recipe.log).open('a') as f: f.write('in\\n')\n"
        + "    time.sleep(0.3)\n"
        + "    with Path(self.recipe.log).open('a') as f: f.write('out\\n')\n"
        + "trivial.TrivialTeacher.prepare = prepare\n"
    )
    log = tmp_path / "log"
    overrides = [f"log={log}", "seconds=0.05"]
    score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "s", workers=2, overrides=overrides)
    steps = [line for line in log.read_text().split("\n") if line in ("in", "out")]
    assert steps == ["in", "out", "in", "out"]


def test_each_worker_has_its_gpu_and_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    shares = [workers_module._share(number, 4) for number in range(4)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "0", "1"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert workers_module._share(1, 2)["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES" not in workers_module._share(0, 2)


@pytest.fixture
def command(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> Iterator[list[str]]:
    """`score` with two workers in a process of its own, slow enough to be killed in the middle."""
    code = (
        "import signal, sys\nfrom retrieval_kd.teachers.score import score\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background may ignore it
        f"score({recipe!r}, collection={str(collection.path)!r}, candidates=[{str(candidates)!r}], out=sys.argv[1],"
        f" workers=2, overrides=['seconds=0.02', 'log={tmp_path / 'log'}'])"
    )
    yield [sys.executable, "-c", code]


def test_ten_random_kills_leave_the_same_file(
    command: list[str], recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """SIGKILL ten times, at random moments: five times the whole command, five times one of its workers.

    A kill may repeat one shard of each worker it ends, nothing more.
    """
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates]}
    undisturbed = score(recipe, **arguments, out=tmp_path / "undisturbed")
    out, partial = tmp_path / "scores", tmp_path / "scores.partial"
    rng = np.random.default_rng(3)
    kills = Counter({"command": 5, "worker": 5})
    order = rng.permutation(list(kills.elements())).tolist()
    process = subprocess.Popen([*command, str(out)])
    for victim in order:
        wait_for_a_new_shard(partial, process.pid)
        time.sleep(float(rng.uniform(0, 0.03)))
        orphans = workers_of(process.pid)
        if victim == "worker":
            orphans[0].kill()
        else:
            process.kill()
            process.wait()
            psutil.wait_procs(orphans, timeout=10)
            assert not any(orphan.is_running() for orphan in orphans), "workers die with the command"
            assert not out.exists()
            process = subprocess.Popen([*command, str(out)])
    assert process.wait(60) == 0
    finished = Scores.load(out)
    assert shard_bytes(finished.path) == shard_bytes(undisturbed.path) and len(finished.shards) == SHARDS
    assert finished.fingerprint == undisturbed.fingerprint and finished.manifest.counts == undisturbed.manifest.counts
    pairs = sum(int(line.split()[2]) for line in (tmp_path / "log").read_text().splitlines())
    assert pairs <= 180 + 6 * (5 * 2 + 5 * 1), "at most one shard a worker a kill was done twice"


def test_interrupting_stops_the_workers(command: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen([*command, str(tmp_path / "scores")], stderr=subprocess.PIPE)
    wait_for(lambda: list((tmp_path / "scores.partial").glob("*.parquet")))
    children = workers_of(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode != 0 and said.rstrip().endswith(b"KeyboardInterrupt")
    assert b"another exception" not in said and b"ended by" not in said
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
