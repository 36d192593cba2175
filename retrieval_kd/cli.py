"""The command line: `demo` and `run`, the verbs of the other modules beside them, and what becomes of errors.

A verb is one short function; what it needs is imported when it runs.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from retrieval_kd.checks_cli import checks_app
from retrieval_kd.collections_cli import collections_app
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.indexes_cli import indexes_app
from retrieval_kd.options import DryRun, Force, Json, Out, Overrides, Verbose, recipe_argument
from retrieval_kd.output import show_made, show_plan
from retrieval_kd.scores_cli import scores_app
from retrieval_kd.students_cli import students_app

log = logging.getLogger("retrieval_kd")


class _Verbs(TyperGroup):
    """The one place where errors become a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """What the verb returns; `typer.Exit` with the error's exit code when it failed on purpose."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except RetrievalKDError as error:
            log.debug("the error came from here:", exc_info=True)
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; run the same command again, finished work is kept", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader has seen all it wanted. What is left in the buffer must not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=_Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
for verbs in (collections_app, indexes_app, scores_app, students_app, checks_app):
    app.add_typer(verbs)


@app.callback(invoke_without_command=True)
def start(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Distil rankers into search indexes. A recipe comes first, then inputs by name, --out last.

    Exit codes: 0 done, 1 failed, 2 usage or bad recipe, 3 a missing extra, 4 missing or invalid input.
    """
    if version:
        import retrieval_kd

        typer.echo(retrieval_kd.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    teacher: Annotated[str | None, typer.Option("--teacher", help="A teacher recipe other than the demo's.")] = None,
    size: Annotated[str, typer.Option("--size", help="full, or tiny for a quick look.")] = "full",
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Run the whole pipeline on the built-in collection, offline.

    \b
    Example: retrieval-kd demo --out runs/demo
    """
    from retrieval_kd import pipeline

    show_made(pipeline.demo(out, teacher=teacher, size=size, force=force), as_json)
    if not as_json:
        typer.echo("Other teachers, students and indexes are recipes: docs/recipes.md; every verb has --help.")


@app.command()
def run(
    pipeline: Annotated[str, recipe_argument("A pipeline recipe")],
    out: Out,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Run a whole pipeline from one file; finished artifacts are reused.

    \b
    Example: retrieval-kd run pipelines/demo --out runs/demo
    """
    from retrieval_kd.pipeline import estimate_pipeline, run_pipeline

    if dry_run:
        return show_plan("pipelines", pipeline, overrides, estimate_pipeline(pipeline, overrides or ()), as_json)
    show_made(run_pipeline(pipeline, out, overrides or (), force=force), as_json)


def main() -> None:
    """Runs the command line; logs go to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    app(prog_name="retrieval-kd")
