"""Draws docs/pipeline.svg, the pipeline with the command of every arrow: ``python docs/pipeline_figure.py``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = Path(__file__).parent / "pipeline.svg"

WIDTH, HEIGHT = 1.9, 0.8
STEP = 3.15
ROWS = {"top": 2.35, "bottom": 0.0}
LANE = 1.2

# Column, row, artifact, what it holds.
BOXES = [
    (0, "top", "source", "BEIR folder, pydocs,\nir_datasets"),
    (1, "top", "collection", "documents, queries,\nqrels"),
    (2, "top", "index", "BM25: no model,\nno training"),
    (3, "top", "run", "candidates\nof each query"),
    (4, "top", "scores", "the teacher's\nraw scores"),
    (0, "bottom", "model", "the student"),
    (1, "bottom", "vectors", "one for each\ndocument"),
    (2, "bottom", "index", "any FAISS\nfactory string"),
    (3, "bottom", "run", "hits\nof each query"),
    (4, "bottom", "report", "measures, tests,\ncosts"),
]
# Column that the arrow starts from, row, verb, example of its recipe.
ARROWS = [
    (0, "top", "data", ""),
    (1, "top", "index", "indexes/bm25"),
    (2, "top", "search", ""),
    (3, "top", "score", "teachers/demo"),
    (0, "bottom", "encode", ""),
    (1, "bottom", "index", "indexes/pq32"),
    (2, "bottom", "search", ""),
    (3, "bottom", "eval", "eval/demo"),
]
EDGE, INK, QUIET, FILL, ACCENT = "#8a94a6", "#1f2733", "#5b6675", "#f2f5fa", "#3b6fb6"


def draw(path: Path) -> None:
    """Writes the figure to ``path``; its ending says in which format."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": "DejaVu Sans", "svg.hashsalt": "retrieval-kd"}):
        figure = Figure(figsize=(12.2, 3.9), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-0.25, 4 * STEP + WIDTH + 0.25)
        axes.set_ylim(-0.35, ROWS["top"] + HEIGHT + 0.3)
        axes.set_axis_off()
        for column, row, name, holds in BOXES:
            _box(axes, column * STEP, ROWS[row], name, holds)
        for column, row, verb, recipe in ARROWS:
            _arrow(axes, column, ROWS[row] + HEIGHT / 2, verb, recipe)
        _turn(axes, "train", "students/demo")
        metadata = {"Date": None, "Title": "The pipeline of retrieval-kd"} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=110)


def _box(axes: Axes, x: float, y: float, name: str, holds: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    dashed = "dashed" if name == "source" else "solid"
    shape = FancyBboxPatch(
        (x, y), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.09", fc=FILL, ec=EDGE, lw=1.2, ls=dashed
    )
    axes.add_patch(shape)
    axes.text(x + WIDTH / 2, y + HEIGHT - 0.2, name, ha="center", va="center", size=11.5, weight="bold", color=INK)
    axes.text(x + WIDTH / 2, y + 0.28, holds, ha="center", va="center", size=8.5, color=QUIET, linespacing=1.15)


def _arrow(axes: Axes, column: int, y: float, verb: str, recipe: str) -> None:
    start, end = column * STEP + WIDTH + 0.06, (column + 1) * STEP - 0.06
    axes.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": ACCENT, "lw": 1.6})
    _label(axes, (start + end) / 2, y, verb, recipe)


def _turn(axes: Axes, verb: str, recipe: str) -> None:
    """The arrow from the end of the upper row to the start of the lower one."""
    right, left = 4 * STEP + WIDTH / 2, WIDTH / 2
    line = ([right, right, left], [ROWS["top"] - 0.06, LANE + 0.36, LANE + 0.36])
    axes.plot(*line, color=ACCENT, lw=1.6, solid_capstyle="butt", solid_joinstyle="round")
    end, start = (left, ROWS["bottom"] + HEIGHT + 0.04), (left, LANE + 0.36)
    style = {"arrowstyle": "-|>", "color": ACCENT, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    _label(axes, (left + right) / 2, LANE + 0.36, verb, recipe)


def _label(axes: Axes, x: float, y: float, verb: str, recipe: str) -> None:
    axes.text(x, y + 0.09, verb, ha="center", va="bottom", size=10.5, family="DejaVu Sans Mono", color=ACCENT)
    axes.text(x, y - 0.1, recipe, ha="center", va="top", size=7.5, family="DejaVu Sans Mono", color=QUIET)


if __name__ == "__main__":
    draw(FIGURE)
