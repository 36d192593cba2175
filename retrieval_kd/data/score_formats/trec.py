"""``trec``: the 6-column run file; its scores are taken as they are, ranks and tags are ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrieval_kd.data.score_formats.export import Export, refuse_ids
from retrieval_kd.data.score_formats.lines import columns, writing
from retrieval_kd.data.score_formats.pairs import Pairs, float32_of
from retrieval_kd.data.trec import TAG

if TYPE_CHECKING:
    import numpy as np

    from retrieval_kd.data.score_formats.pairs import Source

_COLUMNS = "query Q0 document rank score tag"


def read(source: Source) -> Iterator[Pairs]:
    """The pair of each line."""
    for numbers, (queries, _, doc_ids, _, scores, _) in columns(source, _COLUMNS, tabs=False):

        def place(i: int, numbers: np.ndarray = numbers) -> str:
            return source.place(int(numbers[i]))

        yield Pairs(queries, doc_ids, float32_of(scores, place), numbers)


def write(export: Export) -> None:
    """Each query's documents by score, then by document id, both descending."""
    with writing(export.file()) as file:
        for row in export.scores:
            refuse_ids(row, " \t\n\r\x0b\x0c", "trec")
            ranked = sorted(zip(row.scores, row.doc_ids, strict=True), reverse=True)
            for rank, (score, doc_id) in enumerate(ranked, start=1):
                file.write(f"{row.query_id} Q0 {doc_id} {rank} {score!s} {TAG}\n".encode())
