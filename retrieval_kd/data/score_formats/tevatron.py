"""``tevatron``: ``query_id``, ``query``, ``positive_passages``, ``negative_passages``; JSONL (or Parquet).

A passage has ``docid``, ``title``, ``text`` and ``score``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.score_formats.export import Export
from retrieval_kd.data.score_formats.lines import json_line, writing
from retrieval_kd.data.score_formats.pairs import Pairs, Row, batches, identifier, items
from retrieval_kd.data.score_formats.records import read_records
from retrieval_kd.errors import DataError

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source

_SIDES = ("positive_passages", "negative_passages")


def read(source: Source) -> Iterator[Pairs]:
    """The pairs of each line, positives first, by their ids."""
    return batches(source, _rows(source))


def write(export: Export) -> None:
    """Every query that has positives and negatives."""
    assert export.collection is not None
    documents = export.collection.documents
    with writing(export.file()) as file:
        for row, positives, negatives in export.divided():
            rows = documents.rows(row.doc_ids)
            record: dict[str, Any] = {"query_id": row.query_id, "query": export.query_text(row.query_id)}
            for side, which in zip(_SIDES, (positives, negatives), strict=True):
                found = [(documents[int(rows[i])], row.scores[i]) for i in which.tolist()]
                record[side] = [
                    {"docid": document.id, "title": document.title, "text": document.text, "score": score}
                    for document, score in found
                ]
            file.write(json_line(record))


def _rows(source: Source) -> Iterator[Row]:
    for number, record in read_records(source):
        place = source.place(number)
        passages = [passage for side in _SIDES for passage in items(record, side, place)]
        for passage in passages:
            if not isinstance(passage, dict) or "docid" not in passage or "score" not in passage:
                raise DataError(f"{place}: a passage without 'docid' or 'score': {passage!r:.60}")
        query_id = identifier(record.get("query_id"), "query_id", place)
        doc_ids = [identifier(passage["docid"], "docid", place) for passage in passages]
        yield Row(number, query_id, doc_ids, [passage["score"] for passage in passages])
