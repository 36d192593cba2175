"""Writes a collection that has another one's documents and, beside its other splits, a split of synthetic queries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from retrieval_kd.data.collection import ALL, Collection
from retrieval_kd.data.collection_writer import write_qrels, write_queries
from retrieval_kd.data.query_origins import QueryOrigin, write_origins
from retrieval_kd.errors import DataError, InputError, first
from retrieval_kd.plan import Draft

_DOCUMENT_FILES = ("documents.arrow", "lookup.npy")
_DOCUMENT_COUNTS = ("documents", "empty_documents", "duplicate_texts", "repeated_qrels")


def refuse_taken_split(source: Collection, split: str, *, replace: bool) -> None:
    """Raises `InputError` when ``source`` has the split already and it is not to be replaced."""
    if not replace and split in [*source.splits, *source.unjudged_splits]:
        raise InputError(
            f"{source.path}: has a split '{split}' already; make another one (--set split=synthetic), "
            "or put the synthetic queries in its place (--set replace=true)"
        )


def kept_queries(source: Collection, split: str) -> dict[str, str]:
    """The queries (id → text) of ``source`` that stay: all but those that only ``split`` has."""
    if split not in [*source.splits, *source.unjudged_splits]:
        return source.queries(ALL)
    elsewhere = {query_id for name in _other_splits(source, split) for query_id in source.queries(name)}
    gone = source.queries(split).keys() - elsewhere
    return {query_id: text for query_id, text in source.queries(ALL).items() if query_id not in gone}


def write_with_synthetic(
    source: Collection,
    draft: Draft,
    split: str,
    queries: Mapping[str, str],
    origins: Sequence[QueryOrigin],
    *,
    judged: bool,
) -> None:
    """Writes documents, queries, qrels and origins into ``draft``, with their counts.

    The documents' files are linked where the file system can, else copied. ``judged`` makes each query's documents
    its relevant ones (1). Raises `DataError` when a synthetic query has the id of one that stays.
    """
    kept = kept_queries(source, split)
    if taken := [query_id for query_id in queries if query_id in kept]:
        raise DataError(f"{source.path}: {len(taken)} query ids are taken: {first(taken)}; choose another split")
    for name in _DOCUMENT_FILES:
        _link(source.path / name, draft.path / name)
    draft.counts.update({name: n for name, n in source.manifest.counts.items() if name in _DOCUMENT_COUNTS})
    write_queries(draft, {**kept, **queries})
    splits = [name for name in source.splits if name != split]
    unjudged = [name for name in source.unjudged_splits if name != split]
    for name in splits:
        _link(source.path / "qrels" / f"{name}.parquet", draft.path / "qrels" / f"{name}.parquet")
        draft.counts[f"qrels_{name}"] = source.manifest.counts[f"qrels_{name}"]
    if judged:
        qrels: dict[str, dict[str, int]] = {}
        for origin in origins:
            qrels.setdefault(origin.query_id, {})[str(origin.doc_id)] = 1
        write_qrels(draft, split, qrels)
        splits.append(split)
    else:
        unjudged.append(split)
    write_origins(draft.path, [*(origin for origin in source.origins if origin.split != split), *origins])
    draft.details.update({**source.manifest.details, "splits": splits, "unjudged_splits": unjudged})


def _other_splits(source: Collection, split: str) -> list[str]:
    return [name for name in [*source.splits, *source.unjudged_splits] if name != split]


def _link(file: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, place)
