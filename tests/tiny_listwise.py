"""A teacher whose order a tiny language model can learn, its score file, and a prompt that shows little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import tiny_scores

from retrieval_kd.data.collection import Collection

PROMPT = {
    "kind": "listwise",
    "text": "query : {query}\n{passages}\nrank",
    "identifiers": "letters",
    "answer_start": "[",
    "passage_words": 1,
}
ORDER = [5, 0, 3, 6, 1, 4, 7, 2]
"""The teacher's, for every query: of d00 to d07, each with a first word that no other document has."""


def make_scores(
    out: Path, collection: Collection, changed: dict[str, Sequence[float]] | None = None, **details: Any
) -> Path:
    """Ranks of d00 to d07 by `ORDER` for every training query, but for the ``changed``."""
    ranks = [-(ORDER.index(row) + 1.0) for row in range(8)]
    scores = dict.fromkeys(collection.queries("train"), ranks) | (changed or {})
    rows = [(query, tiny.ids_of(range(len(of_query))), list(of_query), None) for query, of_query in scores.items()]
    return tiny_scores.make_scores(out, rows, inputs={"collection": collection.ref()}, score_kind="rank", **details)
