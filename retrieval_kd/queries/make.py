"""The verb `queries`: a collection with the same documents and synthetic queries, each of which can be traced."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.query_origins import QueryOrigin
from retrieval_kd.errors import DataError, UsageError
from retrieval_kd.plan import Plan
from retrieval_kd.queries.base import DocumentQueryMaker, QueriesRecipe, QueryMaker
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import implementation

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

_TOLD = (
    "documents_without_query",
    "too_short",
    "too_long",
    "duplicates",
    "invalid_unicode",
    "no_letter_or_digit",
    "equal_to_kept_queries",
    "truncated_documents",
    "malformed_answers",
    "refused_documents",
)
"""The counts that are said when they are not 0."""


@dataclass
class _Query:
    """A query and what it comes from: (document, line of a log), each once."""

    text: str
    sources: dict[tuple[str | None, int | None], None] = field(default_factory=dict)


def make_queries(
    recipe: str,
    *,
    collection: str | Path | Collection,
    out: str | Path,
    query_log: str | Path | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> Collection:
    """The collection at ``out``: the documents of ``collection``, its other splits, and the split of synthetic queries.

    Queries that are equal but for case and white space are one, linked to all their documents. `Collection.origins`
    says where each comes from. ``query_log`` is the file that ``kind: query-log`` reads. Raises `InputError` when the
    split is there already (``replace``), `DataError` when no query is left.
    """
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.sources import open_collection
    from retrieval_kd.data.synthetic_collection import kept_queries, refuse_taken_split, write_with_synthetic

    out = Path(out)
    opened = open_collection(collection)
    maker = _maker(recipe, overrides, query_log)
    wanted = maker.recipe
    refuse_taken_split(opened, wanted.split, replace=wanted.replace)
    identity = {"source": opened.name, "sample": None, "queries": wanted.identity()}
    plan = Plan("collection", identity, {"collection": opened.ref(), **maker.refs()})
    if plan.finished(out, force=force):
        return Collection.load(out)
    with plan.write(out, force=force, resumable=maker.resumable) as draft:
        found, counts = _collected(maker, opened, draft.work)
        kept = {_key(text) for text in kept_queries(opened, wanted.split).values()}
        counts["equal_to_kept_queries"] = len(found.keys() & kept)
        queries = {f"{wanted.split}-{wanted.kind}-{i}": query for i, query in enumerate(found.values())}
        origins = [
            QueryOrigin(query_id, wanted.split, wanted.kind, doc_id, line, maker.model, maker.prompt_sha256)
            for query_id, query in queries.items()
            for doc_id, line in query.sources
        ]
        texts = {query_id: query.text for query_id, query in queries.items()}
        write_with_synthetic(opened, draft, wanted.split, texts, origins, judged=maker.judged)
        former = opened.manifest.details.get("synthetic", {})
        draft.details["synthetic"] = {**former, wanted.split: {"kind": wanted.kind, **maker.details()}}
        draft.counts.update({"synthetic_queries": len(queries), **counts})
    for name in _TOLD:
        if counts.get(name):
            log.warning("%s: %s", name.replace("_", " "), f"{counts[name]:,}")
    return Collection.load(out)


def estimate_queries(
    recipe: str,
    *,
    collection: str | Path | Collection,
    query_log: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What `make_queries` would do: documents, the most queries they give, and what a model or an endpoint costs."""
    from retrieval_kd.data.sources import open_collection

    return _maker(recipe, overrides, query_log).estimate(open_collection(collection))


def _maker(recipe: str, overrides: Sequence[str], query_log: str | Path | None) -> QueryMaker:
    loaded = load_recipe(recipe, "queries", overrides)
    if not isinstance(loaded, QueriesRecipe):
        raise UsageError(f"{recipe}: not a recipe for queries")
    kind: type[QueryMaker] = implementation("queries", loaded.kind)
    return kind(loaded, None if query_log is None else Path(query_log))


def _collected(maker: QueryMaker, collection: Collection, work: Path) -> tuple[dict[str, _Query], dict[str, int]]:
    """The distinct queries that the recipe allows, in their order, and the counts of what was left out."""
    recipe = maker.recipe
    found: dict[str, _Query] = {}
    counts = Counter({"too_short": 0, "too_long": 0, "duplicates": 0})
    with_query = set()
    for raw in maker.raw(collection, work):
        words = raw.text.replace("\ufeff", "").split()  # a byte order mark is no part of a text
        text = " ".join(words)
        if len(words) < recipe.min_words:
            counts["too_short"] += 1
        elif recipe.max_words is not None and len(words) > recipe.max_words:
            counts["too_long"] += 1
        elif any("\ud800" <= sign <= "\udfff" for sign in text):  # half a sign, which JSON can spell
            counts["invalid_unicode"] += 1
        elif not any(sign.isalnum() for sign in text):
            counts["no_letter_or_digit"] += 1
        else:
            counts["duplicates"] += _key(text) in found
            found.setdefault(_key(text), _Query(text)).sources[raw.doc_id, raw.line] = None
            with_query.add(raw.doc_id)
    counts.update(maker.counts)
    if isinstance(maker, DocumentQueryMaker):
        counts["documents_without_query"] = counts["documents_read"] - len(with_query)
    if not found:
        said = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in sorted(counts.items()) if n)
        raise DataError(f"{collection.path}: kind '{recipe.kind}' made no query ({said or 'nothing to read'})")
    return found, dict(sorted(counts.items()))


def _key(text: str) -> str:
    """What equal queries have in common."""
    return " ".join(text.split()).casefold()
