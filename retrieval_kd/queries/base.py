"""What makes queries: recipe in, raw queries with their origin out. One file a kind; the driver is `make`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.artifact import InputRef
from retrieval_kd.atomic import write_atomically
from retrieval_kd.data.collection import ALL, Document
from retrieval_kd.errors import UsageError
from retrieval_kd.progress import progress
from retrieval_kd.recipe import Recipe

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection


class QueriesRecipe(Recipe):
    """The keys every kind has."""

    stage = "queries"
    execution: ClassVar[frozenset[str]] = frozenset()
    """Keys that say how the work is done and cannot change a query: they may differ when a run goes on."""

    split: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the synthetic queries are called in the new collection; its other splits stay as they are."""
    replace: bool = False
    """Put the synthetic queries in the place of a split that the collection has already."""
    min_words: int = Field(default=1, ge=1)
    """Shorter queries are left out and counted."""
    max_words: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if self.split == ALL:
            raise ValueError(f"split: '{ALL}' means every query; choose another name")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"max_words: {self.max_words} is less than min_words, {self.min_words}")
        return self

    def identity(self) -> dict[str, Any]:
        """The resolved recipe without its `execution` keys: what the queries are made from."""
        return self.model_dump(mode="json", exclude=set(self.execution))


class DocumentQueriesRecipe(QueriesRecipe):
    """The keys of kinds that make queries from documents."""

    documents: int | None = Field(default=None, ge=1)
    """So many documents at random; a larger number keeps those of a smaller one. All when not given."""
    qrels: bool = True
    """Judge a query's own document relevant (1); without, the split has queries and no qrels."""


class RawQuery(NamedTuple):
    """A query as it was made, and the document or the line of a log that it comes from."""

    text: str
    doc_id: str | None
    line: int | None


class Made(NamedTuple):
    """What a chunk of documents gave."""

    queries: list[list[str]]
    """The queries of each document, as they were made."""
    counts: dict[str, int]
    """Whatever was cut, left out or malformed."""


class QueryMaker(ABC):
    """A kind of queries. Constructing it is cheap: a model is loaded when the first query is made."""

    Recipe: ClassVar[type[QueriesRecipe]]
    recipe: QueriesRecipe
    resumable: ClassVar[bool] = False
    """Making a query costs enough for an interrupted run to go on where it was."""
    judged: bool = False
    """Each query has a relevant document."""

    def __init__(self, recipe: Any, query_log: Path | None = None) -> None:
        if query_log is not None:
            raise UsageError(f"kind '{recipe.kind}' makes queries from documents and reads no query log")
        self.recipe = recipe
        self.counts: Counter[str] = Counter()

    @property
    def model(self) -> str | None:
        """The name of the model that writes the queries, None where none does."""
        return None

    @property
    def prompt_sha256(self) -> str | None:
        """Hash of the prompt, None where there is none."""
        return None

    def refs(self) -> dict[str, InputRef]:
        """What the queries are made from beside the collection: a model, a log."""
        return {}

    def details(self) -> dict[str, Any]:
        """Facts for the manifest, asked for after the last query."""
        return {}

    @abstractmethod
    def raw(self, collection: Collection, work: Path) -> Iterator[RawQuery]:
        """The queries in their order; ``work`` is a folder that survives a crash."""

    @abstractmethod
    def estimate(self, collection: Collection) -> dict[str, Any]:
        """What `raw` would do and cost."""


class DocumentQueryMaker(QueryMaker):
    """A kind that makes queries from documents, a chunk at a time.

    A finished chunk of a resumable kind is a file in the work folder, which a run that goes on reads instead. What a
    chunk gives depends on its documents and the recipe alone.
    """

    Recipe: ClassVar[type[DocumentQueriesRecipe]]
    recipe: DocumentQueriesRecipe
    chunk: ClassVar[int] = 4096

    def __init__(self, recipe: Any, query_log: Path | None = None) -> None:
        super().__init__(recipe, query_log)
        self.judged = recipe.qrels

    @abstractmethod
    def from_documents(self, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        """The queries of each document; ``rows`` are the documents' rows in the collection."""

    def prepare(self, work: Path) -> None:
        """Called once before the first chunk."""

    def raw(self, collection: Collection, work: Path) -> Iterator[RawQuery]:
        """The queries of the chosen documents, in the documents' order. Adds up the chunks' counts."""
        rows = self.rows(len(collection.documents))
        self.counts["documents_read"] = len(rows)
        self.prepare(work)
        with progress(f"making queries from {len(rows):,} documents", len(rows)) as advance:
            for start in range(0, len(rows), self.chunk):
                part = rows[start : start + self.chunk]
                documents = [collection.documents[row] for row in part]
                made = self._finished(work / f"queries-{start:010d}.json", part, documents)
                self.counts.update(made.counts)
                for document, texts in zip(documents, made.queries, strict=True):
                    yield from (RawQuery(text, document.id, None) for text in texts)
                advance(len(part))

    def estimate(self, collection: Collection) -> dict[str, Any]:
        """Documents to read, and the most queries they can give."""
        documents = len(self.rows(len(collection.documents)))
        return {"documents": documents, "queries_at_most": documents * getattr(self.recipe, "per_document", 1)}

    def rows(self, total: int) -> list[int]:
        """The rows of the chosen documents, ascending."""
        chosen = np.random.default_rng(self.recipe.seed).permutation(total)[: self.recipe.documents]
        return [int(row) for row in np.sort(chosen)]

    def random(self, row: int) -> np.random.Generator:
        """The random numbers of one document, which depend on the seed and its row alone."""
        return np.random.default_rng([self.recipe.seed, row])

    def _finished(self, path: Path, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        if not self.resumable:
            return self.from_documents(rows, documents)
        if path.is_file():
            return Made(**json.loads(path.read_text(encoding="utf-8")))
        made = self.from_documents(rows, documents)
        write_atomically(path, json.dumps(made._asdict()).encode())
        return made


def approximate_tokens(collection: Collection, rows: Sequence[int], extra_words: int, most_words: int | None) -> int:
    """About 1.3 tokens a word of the documents at ``rows``, cut to ``most_words``, and ``extra_words`` with each."""
    sample = rows[:: max(1, len(rows) // 1000)]
    words = [len(text.split()) for text in collection.documents.texts(sample)]
    shown = np.minimum(words, np.inf if most_words is None else most_words)
    return int(1.3 * len(rows) * (float(np.mean(shown)) + extra_words))
