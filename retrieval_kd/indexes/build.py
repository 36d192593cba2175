"""The verb `build_index`: a recipe and what it needs (a collection, vectors or a model) become an index artifact."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.artifact import CURRENT
from retrieval_kd.errors import OutputExistsError
from retrieval_kd.indexes.base import UPDATED_FROM, Index, IndexRecipe, Shape
from retrieval_kd.indexes.generations import locked
from retrieval_kd.indexes.inputs import (
    check_arguments,
    check_layout,
    inputs_of,
    open_collection,
    open_source,
    with_collection,
)
from retrieval_kd.indexes.segments import check_shards, write_index
from retrieval_kd.plan import Plan
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import implementation

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

GENERATION = "gen-000001"


def build_index(
    recipe: str | Path,
    *,
    collection: str | Path | Collection | None = None,
    vectors: str | Path | Vectors | None = None,
    model: str | Path | None = None,
    queries: str | Path | Vectors | None = None,
    scores: Sequence[str | Path] = (),
    shards: int | None = None,
    out: str | Path,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> Index:
    """The index artifact at ``out``, built as ``recipe`` says; an index that is there already is returned.

    A text index (bm25) needs ``collection``. The others need ``vectors``, or ``model`` and ``collection``: then it
    encodes into ``OUT.vectors`` beside the index first. An index that learns takes vectors of ``queries`` and a
    teacher's ``scores``. ``shards`` pieces are built one after the other; a build that was killed goes on after the
    last whole one. Raises `UsageError` for other combinations, vectors of another layout among them, and
    `ArtifactError` when the vectors are not those of the collection's documents.
    """
    out = Path(out)
    parsed, engine = _open_recipe(recipe, shards, overrides)
    given = {"collection": collection, "vectors": vectors, "model": model}
    check_arguments(parsed.kind, engine, **given, queries=queries, scores=scores or None)
    opened = open_collection(collection)
    if model is not None and opened is not None:
        from retrieval_kd.models.encode import encode
        from retrieval_kd.models.encoders import open_encoder

        encoder = open_encoder(model)
        check_layout(parsed.kind, engine.takes, encoder.layout, f"model '{encoder.source.name}'")
        vectors = encode(encoder, opened, out.with_name(out.name + ".vectors"), force=force)
    source = open_source(parsed.kind, engine, opened, vectors, queries, scores)
    check_shards(parsed.shards, len(source.ids))
    plan = Plan("index", parsed.resolved(), inputs_of(source))
    if plan.finished(out, force=force):
        index = Index.load(out)
        if UPDATED_FROM not in index.manifest.details:
            return index
        if not force:
            raise OutputExistsError(f"{out} exists and was updated since it was built; pass --force to build it anew")
    resumable = engine.resumable or parsed.shards > 1
    # what an update wrote meanwhile would be lost
    replaced = locked(out) if force and (out / CURRENT).is_file() else nullcontext()
    with replaced, plan.write(out, force=force, generation=GENERATION, resumable=resumable) as draft:
        write_index(engine, parsed, with_collection(source), draft)
        facts = draft.counts["documents"], draft.details["bytes"], draft.details["build_seconds"]
    log.info("%s: %s documents, %.1f bytes each, %.1f s", out, f"{facts[0]:,}", facts[1] / max(facts[0], 1), facts[2])
    return Index.load(out)


def estimate_index(
    recipe: str | Path,
    *,
    collection: str | Path | Collection | None = None,
    vectors: str | Path | Vectors | None = None,
    model: str | Path | None = None,
    queries: str | Path | Vectors | None = None,
    scores: Sequence[str | Path] = (),
    shards: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What `build_index` would make of the same arguments: the resolved recipe and its cost, without building.

    Keys: ``recipe``, ``documents``, ``dimension`` (None for text), ``bytes_per_document`` and ``bytes``.
    """
    parsed, engine = _open_recipe(recipe, shards, overrides)
    given = {"collection": collection, "vectors": vectors, "model": model}
    check_arguments(parsed.kind, engine, **given, queries=queries, scores=scores or None)
    opened = open_collection(collection)
    source = open_source(parsed.kind, engine, opened, vectors, queries, scores)
    documents = len(source.ids)
    check_shards(parsed.shards, documents)
    shape = None if source.vectors is None else _shape_of(source.vectors)
    if model is not None and opened is not None:
        shape = _shape_of_model(parsed.kind, engine.takes, model, opened)
    of = opened if shape is None else shape
    assert of is not None, "a text index was refused without a collection"
    each, besides = engine.estimate(parsed, of)
    return {
        "recipe": parsed.resolved(),
        "documents": documents,
        "dimension": None if shape is None else shape.dimension,
        "bytes_per_document": round(each, 1),
        "bytes": round(each * documents) + besides * parsed.shards,
    }


def _open_recipe(recipe: str | Path, shards: int | None, overrides: Sequence[str]) -> tuple[IndexRecipe, type[Index]]:
    changes = [*overrides, *([] if shards is None else [f"shards={shards}"])]
    parsed = load_recipe(str(recipe), "indexes", changes)
    assert isinstance(parsed, IndexRecipe)
    return parsed, implementation("indexes", parsed.kind)


def _shape_of(vectors: Vectors) -> Shape:
    numbers = 2 if vectors.manifest.details.get("dtype") == "float16" else 4
    return Shape(vectors.dimension, float(vectors.lengths.mean()) if len(vectors) else 0.0, numbers)


def _shape_of_model(kind: str, takes: str, model: str | Path, collection: Collection) -> Shape:
    from retrieval_kd.models.encode import estimate_encode
    from retrieval_kd.models.encoders import open_encoder

    encoder = open_encoder(model)
    check_layout(kind, takes, encoder.layout, f"model '{encoder.source.name}'")
    expected = estimate_encode(encoder, collection)
    return Shape(expected["dimension"], expected["entries_per_vector"])
