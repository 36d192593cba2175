"""The ids of texts: what a file without ids is read with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from retrieval_kd.data.collection import ALL, id_hash
from retrieval_kd.errors import DataError, first

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection


class TextLookup:
    """The query and document ids of a collection by exact text; of documents it holds 16 bytes each, no text."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection

    def query_id(self, text: str, place: str) -> str:
        """The id of the one query that reads so; `DataError` with the place when there is none or more than one."""
        return self._only(self._queries.get(text, []), "query", text, place)

    def doc_id(self, text: str, place: str) -> str:
        """The id of the one document that models read so (title and text); `DataError` as for queries."""
        documents = self._collection.documents
        hashes, rows = self._documents
        wanted = np.uint64(id_hash(text))
        start, stop = np.searchsorted(hashes, wanted, side="left"), np.searchsorted(hashes, wanted, side="right")
        same = [row for row in rows[start:stop].tolist() if documents.text(row) == text]
        return self._only(documents.ids_of(same), "document", text, place)

    @cached_property
    def _queries(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for query_id, text in self._collection.queries(ALL).items():
            found.setdefault(text, []).append(query_id)
        return found

    @cached_property
    def _documents(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of all texts [n] uint64, ascending, and the row of each."""
        documents = self._collection.documents
        hashes = np.fromiter((id_hash(text) for text in documents.iter_texts()), np.uint64, len(documents))
        rows = np.argsort(hashes, kind="stable")
        return hashes[rows], rows

    def _only(self, ids: Sequence[str], what: str, text: str, place: str) -> str:
        if len(ids) == 1:
            return ids[0]
        if not ids:
            raise DataError(f"{place}: no {what} of {self._collection.path} has exactly the text {text!r:.60}")
        raise DataError(
            f"{place}: {len(ids)} of the collection's texts are {text!r:.60}, so that its {what} id is not known: "
            f"{first(sorted(ids))}; convert a file that has ids"
        )
