"""What a writer of a foreign file is given: the rows of a score file, texts, and which documents are positive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from retrieval_kd.data.collection import ALL
from retrieval_kd.errors import DataError, OutputExistsError, first

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.scores import ScoredQuery, Scores


class Divided(NamedTuple):
    """A query whose documents are divided into positives and negatives, positions in its lists."""

    row: ScoredQuery
    positives: np.ndarray
    negatives: np.ndarray


class Written(NamedTuple):
    """A file in another layout, and what was written into it and left out."""

    path: Path
    counts: dict[str, int]


@dataclass
class Export:
    """A score file that is being written in another layout."""

    source: Path
    """The file that is converted, for messages; ``scores`` may be a temporary import of it."""
    scores: Scores
    out: Path
    collection: Collection | None = None
    relevant: Mapping[str, Mapping[str, int]] | None = None
    """Query → document → relevance; None makes the document with the highest score the one positive."""
    negatives: int | None = None
    force: bool = False
    left_out: dict[str, None] = field(default_factory=dict)
    """The queries that the layout cannot hold."""
    counts: Counter[str] = field(default_factory=Counter)
    """What a writer has to say of the file besides its queries."""
    temporary: dict[Path, Path] = field(default_factory=dict)
    """Temporary file → the file it becomes."""

    def file(self, part: str = "") -> Path:
        """The temporary file for ``OUT``, or for ``STEM.part.suffix`` beside it, which becomes it in the end.

        The file that is asked for first is published last. Raises `OutputExistsError` for a file that is there.
        """
        stem, dot, suffixes = self.out.name.partition(".")
        final = self.out.with_name(f"{stem}.{part}{dot}{suffixes}") if part else self.out
        refuse_existing(final, self.force)
        temporary = final.with_name(f".tmp-{final.name}")
        self.temporary[temporary] = final
        return temporary

    def divided(self) -> Iterator[Divided]:
        """Every query that has positives and negatives; the others are noted in ``left_out``.

        A document is positive when the qrels say so (relevance above 0), without qrels when it ranks first: highest
        score, then highest document id. All others are negative. Both keep the order of the score file.
        """
        for row in self.scores:
            if self.relevant is None:
                top = max(range(len(row.doc_ids)), key=lambda i: (row.scores[i], row.doc_ids[i]), default=0)
                is_positive = np.arange(len(row.doc_ids)) == top
            else:
                judged = self.relevant.get(row.query_id, {})
                is_positive = np.array([judged.get(doc_id, 0) > 0 for doc_id in row.doc_ids], dtype=bool)
            if is_positive.any() and not is_positive.all():
                yield Divided(row, np.flatnonzero(is_positive), np.flatnonzero(~is_positive))
            else:
                self.left_out[row.query_id] = None

    def query_text(self, query_id: str) -> str:
        """The text of a query; `DataError` when the collection lacks it."""
        if query_id not in self._queries:
            raise DataError(f"{self._texts.path}: query id {query_id!r} is unknown; use the collection of the scores")
        return self._queries[query_id]

    def doc_texts(self, doc_ids: Sequence[str]) -> list[str]:
        """What models read of documents; `DataError` when the collection lacks one."""
        documents = self._texts.documents
        return documents.texts(documents.rows(doc_ids).tolist())

    @cached_property
    def _queries(self) -> dict[str, str]:
        return self._texts.queries(ALL)

    @property
    def _texts(self) -> Collection:
        assert self.collection is not None
        return self.collection


def refuse_existing(out: Path, force: bool) -> None:
    """Raises `OutputExistsError` when a file is there and not to be replaced, or a directory is there."""
    if out.is_dir():
        raise OutputExistsError(f"{out} is a directory; choose another --out")
    if out.exists() and not force:
        raise OutputExistsError(f"{out} exists; choose another --out or pass --force to replace it")


def refuse_ids(row: ScoredQuery, unfit: str, layout: str) -> None:
    """Raises `DataError` when an id is empty or has one of the characters ``unfit``, which a layout cannot hold."""
    bad = [one for one in (row.query_id, *row.doc_ids) if not one or not set(unfit).isdisjoint(one)]
    if bad:
        raise DataError(
            f"query {row.query_id!r}: ids that are empty or hold white space cannot be written as {layout}: "
            f"{first(bad)}; pylate and tevatron files hold any id"
        )
