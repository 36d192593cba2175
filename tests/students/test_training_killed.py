"""kill -9 in the middle of training: the run goes on from the last whole checkpoint and ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny

from retrieval_kd.atomic import unfinished
from retrieval_kd.data.collection import Collection
from retrieval_kd.students.objective import STATE
from retrieval_kd.students.train import train


def test_kill_minus_nine(dense: Path, scores: Path, collection: Collection, tmp_path: Path) -> None:
    """Killed after a checkpoint; one that was cut short while it was written is passed over."""
    recipe = tiny.write_recipe(
        tmp_path / "student.yaml",
        {
            "kind": "dense",
            "base": str(dense),
            "groups": {"documents": 4},
            "losses": [{"kind": "kl", "teacher_temperature": 0.05}, {"kind": "taid", "weight": 0.1}],
            "steps": 120,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "development": {"against": "teacher", "documents": 10, "times": 30},
        },
    )
    inputs = {"collection": collection, "scores": [scores]}
    undisturbed = train(recipe, **inputs, out=tmp_path / "undisturbed")
    out = tmp_path / "killed"
    arguments = [str(recipe), "--collection", str(collection.path), "--scores", str(scores), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "retrieval_kd", "train", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    checkpoints = unfinished(out) / "work" / "checkpoints"
    try:
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob(f"checkpoint-*/{STATE}")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    cut_short = checkpoints / "checkpoint-119"
    cut_short.mkdir()
    (cut_short / "model.safetensors").write_bytes(b"half")
    killed = train(recipe, **inputs, out=out)
    assert (killed.path / "model.safetensors").read_bytes() == (undisturbed.path / "model.safetensors").read_bytes()
    assert killed.settings == undisturbed.settings
    assert tiny.losses(killed.path) == tiny.losses(undisturbed.path)
