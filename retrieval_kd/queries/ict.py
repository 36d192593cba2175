"""Crops of a document as queries for it: the inverse cloze task, as far as a fixed collection allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from retrieval_kd.data.collection import Document
from retrieval_kd.queries.base import DocumentQueriesRecipe, DocumentQueryMaker, Made
from retrieval_kd.queries.sentences import sentences


class ICTRecipe(DocumentQueriesRecipe):
    """Keys of ``kind: ict``."""

    kind: Literal["ict"]
    crop: Literal["sentence", "words"] = "sentence"
    """A whole sentence of ``min_words`` to ``max_words`` words, or so many consecutive words."""
    per_document: int = Field(default=1, ge=1)
    delete: float = Field(default=0.0, ge=0, lt=1)
    """The probability with which each word of a crop is left out."""
    min_words: int = Field(default=4, ge=1)
    max_words: int | None = Field(default=32, ge=1)


class ICTQueries(DocumentQueryMaker):
    """Random sentences, or random runs of words, of a document's text (not of its title).

    The inverse cloze task (Lee et al. 2019; Sachan et al. 2021, arXiv 2101.00408) takes a random sentence of a block
    as the query and removes it from the block nine times out of ten, so that a retriever cannot match words alone. A
    collection's documents are fixed, so here the crop always stays in its document, as with the tenth that the papers
    keep. ``delete`` takes random words out of the query instead, as the crops of Contriever do (Izacard et al. 2021,
    arXiv 2112.09118); what then teaches most is a teacher's scores of other documents.
    """

    Recipe = ICTRecipe
    recipe: ICTRecipe

    def from_documents(self, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        """At most ``per_document`` crops a document, none from one that is too short."""
        crops = self._sentences if self.recipe.crop == "sentence" else self._words
        made = []
        for row, document in zip(rows, documents, strict=True):
            random = self.random(row)
            made.append([self._thinned(crop, random) for crop in crops(document.text, random)])
        return Made(made, {})

    def _sentences(self, text: str, random: np.random.Generator) -> list[list[str]]:
        split = [sentence.split() for sentence in sentences(text)]
        longest = np.inf if self.recipe.max_words is None else self.recipe.max_words
        fitting = [words for words in split if self.recipe.min_words <= len(words) <= longest]
        chosen = random.permutation(len(fitting))[: self.recipe.per_document]
        return [fitting[i] for i in chosen]

    def _words(self, text: str, random: np.random.Generator) -> list[list[str]]:
        words = text.split()
        longest = min(len(words), self.recipe.max_words or len(words))
        if longest < self.recipe.min_words:
            return []
        crops = []
        for _ in range(self.recipe.per_document):
            length = int(random.integers(self.recipe.min_words, longest + 1))
            start = int(random.integers(0, len(words) - length + 1))
            crops.append(words[start : start + length])
        return crops

    def _thinned(self, words: Sequence[str], random: np.random.Generator) -> str:
        if self.recipe.delete == 0:
            return " ".join(words)
        kept = random.random(len(words)) >= self.recipe.delete
        return " ".join(word for word, stays in zip(words, kept, strict=True) if stays)
