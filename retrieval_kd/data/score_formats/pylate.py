"""``pylate``: ``query_id``, ``document_ids``, ``scores``; one row a query, Parquet or JSON Lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.score_formats.export import Export
from retrieval_kd.data.score_formats.lines import parsed
from retrieval_kd.data.score_formats.pairs import Number, Pairs, Row, batches, identifier, items
from retrieval_kd.data.score_formats.records import SCORES, STRING, STRINGS, read_records, record_writer
from retrieval_kd.errors import DataError

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source


def read(source: Source) -> Iterator[Pairs]:
    """The pairs of each row. Lists may also be the text of a list, as in the published files."""
    return batches(source, _rows(source))


def write(export: Export) -> None:
    """Every query; given a collection, also the texts: ``STEM.queries.SUFFIX`` and ``STEM.documents.SUFFIX``."""
    main = export.file()
    if export.collection is not None:
        _write_texts(export)
    columns = {"query_id": STRING, "document_ids": STRINGS, "scores": SCORES}
    with record_writer(main, columns) as add:
        for row in export.scores:
            add({"query_id": row.query_id, "document_ids": row.doc_ids, "scores": row.scores})


def _rows(source: Source) -> Iterator[Row]:
    for number, record in read_records(source):
        place = source.place(number)
        query_id = identifier(record.get("query_id"), "query_id", place)
        doc_ids = [identifier(one, "document id", place) for one in _list(record, "document_ids", place)]
        yield Row(number, query_id, doc_ids, _list(record, "scores", place))


def _list(record: dict[str, Any], key: str, place: str) -> list[Any]:
    value = record.get(key)
    if isinstance(value, str) and not isinstance(value, Number):
        try:
            record = {key: parsed(value)}
        except ValueError as error:
            raise DataError(f"{place}: '{key}' is the text {value!r:.40}, which is no JSON list ({error})") from error
    return items(record, key, place)


def _write_texts(export: Export) -> None:
    """The queries and documents that occur, under the names that pylate's ``KDProcessing`` reads."""
    import numpy as np

    assert export.collection is not None
    documents = export.collection.documents
    occurs = np.zeros(len(documents), dtype=bool)
    with record_writer(export.file("queries"), {"query_id": STRING, "text": STRING}) as add:
        for row in export.scores:
            add({"query_id": row.query_id, "text": export.query_text(row.query_id)})
            occurs[documents.rows(row.doc_ids)] = True
    with record_writer(export.file("documents"), {"document_id": STRING, "text": STRING}) as add:
        for number in np.flatnonzero(occurs).tolist():
            add({"document_id": documents.id(number), "text": documents.text(number)})
