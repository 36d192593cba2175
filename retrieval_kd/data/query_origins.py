"""Where synthetic queries come from: the document, or the line of a query log, each was made from, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retrieval_kd.errors import first

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

FILE = "origins.parquet"


class QueryOrigin(NamedTuple):
    """One source of a query; a query that several documents gave has one for each."""

    query_id: str
    split: str
    kind: str
    """The kind of the recipe that made it: ``title``, ``seq2seq``, ``query-log`` and so on."""
    doc_id: str | None
    """The document; None for a query log."""
    line: int | None
    """The line of the query log, counted from 1; None for a document."""
    model: str | None
    """The model that wrote it, None where none did."""
    prompt_sha256: str | None
    """Hash of the prompt that the model was given."""


def write_origins(folder: Path, origins: Sequence[QueryOrigin]) -> None:
    """Writes ``origins.parquet`` into a collection's folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(zip(*origins, strict=True)) or [()] * len(QueryOrigin._fields)
    fields = [(name, pa.int64() if name == "line" else pa.string()) for name in QueryOrigin._fields]
    arrays = [pa.array(column, kind) for column, (_, kind) in zip(columns, fields, strict=True)]
    pq.write_table(pa.table(arrays, schema=pa.schema(fields)), folder / FILE)


def read_origins(folder: Path) -> list[QueryOrigin]:
    """The origins of a collection's synthetic queries, in the order they were written; none where none were made."""
    import pyarrow.parquet as pq

    if not (folder / FILE).is_file():
        return []
    table: Any = pq.read_table(folder / FILE, memory_map=True, partitioning=None)
    columns = [table[name].to_pylist() for name in QueryOrigin._fields]
    return [QueryOrigin(*row) for row in zip(*columns, strict=True)]


def origin_problems(collection: Collection) -> list[str]:
    """Synthetic queries that cannot be traced, and origins of what is not there, in words."""
    origins = collection.origins
    texts = collection.queries("all")
    found = []
    if unknown := sorted({origin.query_id for origin in origins} - texts.keys()):
        found.append(f"{FILE} names {len(unknown)} unknown query ids: {first(unknown)}")
    documents = list(dict.fromkeys(origin.doc_id for origin in origins if origin.doc_id is not None))
    if missing := [doc_id for doc_id in documents if not collection.documents.known(doc_id)]:
        found.append(f"{FILE} names {len(missing)} unknown document ids: {first(missing)}")
    if untraced := [origin.query_id for origin in origins if (origin.doc_id is None) == (origin.line is None)]:
        found.append(f"{FILE}: {len(untraced)} queries come from neither a document nor a line: {first(untraced)}")
    for split in dict.fromkeys(origin.split for origin in origins):
        of_split = [origin for origin in origins if origin.split == split]
        if split in collection.unjudged_splits:
            continue
        if split not in collection.splits:
            found.append(f"{FILE} names a split '{split}' that is not there")
            continue
        qrels = collection.qrels(split)
        unlinked = [o.query_id for o in of_split if qrels.get(o.query_id, {}).get(str(o.doc_id), 0) < 1]
        if unlinked:
            found.append(f"qrels of split {split} lack the document of {len(unlinked)} queries: {first(unlinked)}")
        if without := sorted(qrels.keys() - {origin.query_id for origin in of_split}):
            found.append(f"{FILE} lacks {len(without)} queries of split {split}: {first(without)}")
    return found
