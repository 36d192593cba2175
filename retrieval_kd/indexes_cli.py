"""The verbs of an index: `index` builds it, `update` changes it, `tune` finds its parameters, `decode` reads it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from retrieval_kd.errors import UsageError
from retrieval_kd.options import DryRun, Force, Json, MaybeCollection, MaybeModel, Out, Overrides, Verbose
from retrieval_kd.output import make, print_mapping, show_plan

indexes_app = typer.Typer()


@indexes_app.command()
def index(
    recipe: Annotated[str, typer.Argument(help="An index recipe: a file, or the name of a shipped one.")],
    out: Out,
    collection: MaybeCollection = None,
    vectors: Annotated[Path | None, typer.Option("--vectors", metavar="V", help="The documents' vectors.")] = None,
    model: MaybeModel = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", metavar="QV", help="Vectors of queries, for an index that learns.")
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            "--scores", metavar="S", help="Teacher scores, for an index that learns; may be given many times."
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option("--shards", min=1, metavar="N", help="Build N pieces and search them as one.")
    ] = None,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Build a search index over a collection's texts or over vectors.

    \b
    Example: retrieval-kd index indexes/bm25 --collection pydocs --out runs/bm25
    """
    from retrieval_kd.indexes.build import build_index, estimate_index

    inputs: dict[str, Any] = {"collection": collection, "vectors": vectors, "model": model}
    inputs |= {"queries": queries, "scores": scores or (), "shards": shards, "overrides": overrides or ()}
    if dry_run:
        changes = [*(overrides or ()), *([] if shards is None else [f"shards={shards}"])]
        return show_plan("indexes", recipe, changes, estimate_index(recipe, **inputs), as_json)
    make(out, lambda: build_index(recipe, **inputs, out=out, force=force), as_json)


@indexes_app.command()
def update(
    index: Annotated[Path, typer.Argument(help="An index artifact.")],
    action: Annotated[Literal["add", "delete", "compact"], typer.Argument(help="What is done to its documents.")],
    vectors: Annotated[
        Path | None, typer.Option("--vectors", metavar="V", help="add: the new documents' vectors, by the same model.")
    ] = None,
    collection: MaybeCollection = None,
    ids: Annotated[str | None, typer.Option("--ids", metavar="A,B", help="delete: the documents' ids.")] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", metavar="FILE", help="delete: a file with an id a line.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="add: build the whole index anew, for engines that cannot grow.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Add or delete documents of an index, or build it anew of those that are left.

    \b
    Example: retrieval-kd update runs/index add --vectors runs/new-vectors
    Example: retrieval-kd update runs/index delete --ids d17,d18
    Example: retrieval-kd update runs/index compact
    """
    from retrieval_kd.indexes.update import update_index

    given: dict[str, Any] = {"vectors": vectors, "collection": collection, "rebuild": rebuild}
    given["ids"] = _ids(ids, ids_file)
    make(index, lambda: update_index(index, action, **given), as_json)


@indexes_app.command()
def tune(
    index: Annotated[Path, typer.Argument(help="An index artifact.")],
    queries: Annotated[Path, typer.Option("--queries", metavar="QV", help="Vectors of queries by the index's model.")],
    vectors: Annotated[
        Path | None, typer.Option("--vectors", metavar="V", help="The documents' vectors, if they were moved.")
    ] = None,
    recall: Annotated[
        float, typer.Option("--recall", min=0.0, max=1.0, help="Recall against exact search to be reached.")
    ] = 0.95,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Hits that the recall is of.")] = 10,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Find the fastest search parameters that reach a recall.

    \b
    Example: retrieval-kd tune runs/index --queries runs/query-vectors --recall 0.95
    """
    from retrieval_kd.indexes.tune import tune_index

    tuned = tune_index(index, queries=queries, vectors=vectors, recall=recall, k=k)
    print_mapping(asdict(tuned), as_json)


@indexes_app.command()
def decode(
    index: Annotated[Path, typer.Argument(help="A dense index artifact.")],
    out: Out,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Write what the codes of an index stand for as vectors, which a query-tower can learn against.

    \b
    Example: retrieval-kd decode runs/index --out runs/decoded
    """
    from retrieval_kd.indexes.decode import decode_index

    make(out, lambda: decode_index(index, out, force=force), as_json)


def _ids(listed: str | None, file: Path | None) -> list[str]:
    """The ids of ``--ids`` or ``--ids-file``."""
    if listed is not None and file is not None:
        raise UsageError("give --ids or --ids-file, not both")
    if file is not None:
        try:
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--ids-file {file}: cannot be read ({error})") from error
    return [] if listed is None else [doc_id.strip() for doc_id in listed.split(",") if doc_id.strip()]
