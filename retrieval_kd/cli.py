"""The command line: one short function a verb; what a verb needs is imported when it runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from retrieval_kd.errors import RetrievalKDError, UsageError
from retrieval_kd.indexes_cli import indexes_app
from retrieval_kd.options import (
    Collection,
    DryRun,
    Force,
    Json,
    MaybeCollection,
    MaybeModel,
    Out,
    Overrides,
    Split,
    Verbose,
    by_name_of,
)
from retrieval_kd.output import make, print_json, print_rich, show_hits, show_made, show_plan
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
app.add_typer(scores_app, name="scores")
app.add_typer(students_app)
app.add_typer(indexes_app)


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
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe: a file, or the name of a shipped one.")],
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


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="pydocs, a BEIR folder, or irds:<ir_datasets id>.")],
    out: Out,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Keep this many documents, always the same ones.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Make a collection artifact.

    \b
    Example: retrieval-kd data pydocs --out runs/pydocs
    """
    from retrieval_kd.data.sources import make_collection

    make(out, lambda: make_collection(source, out, sample=sample, force=force), as_json)


@app.command()
def encode(
    model: Annotated[str, typer.Argument(help="builtin, a model artifact, a directory or a hub name.")],
    collection: Collection,
    out: Out,
    queries: Annotated[
        str | None, typer.Option("--queries", metavar="SPLIT", help="Encode this split's queries, not documents.")
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Keep token vectors as float16 (late-interaction models).")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Make the vectors of a collection's documents, or of a split's queries.

    \b
    Example: retrieval-kd encode builtin --collection pydocs --out runs/vectors
    """
    from retrieval_kd.models.encode import encode, estimate_encode

    if dry_run:
        return show_plan(None, model, None, estimate_encode(model, collection, queries=queries, half=half), as_json)
    make(out, lambda: encode(model, collection, out, queries=queries, half=half, force=force), as_json)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="An index artifact.")],
    query: Annotated[str | None, typer.Argument(help="One query; without it a whole split is searched.")] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="Hits a query; 10 for one query, 100 for a run.")] = None,
    collection: MaybeCollection = None,
    vectors: Annotated[
        str | None, typer.Option(help="Vectors of the split's queries by the index's model, instead of encoding.")
    ] = None,
    model: MaybeModel = None,
    split: Annotated[str | None, typer.Option("--split", metavar="S", help="The split whose queries to run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="RUN", help="A run artifact, or a .trec file.")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A search parameter, such as nprobe=64.")
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="F", help="Hits with 'year >= 2020' or 'lang in en,de'; all given must hold."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Search for one query, or write a split's whole run.

    \b
    Example: retrieval-kd search runs/bm25 "merge several sorted iterables" -k 5 --filter "module = heapq"
    Example: retrieval-kd search runs/bm25 --collection pydocs --split test --out runs/bm25-test.trec
    """
    from retrieval_kd.recipe import apply_overrides

    if query is not None and (split or out):
        raise UsageError("search takes either a QUERY, or --collection, --split and --out for a whole run")
    values = apply_overrides({}, parameters or (), "search")
    if query is not None:
        from retrieval_kd.search.searcher import Searcher

        searcher = Searcher.load(index, model=model, collection=collection, search=values)
        return show_hits(searcher.search(query, k or 10, filters=filters or ()), as_json)
    if collection is None or split is None or out is None:
        raise UsageError("search needs a QUERY, or --collection, --split and --out for a whole run")
    from retrieval_kd.search.run import search_run

    whole = (index, collection, split, out)
    how: dict[str, Any] = {"model": model, "vectors": vectors, "search": values, "filters": filters or ()}
    make(out, lambda: search_run(*whole, k=k or 100, **how, force=force), as_json)


@app.command()
def score(
    recipe: Annotated[str, typer.Argument(help="A teacher recipe: a file, or the name of a shipped one.")],
    collection: Collection,
    candidates: Annotated[
        list[str], typer.Option("--candidates", metavar="RUN", help="A run, or qrels:SPLIT; may be given many times.")
    ],
    out: Out,
    vectors: Annotated[
        list[Path] | None, typer.Option("--vectors", metavar="V", help="Vectors by the same model, not made again.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Score only this slice; `scores merge` joins them.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Worker processes, restarted if they die; one GPU each.")
    ] = None,
    reuse: Annotated[
        list[Path] | None, typer.Option("--reuse", metavar="SCORES", help="The same teacher's scores, not made again.")
    ] = None,
    max_failed: Annotated[
        int, typer.Option("--max-failed", min=0, help="Documents that may fail and be left out before the run stops.")
    ] = 10,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Let a teacher score candidates.

    \b
    Example: retrieval-kd score teachers/demo --collection pydocs --candidates runs/bm25-train --out runs/scores
    Example: retrieval-kd score teachers/cross-encoder --collection C --candidates RUN --workers 4 --out runs/scores
    """
    from retrieval_kd.teachers.score import estimate_score, score

    inputs: dict[str, Any] = {"collection": collection, "candidates": candidates, "overrides": overrides or ()}
    if dry_run:
        return show_plan("teachers", recipe, overrides, estimate_score(recipe, **inputs), as_json)
    how: dict[str, Any] = {"vectors": vectors or (), "shard": shard, "workers": workers, "reuse": reuse or ()}
    make(out, lambda: score(recipe, **inputs, **how, out=out, max_failed=max_failed, force=force), as_json)


@app.command("eval")
def evaluate(
    collection: Collection,
    split: Split,
    out: Out,
    recipe: Annotated[
        str, typer.Argument(help="An evaluation recipe: a file, or the name of a shipped one.")
    ] = "default",
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


@app.command()
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


@app.command()
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


def main() -> None:
    """Runs the command line; logs go to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    app(prog_name="retrieval-kd")
