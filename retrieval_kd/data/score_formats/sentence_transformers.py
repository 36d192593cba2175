"""``sentence-transformers``: query, positive, negative_1 … negative_n and ``label`` with n+1 scores; Parquet or JSONL.

Columns are read by position, as sentence-transformers does; the label is the column it takes for one. A file with
margins in its label is refused: a score file holds scores.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.score_formats.export import Divided, Export
from retrieval_kd.data.score_formats.pairs import Pairs, Row, batches, identifier, string
from retrieval_kd.data.score_formats.records import SCORES, STRING, read_records, record_writer
from retrieval_kd.errors import DataError

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source

log = logging.getLogger("retrieval_kd")

_LABELS = ("label", "labels", "score", "scores")
_ID_COLUMN = re.compile(r".*_id(_\d+)?")


def read(source: Source) -> Iterator[Pairs]:
    """The pairs of each row, by id when every column's name ends in ``_id`` (or ``_id_1`` …), else by text."""
    return batches(source, _rows(source))


def write(export: Export) -> None:
    """A row for each positive and each ``negatives`` negatives of a query, so that none of its documents is lost.

    ``negatives`` is by default the smallest number of negatives that a query has; queries with fewer are left out.
    The last row of a positive repeats negatives of the one before to be full. So a query weighs as much in training
    as it has rows. Counted are ``rows``, ``negatives_a_row``, ``repeated_documents`` (negatives that a last row
    repeats) and ``most_rows_a_query``.
    """
    width = export.negatives or min((len(found.negatives) for found in export.divided()), default=1)
    names = ["query", "positive", *(f"negative_{i}" for i in range(1, width + 1))]
    counts = export.counts
    with record_writer(export.file(), {**dict.fromkeys(names, STRING), "label": SCORES}) as add:
        for found in export.divided():
            if len(found.negatives) < width:
                export.left_out[found.row.query_id] = None
                continue
            for record in _records(export, found, width, names):
                add(record)
            rows = len(found.positives) * math.ceil(len(found.negatives) / width)
            counts["rows"] += rows
            counts["repeated_documents"] += rows * width - len(found.positives) * len(found.negatives)
            counts["most_rows_a_query"] = max(counts["most_rows_a_query"], rows)
    counts["negatives_a_row"] = width
    log.info(
        "%s: %s rows of %s queries; %s negatives a row, %s of them repeated to fill a row; a query has up to %s rows "
        "and weighs as much in training as it has rows",
        export.out,
        f"{counts['rows']:,}",
        f"{len(export.scores) - len(export.left_out):,}",
        f"{width:,}",
        f"{counts['repeated_documents']:,}",
        f"{counts['most_rows_a_query']:,}",
    )


def _records(export: Export, found: Divided, width: int, names: list[str]) -> Iterator[dict[str, Any]]:
    row, positives, negatives = found
    query, texts = export.query_text(row.query_id), export.doc_texts(row.doc_ids)
    for positive in positives.tolist():
        for start in range(0, len(negatives), width):
            start = min(start, len(negatives) - width)
            which = [positive, *negatives[start : start + width].tolist()]
            values = [query, *(texts[i] for i in which)]
            yield {**dict(zip(names, values, strict=True)), "label": row.scores[which]}


def _rows(source: Source) -> Iterator[Row]:
    for number, record in read_records(source):
        place = source.place(number)
        labels = [name for name in _LABELS if name in record]
        if len(labels) != 1:
            raise DataError(f"{place}: {len(labels)} columns of {', '.join(_LABELS)}; exactly one holds the scores")
        names = [name for name in record if name != labels[0]]
        if len(names) < 2:
            raise DataError(f"{place}: columns {', '.join(record)}; a query and at least one document are needed")
        scores = _scores(record[labels[0]], names, place)
        values = [record[name] for name in names]
        are_ids = {bool(_ID_COLUMN.fullmatch(name)) for name in names}
        if len(are_ids) > 1:
            raise DataError(f"{place}: columns {', '.join(names)} are neither all ids (…_id) nor all texts")
        if are_ids == {True}:
            query_id, *doc_ids = (identifier(value, name, place) for name, value in zip(names, values, strict=True))
        else:
            texts = [string(value, name, place) for name, value in zip(names, values, strict=True)]
            query_id = source.texts.query_id(texts[0], place)
            doc_ids = [source.texts.doc_id(text, place) for text in texts[1:]]
        yield Row(number, query_id, doc_ids, scores)


def _scores(label: Any, names: list[str], place: str) -> list[Any]:
    """The label as one score a document; ``names`` are the query's column and the documents'.

    Raises `DataError` for margins.
    """
    query, *documents = names
    scores = label if isinstance(label, list) else [label]
    if len(scores) == len(documents):
        return scores
    taken = f"{len(scores)} label(s) for {len(documents)} documents"
    columns = f"columns count by position: the query is {query!r}, its documents {', '.join(map(repr, documents))}"
    if len(scores) == len(documents) - 1:
        raise DataError(
            f"{place}: {taken} are margins (positive − negative); a score file holds the scores themselves, which "
            f"margins do not tell: convert the file they were made from ({columns}; remove what is none of these)"
        )
    raise DataError(f"{place}: {taken}; {columns}")
