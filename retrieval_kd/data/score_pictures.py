"""The histogram of a score file as a PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import UsageError

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a6",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e8ee",
}
_BARS, _MEDIAN, _MEAN = "#3b6fb6", "#d1702f", "#2f8f5b"
_LONGEST_NAME = 60


def refuse_other_formats(path: Path) -> None:
    """Raises `UsageError` for a file that is not called ``.png``."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: the histogram is a PNG; end the name in .png")


def write_histogram(description: Mapping[str, Any], path: Path) -> None:
    """Draws the histogram that `describe_scores` counted into the PNG file ``path``, whole or not at all."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    histogram, scores = description["histogram"], description["scores"]
    edges = histogram["edges"]
    if len(edges) == 2:  # all scores are the same
        edges = [edges[0] - 0.5, edges[0] + 0.5]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.stairs(histogram["counts"], edges, fill=True, color=_BARS)
        lines = ((scores["quantiles"]["50%"], _MEDIAN, "-", "median"), (scores["mean"], _MEAN, "--", "mean"))
        for value, colour, style, name in lines:
            axes.axvline(value, color=colour, linestyle=style, linewidth=1.5, label=f"{name} {value:.4g}")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(f"score ({description['score_kind']}){_outside(histogram)}")
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="y", integer=True)
        axes.set_title(_title(description), fontsize=10)
        axes.legend(frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _title(description: Mapping[str, Any]) -> str:
    name = str(description["details"].get("model") or description["teacher"] or description["path"])
    if len(name) > _LONGEST_NAME:
        name = "…" + name[-_LONGEST_NAME:]
    pairs, queries = description["scores"]["pairs"], description["queries"]["queries"]
    return f"{name}: {pairs:,} pairs of {queries:,} queries"


def _outside(histogram: Mapping[str, Any]) -> str:
    below, above = histogram["below"], histogram["above"]
    return f"; not drawn: {below:,} below, {above:,} above" if below or above else ""
