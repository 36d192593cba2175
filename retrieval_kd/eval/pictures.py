"""The report's pictures as SVG text: the headline with its intervals, and the headline against the costs."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COSTS = {"milliseconds_per_query": "milliseconds a query", "bytes_per_document": "bytes a document"}
_MARKERS = "osD^vP*X<>"
_COLOURS = ["#3b6fb6", "#d1702f", "#2f8f5b", "#b5406a", "#7a5bb0", "#8c6d31", "#2b8ea3", "#6b7280"]
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a6",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e8ee",
    "svg.hashsalt": "retrieval-kd",
}


def pictures(metrics: Mapping[str, Any]) -> list[str]:
    """One SVG element a picture: the headline always, the costs when an index was measured."""
    figures = [headline_figure(metrics)]
    if any(system["efficiency"] for system in metrics["systems"]):
        figures.append(costs_figure(metrics))
    labels = [f"{metrics['headline']} of each system", f"{metrics['headline']} against the costs"]
    return [svg(figure, f"p{n}", label) for n, (figure, label) in enumerate(zip(figures, labels, strict=False))]


def headline_figure(metrics: Mapping[str, Any]) -> Figure:
    """A dot a system at its mean, with the bootstrap interval; the axis starts at 0."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    systems, headline = metrics["systems"], metrics["headline"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 1.1 + 0.42 * len(systems)), layout="constrained")
        axes = figure.add_subplot()
        for row, system in enumerate(systems):
            mean, interval = system["means"][headline], system["interval"]
            colour = _COLOURS[row % len(_COLOURS)]
            axes.plot([interval["low"], interval["high"]], [row, row], color=colour, linewidth=2.5)
            axes.plot(mean, row, "o", color=colour, markersize=7)
            axes.annotate(
                f"{mean:.3f}", (interval["high"], row), (6, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.set_yticks(range(len(systems)), [system["name"] for system in systems])
        axes.set_ylim(len(systems) - 0.5, -0.5)
        highest = max(system["interval"]["high"] for system in systems)
        axes.set_xlim(0, max(highest * 1.12, 0.01))
        axes.grid(visible=False, axis="y")
        confidence = metrics["recipe"]["bootstrap"]["confidence"]
        axes.set_xlabel(f"mean {headline} with its {confidence:.0%} bootstrap interval")
    return figure


def costs_figure(metrics: Mapping[str, Any]) -> Figure:
    """The headline of each index against milliseconds a query and bytes a document; named in a legend."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        for axes, (cost, label) in zip(both, _COSTS.items(), strict=True):
            _scatter(axes, metrics, cost)
            axes.set_xlabel(f"{label} (less is better)")
        both[0].set_ylabel(f"mean {metrics['headline']}")
        handles, names = both[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an SVG element whose ids start with ``prefix``, so that several live on one page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _scatter(axes: Axes, metrics: Mapping[str, Any], cost: str) -> None:
    xs, ys = [], []
    for row, system in enumerate(metrics["systems"]):
        if system["efficiency"] is None:
            continue
        xs.append(system["efficiency"][cost])
        ys.append(system["means"][metrics["headline"]])
        axes.plot(
            xs[-1],
            ys[-1],
            linestyle="none",
            marker=_MARKERS[row % len(_MARKERS)],
            color=_COLOURS[row % len(_COLOURS)],
            markersize=8,
            label=system["name"],
        )
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 2, max(xs) * 2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    else:
        axes.set_xlim(0, max(xs) * 1.15 or 1)
    axes.set_ylim(0, max(*ys, 0.01) * 1.15)
