"""Searching an index with texts: the one place where queries are encoded and rows become documents."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrieval_kd.artifact import published_path
from retrieval_kd.data.vectors import sparse_rows
from retrieval_kd.errors import ArtifactError, UsageError
from retrieval_kd.indexes.base import Index, input_names
from retrieval_kd.models.vectors_of_texts import Encoded, MultiVectors, SparseVectors

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.models.encoders import TextEncoder


log = logging.getLogger("retrieval_kd")


class Hit(NamedTuple):
    """A document that was found; title and text are None when the searcher has no collection."""

    doc_id: str
    score: float
    title: str | None
    text: str | None


class Searcher:
    """An index with the model that encodes its queries and the collection that holds its texts."""

    def __init__(self, index: Index, encoder: TextEncoder | None, collection: Collection | None) -> None:
        self.index = index
        self.encoder = encoder
        self.collection = collection
        self._collections = _collections_of(index, collection)
        # A fast tokenizer refuses to be used by two threads at once.
        self._encoding = threading.Lock()

    @classmethod
    def load(
        cls,
        index: str | Path | Index,
        *,
        model: str | Path | TextEncoder | None = None,
        collection: str | Path | Collection | None = None,
        search: Mapping[str, Any] | None = None,
    ) -> Searcher:
        """A searcher for ``index``, which knows its own model and collection.

        ``model`` and ``collection`` say where they are now; ``search`` overrides the index's search parameters
        (``{"nprobe": 64}``). An exported model may stand for the one that the index was made with. Raises
        `ArtifactError` when a model or a given collection is another one, or when the model is nowhere; without a
        collection hits have no text.
        """
        if isinstance(index, Index):
            if search:
                raise UsageError("search parameters are set when an index is loaded; give its path")
            opened = index
        else:
            opened = Index.load(index, search=search)
        if opened.takes == "text" and model is not None:
            raise UsageError(f"{published_path(opened.path)}: searches text and takes no model")
        encoder = None if opened.takes == "text" else _encoder_of(opened, model)
        return cls(opened, encoder, _collection_of(opened, collection))

    def search(self, query: str, k: int = 10, *, filters: Sequence[str] = ()) -> list[Hit]:
        """The best ``k`` hits of one query text, best first; `UsageError` for an empty one.

        ``filters`` on attributes of the documents (``year >= 2020``, ``lang in en,de``) must all hold for a hit.
        """
        if not query.strip():
            raise UsageError("the query is empty")
        doc_ids, scores = self.search_many([query], k, filters=filters)
        if not doc_ids[0] and (matching := self.index.matching(filters)) is not None and not matching.any():
            log.warning("%s: no document fulfils %s", published_path(self.index.path), " and ".join(filters))
        return [self._hit(doc_id, float(score)) for doc_id, score in zip(doc_ids[0], scores[0], strict=True)]

    def _hit(self, doc_id: str, score: float) -> Hit:
        """A hit with the text of the newest collection that has the document."""
        for collection in self._collections:
            if collection.documents.known(doc_id):
                document = collection.documents[collection.documents.row(doc_id)]
                return Hit(doc_id, score, document.title, document.text)
        return Hit(doc_id, score, None, None)

    def search_many(
        self, queries: Sequence[str], k: int = 10, *, filters: Sequence[str] = ()
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """Document ids and float32 scores of each query, best first, at most ``k``; an empty text has no hits."""
        if isinstance(queries, str):
            raise UsageError("search_many takes a list of query texts (got one string)")
        if k < 1:
            raise UsageError(f"k is the number of hits wanted and at least 1 (got {k})")
        doc_ids: list[list[str]] = [[] for _ in queries]
        hit_scores = [np.zeros(0, dtype=np.float32) for _ in queries]
        asked = [place for place, query in enumerate(queries) if query.strip()]
        if asked:
            allowed = self.index.matching(filters)
            scores, rows = self._search([queries[place] for place in asked], min(k, len(self.index)), allowed)
            for place, ids_of_one, scores_of_one in zip(asked, *hits_of(self.index, scores, rows), strict=True):
                doc_ids[place], hit_scores[place] = ids_of_one, scores_of_one
        return doc_ids, hit_scores

    def _search(self, texts: list[str], k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if self.encoder is None:
            return self.index.search(texts, k, allowed)
        with self._encoding:
            found = self.encoder.encode(texts, "query")
        return self.index.search(_as_queries(found, self.index), k, allowed)


def hits_of(index: Index, scores: np.ndarray, rows: np.ndarray) -> tuple[list[list[str]], list[np.ndarray]]:
    """Document ids and scores of each query's hits, from what `Index.search` gave for all of them."""
    hit = rows >= 0
    ids = index.ids_of(rows[hit])  # of all queries at once: a call costs more than a row
    doc_ids, found, start = [], [], 0
    for values, number in zip(scores, hit.sum(axis=1).tolist(), strict=True):
        doc_ids.append(ids[start : start + number])
        found.append(values[:number])
        start += number
    return doc_ids, found


def _as_queries(found: Encoded | SparseVectors | MultiVectors, index: Index) -> Any:
    """Encoded queries as the index takes them; see `Index.search`."""
    if isinstance(found, Encoded):
        return found.vectors
    if isinstance(found, SparseVectors):
        return sparse_rows(found.lengths, found.terms, found.weights, int(index.manifest.details["dimension"]))
    return np.split(found.tokens, np.cumsum(found.lengths)[:-1])


def _encoder_of(index: Index, given: str | Path | TextEncoder | None) -> TextEncoder:
    """The encoder of the model that the index recorded, or one that stands for it."""
    from retrieval_kd.models.encoders import open_encoder

    home = published_path(index.path)
    needed = index.manifest.inputs["model"]["fingerprint"]
    place = _recorded_model(index) if given is None else given
    encoder = open_encoder(place) if isinstance(place, str | Path) else place
    if needed not in encoder.stands_for:
        raise ArtifactError(
            f"{encoder.source.name} is not the model that {home} was made with "
            f"(fingerprint {encoder.ref().fingerprint[:12]}, needed {needed[:12]}); "
            "give that model with --model or build the index again"
        )
    return encoder


def _recorded_model(index: Index) -> str | Path:
    entry = index.manifest.inputs["model"]
    places = [index.path / entry["relative"]] if "relative" in entry else []
    places += [Path(entry["absolute"])] if "absolute" in entry else []
    for place in places:
        if place.is_dir():
            return published_path(place.resolve())
    if "name" in entry:
        return entry["name"]
    tried = " or ".join(str(place.resolve()) for place in places) or "any place"
    raise ArtifactError(
        f"{published_path(index.path)}: its model is not at {tried} any more; give its new place with --model"
    )


def _collection_of(index: Index, given: str | Path | Collection | None) -> Collection | None:
    """The collection given, which must be the index's own, or the one that the index finds; None where it is gone."""
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.sources import open_collection

    if given is None:
        try:
            place = index.locate("collection")
        except ArtifactError:
            return None
        return Collection.load(place)
    opened = open_collection(given)
    check_collection(index, opened)
    return opened


def _collections_of(index: Index, opened: Collection | None) -> list[Collection]:
    """The collections of the index's documents (updates add some), the newest first; one that is gone is left out."""
    from retrieval_kd.data.collection import Collection

    found = []
    for name in reversed(input_names(index.manifest.inputs, "collection")):
        if opened is not None and index.manifest.inputs[name]["fingerprint"] == opened.fingerprint:
            found.append(opened)
            continue
        try:
            found.append(Collection.load(index.locate(name)))
        except ArtifactError:
            continue
    return found


def check_collection(index: Index, collection: Collection) -> None:
    """Raises `ArtifactError` unless ``index`` was built from ``collection``."""
    inputs = index.manifest.inputs
    needed = [inputs[name]["fingerprint"] for name in input_names(inputs, "collection")]
    if collection.fingerprint not in needed:
        wanted = " or ".join(fingerprint[:12] for fingerprint in needed)
        raise ArtifactError(
            f"{collection.path} is not the collection that {published_path(index.path)} was made with "
            f"(fingerprint {collection.fingerprint[:12]}, needed {wanted or 'none: it records no collection'})"
        )
