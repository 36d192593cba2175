"""The course of a training run: every logged step as CSV, and the losses as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NO_LOSS = {"step", "epoch", "loss", "grad_norm", "learning_rate", "train_loss", "total_flos"}
_NO_LOSS |= {"query_terms", "document_terms"}  # active terms of a sparse student's texts


def write_log(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes one line a logged step, one column a logged quantity; no times, which differ from run to run."""
    timed = ("runtime", "per_second")
    columns = sorted({key for entry in history for key in entry if not key.endswith(timed)} - {"step"})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", *columns], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]], measure: str) -> None:
    """Draws the weighted losses over the steps, and the development measure beside them where there is one."""
    from matplotlib.figure import Figure

    logged = [entry for entry in history if "loss" in entry]
    evaluated = [entry for entry in history if "eval_development" in entry]
    if not logged:
        return
    panels = 2 if evaluated else 1
    figure = Figure(figsize=(5.2 * panels, 3.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    keys = sorted({key for entry in logged for key in entry if key not in _NO_LOSS and not key.startswith("eval_")})
    for key in keys if len(keys) > 1 else []:
        points = [(entry["step"], entry[key]) for entry in logged if key in entry]
        axes[0].plot(*zip(*points, strict=True), linewidth=1, label=key)
    axes[0].plot([e["step"] for e in logged], [e["loss"] for e in logged], linewidth=1.6, color="black", label="loss")
    axes[0].set(xlabel="step", ylabel="weighted loss")
    axes[0].legend(frameon=False, fontsize=8)
    if evaluated:
        axes[1].plot([e["step"] for e in evaluated], [e["eval_development"] for e in evaluated], marker="o")
        axes[1].set(xlabel="step", ylabel=f"development {measure}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110, metadata={"Software": None})
