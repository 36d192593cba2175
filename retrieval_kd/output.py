"""What a verb prints on stdout: one line about the artifact it made, a plan, hits, or one JSON object."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from retrieval_kd.artifact import MANIFEST, Manifest, resolve
from retrieval_kd.errors import ArtifactError

if TYPE_CHECKING:
    from retrieval_kd.search.searcher import Hit

T = TypeVar("T")

_SNIPPET = 160
_WIDTH_OF_A_PIPE = 120


def make(out: Path, work: Callable[[], T], as_json: bool) -> T:
    """What ``work()`` returns, after it wrote ``out``; prints what was made, or that it was there already."""
    before = _state(out)
    began = time.monotonic()
    result = work()
    facts = {**describe(out), "already_done": before is not None and before == _state(out)}
    if as_json:
        print_json(facts)
    else:
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in facts["counts"].items())
        when = "already done" if facts["already_done"] else f"{time.monotonic() - began:.1f} s"
        typer.echo(f"{out}: {facts['artifact']} with {counts or 'no counts'} ({_bytes(facts['bytes'])}, {when})")
    return result


def describe(out: Path) -> dict[str, Any]:
    """The facts about a finished ``out``: path, artifact, fingerprint, counts, details, bytes. A file is a TREC run."""
    if out.is_file():
        from retrieval_kd.data.run import Run

        run = Run.load(out)
        counts = {"queries": len(run), "hits": run.total}
        size = out.stat().st_size
        return {
            "path": str(out),
            "artifact": "run",
            "fingerprint": run.ref().fingerprint,
            "counts": counts,
            "details": {},
            "bytes": size,
        }
    manifest = Manifest.read(resolve(out))
    return {
        "path": str(out),
        "artifact": manifest.artifact,
        "fingerprint": manifest.fingerprint,
        "counts": manifest.counts,
        "details": manifest.details,
        "bytes": sum(int(entry["bytes"]) for entry in manifest.files.values()),
    }


def show_plan(
    stage: str | None, recipe: str, overrides: Sequence[str] | None, cost: Mapping[str, Any], as_json: bool
) -> None:
    """Prints what ``--dry-run`` promises: the resolved recipe (of ``stage``, when the verb takes one) and its cost."""
    from retrieval_kd.recipe import load_recipe

    plan: dict[str, Any] = {"cost": dict(cost)}
    if stage is not None:
        plan = {"recipe": load_recipe(recipe, stage, overrides or ()).resolved(), **plan}
    print_mapping(plan, as_json)


def show_made(paths: Mapping[str, Path], as_json: bool) -> None:
    """Prints what a pipeline made (step → path): every report's table, then how to read and search it."""
    facts = {name: describe(path) for name, path in paths.items()}
    if as_json:
        print_json({"made": facts})
        return
    for name, fact in facts.items():
        typer.echo(f"{name:<{max(map(len, facts))}}  {fact['artifact']:<10}  {fact['path']}")
    reports = [name for name, fact in facts.items() if fact["artifact"] == "report"]
    indexes = [name for name, fact in facts.items() if fact["artifact"] == "index"]
    if reports:
        from retrieval_kd.eval.report import Report, report_table

        for name in reports:
            report = Report.load(paths[name])
            print_rich(report_table(report))
            for sentence in report.sentences:
                typer.echo(sentence)
        typer.echo(f"The report: {paths[reports[-1]] / 'report.html'}")
    if indexes:
        searched = paths["index" if "index" in indexes else indexes[-1]]
        typer.echo(f"To search: retrieval-kd search {searched} 'your question'")


def show_hits(hits: Sequence[Hit], as_json: bool) -> None:
    """Prints ranked hits as a table, or as ``{"hits": [...]}``."""
    if as_json:
        ranked = [{"rank": rank, **hit._asdict(), "score": float(hit.score)} for rank, hit in enumerate(hits, 1)]
        print_json({"hits": ranked})
        return
    if not hits:
        typer.echo("no hits")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("id", overflow="fold")
    table.add_column("title and text", overflow="fold")
    for rank, hit in enumerate(hits, 1):
        about = Text(_printable(hit.title or ""), style="bold")
        snippet = _printable(hit.text or "")[:_SNIPPET]
        if snippet:
            about.append(f"\n{snippet}" if about else snippet, style="not bold")
        table.add_row(str(rank), f"{hit.score:.4f}", Text(_printable(hit.doc_id)), about)
    print_rich(table)


def print_mapping(values: Mapping[str, Any], as_json: bool) -> None:
    """Prints a mapping as YAML to read, or as JSON."""
    if as_json:
        print_json(values)
        return
    import yaml

    plain = json.loads(json.dumps(values, default=_plain))
    typer.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip())


def print_json(value: Any) -> None:
    """Prints one JSON value on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=_plain))


def print_rich(renderable: Any) -> None:
    """Prints a rich object on stdout; a pipe gets a fixed width, so that tables do not break."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_WIDTH_OF_A_PIPE)
    console.print(renderable)


def _state(out: Path) -> tuple[int, int] | None:
    """What changes whenever ``out`` is published anew: the inode and time of its manifest (or of the file itself)."""
    try:
        stat = (out if out.is_file() else resolve(out) / MANIFEST).stat()
    except (FileNotFoundError, ArtifactError):
        return None
    return stat.st_ino, stat.st_mtime_ns


def _plain(value: Any) -> Any:
    """JSON for what json does not know: paths as text, numpy scalars as numbers."""
    return value.item() if hasattr(value, "item") else str(value)


def _printable(text: str) -> str:
    """``text`` on one line without control characters, which a document could use to drive the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
