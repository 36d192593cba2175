"""``flagembedding``: ``query``, ``pos``, ``neg`` (texts), ``pos_scores``, ``neg_scores``; JSONL (or Parquet).

FlagEmbedding reads its keys by name, so that ids are kept in ``query_id``, ``pos_ids`` and ``neg_ids`` beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.score_formats.export import Export
from retrieval_kd.data.score_formats.lines import json_line, writing
from retrieval_kd.data.score_formats.pairs import Pairs, Row, batches, identifier, items, string
from retrieval_kd.data.score_formats.records import read_records

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source


def read(source: Source) -> Iterator[Pairs]:
    """The pairs of each line, positives first; ids where the line has them, else those of its texts."""
    return batches(source, _rows(source))


def write(export: Export) -> None:
    """Every query that has positives and negatives."""
    with writing(export.file()) as file:
        for row, positives, negatives in export.divided():
            record: dict[str, Any] = {"query": export.query_text(row.query_id)}
            sides = {"pos": positives, "neg": negatives}
            ids = {side: [row.doc_ids[i] for i in which.tolist()] for side, which in sides.items()}
            record |= {side: export.doc_texts(ids[side]) for side in sides}
            record |= {f"{side}_scores": row.scores[which] for side, which in sides.items()}
            record |= {"query_id": row.query_id} | {f"{side}_ids": ids[side] for side in sides}
            file.write(json_line(record))


def _rows(source: Source) -> Iterator[Row]:
    for number, record in read_records(source):
        place = source.place(number)
        if "query_id" in record:
            query_id = identifier(record["query_id"], "query_id", place)
        else:
            query_id = source.texts.query_id(string(record.get("query"), "query", place), place)
        doc_ids: list[str] = []
        scores: list[Any] = []
        for side in ("pos", "neg"):
            if f"{side}_ids" in record:
                doc_ids += [identifier(one, "document id", place) for one in items(record, f"{side}_ids", place)]
            else:
                texts = [string(text, side, place) for text in items(record, side, place)]
                doc_ids += [source.texts.doc_id(text, place) for text in texts]
            scores += items(record, f"{side}_scores", place)
        yield Row(number, query_id, doc_ids, scores)
