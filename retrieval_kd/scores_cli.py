"""The verbs of scores: `score` makes them, `scores show`, `merge`, `convert` and `ensemble` take their files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_kd.data.score_kinds import SCORE_KINDS
from retrieval_kd.options import (
    Collection,
    DryRun,
    Force,
    Json,
    MaybeCollection,
    Out,
    Overrides,
    Verbose,
    by_name_of,
    recipe_argument,
)
from retrieval_kd.output import make, print_json, show_plan

scores_app = typer.Typer()
files_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Inspect, join, import, export and combine score files."
)
scores_app.add_typer(files_app, name="scores")


@scores_app.command()
def score(
    recipe: Annotated[str, recipe_argument("A teacher recipe")],
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


@files_app.command("show")
def show(
    scores: Annotated[Path, typer.Argument(help="A scores artifact.")],
    collection: MaybeCollection = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Compare with this split's qrels; all splits otherwise.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the histogram to a file.")] = None,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Show what a score file holds, who made it, and how well it agrees with labels.

    \b
    Example: retrieval-kd scores show runs/scores --png runs/scores.png
    """
    from retrieval_kd.data.score_report import describe_scores
    from retrieval_kd.data.score_report_text import lines

    found = describe_scores(scores, collection=collection, split=split, png=png)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(lines(found)))


@files_app.command("merge")
def merge(
    scores: Annotated[list[Path], typer.Argument(help="Score files of one teacher: slices, or other candidates.")],
    out: Out,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Join the slices of a divided run, or one teacher's scores of different candidates.

    \b
    Example: retrieval-kd scores merge runs/scores-1 runs/scores-2 --out runs/scores
    """
    from retrieval_kd.data.merge_scores import merge_scores

    make(out, lambda: merge_scores(scores, out, force=force), as_json)


@files_app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="A score file, or a file in another layout (.gz is read too).")],
    from_format: Annotated[str, typer.Option("--from", metavar="FORMAT", help="The layout of the source.")],
    to_format: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The layout to write.")],
    out: Out,
    collection: MaybeCollection = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="SPLIT", help="Whose qrels say which documents are positive.")
    ] = None,
    negatives: Annotated[
        int | None,
        typer.Option(
            "--negatives",
            min=1,
            help="Negatives in a row of sentence-transformers; by default the fewest that a query has. A query with "
            "more gets several rows, the last of which repeats some: it weighs more. One with fewer is left out.",
        ),
    ] = None,
    score_kind: Annotated[
        str | None, typer.Option("--score-kind", help=f"What an imported score is: {', '.join(SCORE_KINDS)}.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Import or export scores: retrieval-kd, hofstaetter-tsv, sentence-transformers, st-pickle, pylate,
    flagembedding, tevatron, trec.

    \b
    Example: retrieval-kd scores convert train.tsv --from hofstaetter-tsv --to retrieval-kd --out runs/scores
    Example: retrieval-kd scores convert runs/scores --from retrieval-kd --to pylate --out runs/scores.parquet
    """
    from retrieval_kd.data.score_formats.convert import OWN, convert_scores
    from retrieval_kd.data.score_formats.export import Written

    work = partial(
        convert_scores,
        source,
        from_format=from_format,
        to_format=to_format,
        out=out,
        collection=collection,
        labels=labels,
        negatives=negatives,
        score_kind=score_kind,
        force=force,
    )
    if to_format == OWN:
        make(out, work, as_json)
        return
    written = work()
    assert isinstance(written, Written)
    if as_json:
        facts = {"format": to_format, "bytes": out.stat().st_size, "counts": written.counts}
        print_json({"path": str(out), **facts})
    else:
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in written.counts.items())
        typer.echo(f"{out}: {to_format} with {counts}")


@files_app.command("ensemble")
def ensemble(
    recipe: Annotated[str, recipe_argument("An ensemble recipe")],
    scores: Annotated[list[str], typer.Argument(metavar="[NAME=]SCORES...", help="The score files to combine.")],
    out: Out,
    overrides: Overrides = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Combine the score files of several teachers into one.

    \b
    Example: retrieval-kd scores ensemble teachers/ensemble-t2 a=runs/scores-a b=runs/scores-b --out runs/scores
    """
    from retrieval_kd.teachers.ensemble import ensemble_scores

    members = by_name_of("SCORES", scores)
    make(out, lambda: ensemble_scores(recipe, members, out=out, overrides=overrides or (), force=force), as_json)
