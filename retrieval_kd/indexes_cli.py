"""The verbs of an index: `index` builds it, `update`, `tune`, `decode` and `search` take one that is there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from retrieval_kd.errors import UsageError
from retrieval_kd.options import (
    DryRun,
    Force,
    IndexArtifact,
    Json,
    MaybeCollection,
    MaybeModel,
    Out,
    Overrides,
    TeacherScores,
    Verbose,
    recipe_argument,
)
from retrieval_kd.output import make, print_mapping, show_hits, show_plan

indexes_app = typer.Typer()


@indexes_app.command()
def index(
    recipe: Annotated[str, recipe_argument("An index recipe")],
    out: Out,
    collection: MaybeCollection = None,
    vectors: Annotated[Path | None, typer.Option("--vectors", metavar="V", help="The documents' vectors.")] = None,
    model: MaybeModel = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", metavar="QV", help="Vectors of queries, for an index that learns.")
    ] = None,
    scores: TeacherScores = None,
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
    index: IndexArtifact,
    action: Annotated[Literal["add", "delete", "compact"], typer.Argument(help="What is done to its documents.")],
    vectors: Annotated[
        Path | None, typer.Option("--vectors", metavar="V", help="add: the new documents' vectors, by the same model.")
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(
            "--collection", metavar="C", help="add: the new documents of an index of texts, or those of --vectors."
        ),
    ] = None,
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
    Example: retrieval-kd update runs/bm25 add --collection runs/new --rebuild
    Example: retrieval-kd update runs/index delete --ids d17,d18
    Example: retrieval-kd update runs/index compact
    """
    from retrieval_kd.indexes.update import update_index

    given: dict[str, Any] = {"vectors": vectors, "collection": collection, "rebuild": rebuild}
    given["ids"] = _ids(ids, ids_file)
    make(index, lambda: update_index(index, action, **given), as_json)


@indexes_app.command()
def tune(
    index: IndexArtifact,
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


@indexes_app.command()
def search(
    index: IndexArtifact,
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
