"""The verb `search_run`: the hits of a whole split of queries, as a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import ArtifactError, InputError, UsageError, first
from retrieval_kd.models.load import find_model
from retrieval_kd.plan import Plan
from retrieval_kd.progress import progress
from retrieval_kd.search.searcher import Searcher, check_collection, hits_of

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.run import Run
    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.indexes.base import Index

log = logging.getLogger("retrieval_kd")

_BATCH = 256

Hits = tuple[list[list[str]], list[np.ndarray]]


def search_run(
    index: str | Path | Index,
    collection: str | Path | Collection,
    split: str,
    out: str | Path,
    *,
    k: int = 100,
    model: str | Path | None = None,
    vectors: str | Path | None = None,
    search: Mapping[str, Any] | None = None,
    filters: Sequence[str] = (),
    force: bool = False,
) -> Run:
    """The run of the queries of ``split``: at most ``k`` hits each, written to ``out`` (plain TREC for ``X.trec``).

    ``vectors`` of these queries by the index's model spare their encoding. Hits fulfil all ``filters`` on attributes
    of the documents (``year >= 2020``). Queries without a hit are counted in the manifest and named on the log. Raises
    `ArtifactError` when the index was built from another collection or the vectors do not fit, `InputError` for an
    unknown or empty split.
    """
    from retrieval_kd.data.run import Run
    from retrieval_kd.data.sources import open_collection
    from retrieval_kd.indexes.base import Index

    out = Path(out)
    if k < 1:
        raise UsageError(f"k is the number of hits wanted and at least 1 (got {k})")
    opened = open_collection(collection)
    queries = opened.queries(split)
    if not queries:
        raise InputError(f"{opened.path}: split '{split}' has no queries")
    if vectors is not None and model is not None:
        raise UsageError("vectors are of queries that are encoded already: give them, or a model, not both")
    if isinstance(index, Index) and search:
        raise UsageError("search parameters are set when an index is loaded; give its path")
    loaded = index if isinstance(index, Index) else Index.load(index, search=search)
    check_collection(loaded, opened)
    recipe = {"kind": "search", "split": split, "k": k, "search": loaded.search_values}
    if filters:
        recipe["filters"] = list(filters)
    inputs = {"index": loaded.ref(), "collection": opened.ref()}
    if model is not None and loaded.takes != "text":
        given = find_model(model).ref()
        if given.fingerprint != loaded.manifest.inputs["model"]["fingerprint"]:
            inputs["model"] = given  # an exported one: its hits are its own
    ready = None
    if vectors is not None:
        ready = _query_vectors(vectors, loaded, opened, split)
        inputs["vectors"] = ready.ref()
    if out.suffix != ".trec" and Plan("run", recipe, inputs).finished(out, force=force):
        return Run.load(out)
    if ready is not None:
        depth = min(k, len(loaded))
        vectors_of, allowed = ready.rows, loaded.matching(filters)
        doc_ids, scores = _hits(
            lambda start, stop: _search_vectors(loaded, vectors_of(start, stop), depth, allowed), len(queries)
        )
    else:
        searcher, texts = Searcher.load(loaded, model=model, collection=opened), list(queries.values())
        doc_ids, scores = _hits(
            lambda start, stop: searcher.search_many(texts[start:stop], k, filters=filters), len(queries)
        )
    without = [query_id for query_id, found in zip(queries, doc_ids, strict=True) if not found]
    if without:
        log.warning("%s of %s queries have no hit: %s", len(without), len(queries), first(without))
    run = Run.from_hits(list(queries), doc_ids, scores)
    details = {"queries": len(queries), "queries_without_hits": len(without)}
    run.save(out, recipe=recipe, inputs=inputs, details=details, force=force)
    return Run.load(out)


def _hits(search: Callable[[int, int], Hits], queries: int) -> Hits:
    doc_ids: list[list[str]] = []
    scores: list[np.ndarray] = []
    with progress(f"searching {queries:,} queries", queries) as advance:
        for start in range(0, queries, _BATCH):
            batch_ids, batch_scores = search(start, min(start + _BATCH, queries))
            doc_ids += batch_ids
            scores += batch_scores
            advance(len(batch_ids))
    return doc_ids, scores


def _search_vectors(index: Index, vectors: Any, k: int, allowed: np.ndarray | None) -> Hits:
    scores, rows = index.search(vectors, k, allowed)
    return hits_of(index, scores, rows)


def _query_vectors(path: str | Path, index: Index, collection: Collection, split: str) -> Vectors:
    """The vectors at ``path``, which must be of this split's queries, by the index's model."""
    from retrieval_kd.data.vectors import Vectors

    vectors = Vectors.load(path)
    if vectors.of != "queries" or vectors.split != split:
        raise UsageError(
            f"{path}: these are vectors of {vectors.split or 'documents'}, not of the queries of '{split}'"
        )
    if index.manifest.inputs.get("model", {}).get("fingerprint") not in vectors.stands_for:
        raise ArtifactError(f"{path}: these vectors were made by another model than the index's")
    if vectors.manifest.inputs["collection"]["fingerprint"] != collection.fingerprint:
        raise ArtifactError(f"{path}: these vectors are of another collection")
    if vectors.ids != list(collection.queries(split)):
        raise ArtifactError(
            f"{path}: these vectors are not of all queries of '{split}' in their order; encode them again"
        )
    return vectors
