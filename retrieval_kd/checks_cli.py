"""The verbs that look at what there is: `eval` measures it, `check` verifies it, `doctor` examines the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.options import (
    Collection,
    DryRun,
    Force,
    Json,
    Out,
    Overrides,
    Split,
    Verbose,
    by_name_of,
    recipe_argument,
)
from retrieval_kd.output import make, print_json, print_rich, show_plan

checks_app = typer.Typer()


@checks_app.command("eval")
def evaluate(
    collection: Collection,
    split: Split,
    out: Out,
    recipe: Annotated[str, recipe_argument("An evaluation recipe")] = "default",
    indexes: Annotated[
        list[str] | None, typer.Option("--index", metavar="[NAME=]DIR", help="An index; may be given many times.")
    ] = None,
    runs: Annotated[
        list[str] | None, typer.Option("--run", metavar="[NAME=]RUN", help="A run; may be given many times.")
    ] = None,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Measure indexes and runs on a split, compare them with tests, and write a report.

    \b
    Example: retrieval-kd eval --collection pydocs --split test --index runs/bm25 --index mine=runs/ivf --out runs/eval
    """
    from retrieval_kd.eval.evaluate import evaluate
    from retrieval_kd.eval.report import report_table

    by_name = by_name_of("--index", indexes)
    runs_by_name = by_name_of("--run", runs)
    changes = overrides or ()
    if dry_run:
        cost = {"indexes to search": len(by_name), "runs to read": len(runs_by_name)}
        return show_plan("eval", recipe, overrides, cost, as_json)
    report = make(
        out,
        lambda: evaluate(
            recipe,
            collection=collection,
            split=split,
            out=out,
            indexes=by_name,
            runs=runs_by_name,
            overrides=changes,
            force=force,
        ),
        as_json,
    )
    if not as_json:
        print_rich(report_table(report))


@checks_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Any artifact, or a TREC run file.")],
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Verify an artifact: its checksums, the invariants of its kind, and whether its inputs are still found.

    \b
    Example: retrieval-kd check runs/demo/index
    """
    from retrieval_kd.verify import check, lost_inputs

    problems = check(path)
    lost = [] if problems else lost_inputs(path)
    if as_json:
        print_json({"path": str(path), "problems": problems, "lost_inputs": lost})
    else:
        for line in [f"problem: {text}" for text in problems] + [f"warning: {text}" for text in lost]:
            typer.echo(line, err=True)
        typer.echo(f"{path}: {f'{len(problems)} problems' if problems else 'all well'}")
    if problems:
        raise typer.Exit(4)


@checks_app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can do and which extras are missing.

    \b
    Example: retrieval-kd doctor
    """
    from retrieval_kd.doctor import examine, lines

    found = examine()
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(lines(found)))
        for problem in found["problems"]:
            typer.echo(f"problem: {problem}", err=True)
    if found["problems"]:
        raise typer.Exit(3)
