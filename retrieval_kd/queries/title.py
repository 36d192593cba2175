"""The title of a document as a query for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from retrieval_kd.data.collection import Document
from retrieval_kd.queries.base import DocumentQueriesRecipe, DocumentQueryMaker, Made


class TitleRecipe(DocumentQueriesRecipe):
    """Keys of ``kind: title``."""

    kind: Literal["title"]


class TitleQueries(DocumentQueryMaker):
    """Titles. Documents without one give no query and are counted."""

    Recipe = TitleRecipe

    def from_documents(self, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        """One query for each document that has a title."""
        titles = [document.title.strip() for document in documents]
        return Made([[title] if title else [] for title in titles], {})
