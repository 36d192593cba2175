"""The verb `build_index`: a recipe and what it needs (a collection, vectors or a model) become an index artifact."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.artifact import InputRef, Plan
from retrieval_kd.errors import ArtifactError, UsageError
from retrieval_kd.indexes.base import Index, Shape, Source
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import INDEXES, implementation

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.recipe import Recipe

log = logging.getLogger("retrieval_kd")

GENERATION = "gen-000001"


def build_index(
    recipe: str | Path,
    *,
    collection: str | Path | Collection | None = None,
    vectors: str | Path | Vectors | None = None,
    model: str | Path | None = None,
    out: str | Path,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> Index:
    """The index artifact at ``out``, built as ``recipe`` says; an index that is there already is returned.

    A text index (bm25) needs ``collection``. The others need ``vectors``, or ``model`` and ``collection``: then it
    encodes into ``OUT.vectors`` beside the index first. Raises `UsageError` for other combinations, vectors of another
    layout among them, and `ArtifactError` when the vectors are not those of the collection's documents.
    """
    out = Path(out)
    parsed = load_recipe(str(recipe), "indexes", overrides)
    engine: type[Index] = implementation("indexes", parsed.kind)
    _check_arguments(parsed.kind, engine.takes, collection=collection, vectors=vectors, model=model)
    opened = _collection(collection)
    if model is not None and opened is not None:
        from retrieval_kd.models.encode import encode
        from retrieval_kd.models.encoders import open_encoder

        encoder = open_encoder(model)
        _check_layout(parsed.kind, engine.takes, encoder.layout, f"model '{encoder.source.name}'")
        vectors = encode(encoder, opened, out.with_name(out.name + ".vectors"), force=force)
    source = Source(opened, _vectors(vectors))
    _check_vectors(parsed.kind, engine.takes, source.vectors)
    plan = Plan("index", parsed.resolved(), _inputs(source))
    if plan.finished(out, force=force):
        return Index.load(out)
    _write(engine, parsed, source, plan, out, force=force)
    return Index.load(out)


def estimate_index(
    recipe: str | Path,
    *,
    collection: str | Path | Collection | None = None,
    vectors: str | Path | Vectors | None = None,
    model: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What `build_index` would make of the same arguments: the resolved recipe and its cost, without building.

    Keys: ``recipe``, ``documents``, ``dimension`` (None for text), ``bytes_per_document`` and ``bytes``.
    """
    parsed = load_recipe(str(recipe), "indexes", overrides)
    engine: type[Index] = implementation("indexes", parsed.kind)
    _check_arguments(parsed.kind, engine.takes, collection=collection, vectors=vectors, model=model)
    opened = _collection(collection)
    given = _vectors(vectors)
    _check_vectors(parsed.kind, engine.takes, given)
    _inputs(Source(opened, given))
    documents = len(opened.documents) if given is None and opened is not None else len(given or ())
    shape = _shape_of(given) if given is not None else None
    if model is not None and opened is not None:
        shape = _shape_of_model(parsed.kind, engine.takes, model, opened)
    source = opened if shape is None else shape
    assert source is not None, "a text index was refused without a collection"
    each, besides = engine.estimate(parsed, source)
    return {
        "recipe": parsed.resolved(),
        "documents": documents,
        "dimension": None if shape is None else shape.dimension,
        "bytes_per_document": round(each, 1),
        "bytes": round(each * documents) + besides,
    }


def _write(engine: type[Index], recipe: Recipe, source: Source, plan: Plan, out: Path, *, force: bool) -> None:
    began = time.perf_counter()
    with plan.write(out, force=force, generation=GENERATION) as draft:
        engine.build(recipe, source, draft)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in draft.path.rglob("*") if path.is_file())
        draft.details.update(build_seconds=round(seconds, 3), bytes=size)
        documents = draft.counts["documents"]
    log.info("%s: %s documents, %.1f bytes each, %.1f s", out, f"{documents:,}", size / max(documents, 1), seconds)


def _check_arguments(kind: str, takes: str, **given: object) -> None:
    names = {name for name, value in given.items() if value is not None}
    got = ", ".join(sorted(names)) or "nothing"
    if takes == "text" and names != {"collection"}:
        raise UsageError(f"a {kind} index reads text and needs a collection, no vectors or model (got {got})")
    fits = names in ({"vectors"}, {"vectors", "collection"}, {"model", "collection"})
    if takes != "text" and not fits:
        raise UsageError(f"a {kind} index needs vectors, or a model and a collection to encode (got {got})")


def _collection(spec: str | Path | Collection | None) -> Collection | None:
    from retrieval_kd.data.sources import open_collection

    return None if spec is None else open_collection(spec)


def _vectors(spec: str | Path | Vectors | None) -> Vectors | None:
    from retrieval_kd.data.vectors import Vectors

    return Vectors.load(spec) if isinstance(spec, str | Path) else spec


def _check_vectors(kind: str, takes: str, vectors: Vectors | None) -> None:
    if vectors is not None:
        _check_layout(kind, takes, vectors.layout, str(vectors.path))


def _check_layout(kind: str, takes: str, layout: str, what: str) -> None:
    """Raises `UsageError` unless an index of this kind takes vectors of ``layout``."""
    if takes != layout:
        fitting = [name for name in INDEXES if implementation("indexes", name).takes == layout]
        raise UsageError(
            f"{what}: gives {layout} vectors, a {kind} index takes {takes} ones; "
            f"take an index of kind {' or '.join(fitting)}"
        )


def _shape_of(vectors: Vectors) -> Shape:
    numbers = 2 if vectors.manifest.details.get("dtype") == "float16" else 4
    return Shape(vectors.dimension, float(vectors.lengths.mean()) if len(vectors) else 0.0, numbers)


def _shape_of_model(kind: str, takes: str, model: str | Path, collection: Collection) -> Shape:
    from retrieval_kd.models.encode import estimate_encode
    from retrieval_kd.models.encoders import open_encoder

    encoder = open_encoder(model)
    _check_layout(kind, takes, encoder.layout, f"model '{encoder.source.name}'")
    expected = estimate_encode(encoder, collection)
    return Shape(expected["dimension"], expected["entries_per_vector"])


def _inputs(source: Source) -> Mapping[str, InputRef]:
    """The artifact's inputs, after checking that vectors and collection belong together."""
    vectors, collection = source.vectors, source.collection
    inputs = {} if collection is None else {"collection": collection.ref()}
    if vectors is None:
        return inputs
    if vectors.of != "documents":
        raise ArtifactError(f"{vectors.path}: these are vectors of {vectors.of}; an index needs those of documents")
    encoded = vectors.manifest.inputs["collection"]
    if collection is not None and collection.fingerprint != encoded["fingerprint"]:
        raise ArtifactError(
            f"{vectors.path}: made from another collection (fingerprint {encoded['fingerprint'][:12]}) "
            f"than {collection.path} ({collection.fingerprint[:12]}); encode this collection"
        )
    if collection is None:
        inputs["collection"] = _recorded(vectors, "collection")
    return {**inputs, "vectors": vectors.ref(), "model": vectors.model_ref}


def _recorded(vectors: Vectors, name: str) -> InputRef:
    """An input of the vectors as an input of the index: where it is now, else where it was."""
    entry = vectors.manifest.inputs[name]
    try:
        path: Path | None = vectors.locate(name)
    except ArtifactError:
        path = Path(entry["absolute"]) if "absolute" in entry else None
    return InputRef(entry["fingerprint"], path, entry.get("name"))
