"""The first sentence of a document as a query for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from retrieval_kd.data.collection import Document
from retrieval_kd.queries.base import DocumentQueriesRecipe, DocumentQueryMaker, Made
from retrieval_kd.queries.sentences import sentences


class FirstSentenceRecipe(DocumentQueriesRecipe):
    """Keys of ``kind: first-sentence``."""

    kind: Literal["first-sentence"]


class FirstSentenceQueries(DocumentQueryMaker):
    """First sentences of the text, the title left out. Empty documents give no query and are counted."""

    Recipe = FirstSentenceRecipe

    def from_documents(self, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        """One query for each document that has a text."""
        return Made([sentences(document.text)[:1] for document in documents], {})
