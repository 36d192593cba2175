"""The verbs that make a student: `queries` to train on, `train`, and `export` of models and vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_kd.errors import UsageError, did_you_mean
from retrieval_kd.options import (
    MODEL_NAMES,
    Collection,
    DryRun,
    Force,
    Json,
    MaybeCollection,
    Out,
    Overrides,
    TeacherScores,
    Verbose,
    recipe_argument,
)
from retrieval_kd.output import make, show_plan

students_app = typer.Typer()


@students_app.command()
def queries(
    recipe: Annotated[str, recipe_argument("A recipe for queries")],
    collection: Collection,
    out: Out,
    query_log: Annotated[
        Path | None,
        typer.Option("--query-log", metavar="FILE", help="The .txt, .tsv or .jsonl that kind query-log reads."),
    ] = None,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Make a collection with synthetic queries: from its documents, or from a query log.

    \b
    Example: retrieval-kd queries queries/ict --collection pydocs --set replace=true --out runs/queries
    """
    from retrieval_kd.queries.make import estimate_queries, make_queries

    inputs: dict[str, Any] = {"collection": collection, "query_log": query_log, "overrides": overrides or ()}
    if dry_run:
        return show_plan("queries", recipe, overrides, estimate_queries(recipe, **inputs), as_json)
    make(out, lambda: make_queries(recipe, **inputs, out=out, force=force), as_json)


@students_app.command()
def train(
    recipe: Annotated[str, recipe_argument("A student recipe")],
    collection: Collection,
    out: Out,
    scores: TeacherScores = None,
    candidates: Annotated[
        Path | None, typer.Option("--candidates", metavar="RUN", help="A run that negatives are drawn from.")
    ] = None,
    teacher_vectors: Annotated[
        list[Path] | None, typer.Option("--teacher-vectors", metavar="V", help="A teacher's vectors to imitate.")
    ] = None,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Train a student, or fine-tune a teacher.

    \b
    Example: retrieval-kd train students/dense --collection C --scores runs/scores --out runs/model
    """
    from retrieval_kd.students.train import estimate_train, train

    inputs: dict[str, Any] = {
        "collection": collection,
        "scores": scores or (),
        "candidates": candidates,
        "teacher_vectors": teacher_vectors or (),
        "overrides": overrides or (),
    }
    if dry_run:
        return show_plan("students", recipe, overrides, estimate_train(recipe, **inputs), as_json)
    make(out, lambda: train(recipe, **inputs, out=out, force=force), as_json)


@students_app.command()
def export(
    artifact: Annotated[str, typer.Argument(metavar="MODEL|VECTORS", help=f"{MODEL_NAMES}; or vectors of documents.")],
    out: Out,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="F",
            help="Models: onnx (float32), onnx-int8. Vectors: elasticsearch, lucene-jsonl, milvus, opensearch, qdrant.",
        ),
    ] = "onnx",
    collection: MaybeCollection = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Compare nDCG@10 on this split of the collection too.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option("--documents", metavar="N", help="Search in N documents only: relevant ones, others.")
    ] = None,
    max_ndcg_loss: Annotated[
        float | None, typer.Option("--max-ndcg-loss", help="nDCG@10 it may lose on the split. [0.001; int8: 0.01]")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option("--min-cosine", help="Of each vector with the original's. [0.9999; int8: 0.9]")
    ] = None,
    max_difference: Annotated[
        float | None, typer.Option("--max-difference", help="Of a number of a vector, or of a score. [0.001; int8: –]")
    ] = None,
    min_kendall_tau: Annotated[
        float | None, typer.Option("--min-kendall-tau", help="Of a cross-encoder's order of pairs. [0.999; int8: 0.8]")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", metavar="V", help="Vectors of queries: an example, and Lucene's topics.")
    ] = None,
    scale: Annotated[
        int | None, typer.Option("--scale", metavar="N", help="lucene-jsonl: N times a weight is rounded. [100]")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Export a model to ONNX, checked against the original, or vectors to the files of another search engine.

    An exported model encodes and searches without torch. To vectors, --collection adds texts and attributes.

    \b
    Example: retrieval-kd export runs/model --format onnx-int8 --collection C --split test --out runs/model-int8
    Example: retrieval-kd export runs/vectors --format opensearch --collection C --out runs/opensearch
    """
    bounds = {
        "max_ndcg_loss": max_ndcg_loss,
        "min_cosine": min_cosine,
        "max_difference": max_difference,
        "min_kendall_tau": min_kendall_tau,
    }
    of_models: dict[str, Any] = {"split": split, "documents": documents}
    of_vectors: dict[str, Any] = {"queries": queries, "scale": scale}
    if _exports_vectors(artifact, format):
        _refuse_given({**of_models, **bounds}, f"for models; {format} is a format of vectors")
        from retrieval_kd.data.engine_formats.export import export_vectors

        how = {"format": format, "out": out, "collection": collection, **of_vectors, "force": force}
        make(out, lambda: export_vectors(artifact, **how), as_json)
    else:
        _refuse_given(of_vectors, f"for vectors; {format} is a format of models")
        from retrieval_kd.models.export import export_model
        from retrieval_kd.models.parity import tolerance_of

        how = {"format": format, "out": out, "collection": collection, **of_models, "force": force}
        tolerance = tolerance_of(format, **bounds)
        make(out, lambda: export_model(artifact, tolerance=tolerance, **how), as_json)


def _exports_vectors(artifact: str, format: str) -> bool:
    """Whether ``format`` is one of vectors; `UsageError` for an unknown one and for one that is not the artifact's."""
    from retrieval_kd.artifact import Manifest, is_artifact, resolve
    from retrieval_kd.data.engine_formats.export import FORMATS as OF_VECTORS
    from retrieval_kd.models.exported import FORMATS as OF_MODELS

    formats = {"model": OF_MODELS, "vectors": tuple(OF_VECTORS)}
    if format not in (*OF_MODELS, *OF_VECTORS):
        raise UsageError(f"unknown format '{format}'{did_you_mean(format, (*OF_MODELS, *OF_VECTORS))}")
    path = Path(artifact)
    kind = Manifest.read(resolve(path)).artifact if is_artifact(path) else None
    if kind in formats and format not in formats[kind]:
        raise UsageError(f"{artifact} ({kind}) has no format '{format}'; its formats: {', '.join(formats[kind])}")
    return format in OF_VECTORS


def _refuse_given(options: Mapping[str, Any], why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: only {why}")
