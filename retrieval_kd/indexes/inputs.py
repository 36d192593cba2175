"""What an index is built from: opened, and refused where it does not fit the engine or one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_kd.artifact import Artifact, InputRef
from retrieval_kd.errors import ArtifactError, UsageError
from retrieval_kd.indexes.base import Index, Source
from retrieval_kd.registry import INDEXES, implementation

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors


def check_arguments(kind: str, engine: type[Index], **given: object) -> None:
    """Raises `UsageError` unless the engine can be built from what was ``given`` (None is not given)."""
    names = {name for name, value in given.items() if value is not None}
    learned = names & {"queries", "scores"}
    needed = names - learned
    got = ", ".join(sorted(needed)) or "nothing"
    if engine.takes == "text" and needed != {"collection"}:
        raise UsageError(f"a {kind} index reads text and needs a collection, no vectors or model (got {got})")
    fits = needed in ({"vectors"}, {"vectors", "collection"}, {"model", "collection"})
    if engine.takes != "text" and not fits:
        raise UsageError(f"a {kind} index needs vectors, or a model and a collection to encode (got {got})")
    unused = sorted(learned - engine.learns_from)
    if unused:
        what = "learns nothing" if not engine.learns_from else f"learns from {' and '.join(sorted(engine.learns_from))}"
        raise UsageError(f"a {kind} index {what}; leave out {' and '.join(f'--{name}' for name in unused)}")


def check_layout(kind: str, takes: str, layout: str, what: str) -> None:
    """Raises `UsageError` unless an index of this kind takes vectors of ``layout``."""
    if takes != layout:
        fitting = [name for name in INDEXES if implementation("indexes", name).takes == layout]
        raise UsageError(
            f"{what}: gives {layout} vectors, a {kind} index takes {takes} ones; "
            f"take an index of kind {' or '.join(fitting)}"
        )


def open_source(
    kind: str,
    engine: type[Index],
    collection: Collection | None,
    vectors: str | Path | Vectors | None,
    queries: str | Path | Vectors | None = None,
    scores: Sequence[str | Path] = (),
) -> Source:
    """The inputs of a build, opened and checked.

    Raises `UsageError` for vectors of another layout, `ArtifactError` for those of another collection than given, for
    queries by another model, and for scores of another collection.
    """
    from retrieval_kd.data.scores import Scores

    opened = open_vectors(vectors)
    if opened is not None:
        check_layout(kind, engine.takes, opened.layout, str(opened.path))
        _check_documents(opened, collection)
    asked = open_vectors(queries)
    if asked is not None and opened is not None:
        _check_queries(asked, opened)
    files = [Scores.load(path) for path in scores]
    known = {part.manifest.inputs["collection"]["fingerprint"] for part in (opened, asked) if part is not None}
    for file in files:
        if file.manifest.inputs.get("collection", {}).get("fingerprint") not in known:
            raise ArtifactError(f"{file.path}: these scores are of another collection than the vectors")
    return Source(collection, opened, asked, files)


def with_collection(source: Source) -> Source:
    """``source`` with the collection of its vectors, if none was given and it is still where they say."""
    from retrieval_kd.data.collection import Collection

    if source.collection is not None or source.vectors is None:
        return source
    try:
        return replace(source, collection=Collection.load(source.vectors.locate("collection")))
    except ArtifactError:
        return source


def inputs_of(source: Source) -> dict[str, InputRef]:
    """The inputs that the manifest of an index of ``source`` names."""
    inputs = {} if source.collection is None else {"collection": source.collection.ref()}
    if source.vectors is not None:
        if source.collection is None:
            inputs["collection"] = recorded(source.vectors, "collection")
        inputs |= {"vectors": source.vectors.ref(), "model": source.vectors.model_ref}
    if source.queries is not None:
        inputs["queries"] = source.queries.ref()
    return inputs | numbered("scores", [file.ref() for file in source.scores])


def numbered(name: str, refs: Sequence[InputRef]) -> dict[str, InputRef]:
    """Inputs of one kind by name: ``scores``, ``scores_2`` and so on."""
    return {name if i == 0 else f"{name}_{i + 1}": ref for i, ref in enumerate(refs)}


def recorded(artifact: Artifact, name: str) -> InputRef:
    """An input of an artifact as an input of the index made from it: where it is now, else where it was."""
    entry = artifact.manifest.inputs[name]
    try:
        path: Path | None = artifact.locate(name)
    except ArtifactError:
        path = Path(entry["absolute"]) if "absolute" in entry else None
    return InputRef(entry["fingerprint"], path, entry.get("name"))


def open_collection(spec: str | Path | Collection | None) -> Collection | None:
    """The collection that ``spec`` names, or None."""
    from retrieval_kd.data import sources

    return None if spec is None else sources.open_collection(spec)


def open_vectors(spec: str | Path | Vectors | None) -> Vectors | None:
    """The vectors at ``spec``, or None."""
    from retrieval_kd.data.vectors import Vectors

    return Vectors.load(spec) if isinstance(spec, str | Path) else spec


def _check_documents(vectors: Vectors, collection: Collection | None) -> None:
    if vectors.of != "documents":
        raise ArtifactError(f"{vectors.path}: these are vectors of {vectors.of}; an index needs those of documents")
    encoded = vectors.manifest.inputs["collection"]["fingerprint"]
    if collection is not None and collection.fingerprint != encoded:
        raise ArtifactError(
            f"{vectors.path}: made from another collection (fingerprint {encoded[:12]}) "
            f"than {collection.path} ({collection.fingerprint[:12]}); encode this collection"
        )


def _check_queries(queries: Vectors, documents: Vectors) -> None:
    if queries.of != "queries":
        raise ArtifactError(f"{queries.path}: these are vectors of {queries.of}; encode a split with --queries SPLIT")
    if documents.model_ref.fingerprint not in queries.stands_for:
        raise ArtifactError(f"{queries.path}: these queries were encoded by another model than {documents.path}")
