"""``hofstaetter-tsv``: positive's score, negative's score, query, positive, negative; one line a triple, no header.

The layout of the teacher files of Hofstätter et al. 2020 (arXiv 2010.02666).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from retrieval_kd.data.score_formats.export import Export, refuse_ids
from retrieval_kd.data.score_formats.lines import columns, writing
from retrieval_kd.data.score_formats.pairs import Pairs, float32_of

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source

_COLUMNS = "pos_score neg_score query_id pos_id neg_id"


def read(source: Source) -> Iterator[Pairs]:
    """The two pairs of each line, the positive first."""
    import pyarrow as pa

    for numbers, (positive, negative, queries, positive_ids, negative_ids) in columns(source, _COLUMNS, tabs=True):
        n = len(numbers)
        interleaved = pa.array(np.arange(2 * n).reshape(2, n).T.ravel())
        places = np.repeat(numbers, 2)

        def place(i: int, places: np.ndarray = places) -> str:
            return source.place(int(places[i]))

        scores = float32_of(pa.concat_arrays([positive, negative]).take(interleaved), place)
        doc_ids = pa.concat_arrays([positive_ids, negative_ids]).take(interleaved)
        yield Pairs(queries.take(pa.array(np.repeat(np.arange(n), 2))), doc_ids, scores, places)


def write(export: Export) -> None:
    """Every positive of a query with every negative."""
    with writing(export.file()) as file:
        for row, positives, negatives in export.divided():
            refuse_ids(row, "\t\n\r", "hofstaetter-tsv")
            scores = row.scores.astype(str).tolist()
            for positive in positives.tolist():
                for negative in negatives.tolist():
                    ids = f"{row.query_id}\t{row.doc_ids[positive]}\t{row.doc_ids[negative]}"
                    file.write(f"{scores[positive]}\t{scores[negative]}\t{ids}\n".encode())
