"""The verbs that start from documents: `data` makes a collection, `encode` its vectors."""

from __future__ import annotations

from typing import Annotated

import typer

from retrieval_kd.options import MODEL_NAMES, Collection, DryRun, Force, Json, Out, Verbose
from retrieval_kd.output import make, show_plan

collections_app = typer.Typer()


@collections_app.command()
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


@collections_app.command()
def encode(
    model: Annotated[str, typer.Argument(help=f"{MODEL_NAMES}.")],
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
