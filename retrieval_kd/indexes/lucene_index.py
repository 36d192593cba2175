"""Lucene's files: written in the order that breaks ties, opened, and searched; what both of its engines share."""

from __future__ import annotations

import copy
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from retrieval_kd.errors import ArtifactError, DataError, RetrievalKDError, first
from retrieval_kd.indexes.base import Index, arrow_ids, write_rows
from retrieval_kd.indexes.hits import ordered
from retrieval_kd.indexes.java import in_turn, java_cast, java_class, leave_java_with_thread
from retrieval_kd.plan import Draft
from retrieval_kd.progress import progress

log = logging.getLogger("retrieval_kd")

CONTENTS = "contents"
_ID = "id"
"""The fields' names, as Anserini has them."""
_FOLDER = "lucene"
_BUFFER_MB = 64.0
_BATCH = 1024
_LONGEST_ID = 32766
"""Bytes of a term."""
_TIES = 8
"""Hits that are read beside those wanted where Lucene does not order ties."""


class LuceneIndex(Index):
    """What both engines share: documents lie in Lucene by descending id, so that its ties are in the fixed order.

    Lucene numbers documents as they come and prefers the lower number among equal scores; one thread adds them and
    only neighbours are merged. The files are stock: pyserini's searchers open the folder ``lucene``. Two builds differ
    in bytes (random names and times that Lucene writes) but not in hits.
    """

    deterministic: ClassVar[bool] = False

    @classmethod
    def similarity(cls, search: Any) -> Any:
        """Lucene's object that turns frequencies into scores."""
        raise NotImplementedError

    @classmethod
    def write(cls, draft: Draft, ids: Any, text: Callable[[int], str], analyzer: Any, search: Any) -> None:
        """Writes the rows and what ``text`` gives of each; counts documents, postings and documents without terms.

        Raises `DataError` for an id that is too long for Lucene.
        """
        draft.counts["documents"] = write_rows(draft.path, ids)
        _check_ids(ids)
        order = _order(np.load(draft.path / "rank.npy"))
        with _errors_of(draft.path, RetrievalKDError):
            _write(draft.path / _FOLDER, _fields(ids, text, order), len(order), analyzer, cls.similarity(search))
            reader = _read(draft.path / _FOLDER)
        draft.counts["postings"] = reader.getSumDocFreq(CONTENTS)
        draft.counts["documents_without_terms"] = len(order) - reader.getDocCount(CONTENTS)
        reader.close()
        draft.details["lucene"] = _version()

    @in_turn
    def open(self, recipe: Any, search: Any) -> None:
        """Opens Lucene's files, which it memory-maps."""
        leave_java_with_thread()
        built = self.manifest.details["lucene"]
        if built != _version():
            log.warning(
                "%s: built with Lucene %s, %s is installed; build again if hits differ", self.path, built, _version()
            )
        self._order, self._ties_in_order = _order(self.rank), True
        with _errors_of(self.path, ArtifactError):
            self._reader = _read(self.path / _FOLDER)
        # Java never lets go of what it has mapped; an old generation's files would stay on the disk.
        weakref.finalize(self, _close, self._reader).atexit = False
        self._similarity = self.similarity(search)
        self._searcher = _searcher(self._reader, self._similarity)
        self._generator = java_class("io.anserini.search.query.BagOfWordsQueryGenerator")()
        self._json = java_class("com.fasterxml.jackson.databind.ObjectMapper")()
        for result in ("Query", "TopDocs"):  # read now: searches do not take turns
            java_class(f"org.apache.lucene.search.{result}")

    @classmethod
    @in_turn
    def join(cls, segments: Sequence[Self], whole: Index) -> Self:
        """All segments as Lucene's own: one search reads them, by document frequencies and lengths of all together."""
        joint = copy.copy(segments[0])
        joint.path, joint.manifest, joint.rank = whole.path, whole.manifest, whole.rank
        starts = np.cumsum([0, *(len(segment) for segment in segments[:-1])])
        orders = [segment._order + start for segment, start in zip(segments, starts.tolist(), strict=True)]
        joint._order, joint._ties_in_order = np.concatenate(orders), len(segments) == 1
        readers = [segment._reader for segment in segments]
        reader = java_class("org.apache.lucene.index.MultiReader")(readers, True)
        joint._searcher = _searcher(java_cast("org.apache.lucene.index.IndexReader", reader), joint._similarity)
        return joint

    def hits(self, query: Any, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` scores and rows of Lucene's query, padded with -inf and -1.

        More are read until k are allowed and none that is left could tie with them.
        """
        leave_java_with_thread()
        share = 1.0 if allowed is None else np.count_nonzero(allowed) / len(self)
        wanted = 0 if not share else int(k / share) + (0 if self._ties_in_order else _TIES)
        scores, rows = np.empty(0, np.float32), np.empty(0, np.int64)
        while wanted:
            wanted = min(wanted, len(self))
            top = self._searcher.search(query, wanted)
            # As JSON, many hits cross from Java in one call.
            found = json.loads(self._json.writeValueAsString(top))["scoreDocs"]
            scores = np.array([hit["score"] for hit in found], dtype=np.float32)
            rows = self._order[np.array([hit["doc"] for hit in found], dtype=np.int64)].astype(np.int64)
            all_found = len(found) < wanted or wanted == len(self)
            least = scores.min(initial=np.inf)
            if allowed is not None:
                scores, rows = scores[allowed[rows]], rows[allowed[rows]]
            if all_found or (len(rows) >= k and (self._ties_in_order or scores[k - 1] > least)):
                break
            wanted *= 4
        return ordered(scores, rows, self.rank, k)

    def problems(self) -> list[str]:
        """Broken rows, or another number of documents in Lucene."""
        found = super().problems()
        if self._reader.numDocs() != len(self):
            found.append(f"{len(self)} documents but Lucene has {self._reader.numDocs()}")
        return found


def _check_ids(ids: Any) -> None:
    import pyarrow.compute as pc

    array = arrow_ids(ids)
    long = array.filter(pc.greater(pc.binary_length(array), _LONGEST_ID)).to_pylist()
    if long:
        shown = first(f"{one[:40]}…" for one in long)
        raise DataError(
            f"{len(long)} document ids have more than {_LONGEST_ID} bytes, the most that Lucene holds: {shown}; give "
            "these documents other ids"
        )


def _order(rank: np.ndarray) -> np.ndarray:
    """The row [n] int32 of each of Lucene's documents: the inverse of ``rank``."""
    order = np.empty(len(rank), dtype=np.int32)
    order[rank] = np.arange(len(rank), dtype=np.int32)
    return order


def _fields(ids: Any, text: Callable[[int], str], order: np.ndarray) -> Iterator[tuple[str, str]]:
    """Id and content of each document in Lucene's order."""
    import pyarrow as pa

    array = arrow_ids(ids)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        yield from zip(array.take(pa.array(rows)).to_pylist(), map(text, rows.tolist()), strict=True)


def _write(folder: Path, documents: Iterable[tuple[str, str]], total: int, analyzer: Any, similarity: Any) -> None:
    """Writes documents as one piece of Lucene's, numbered as they come."""
    directory, writer = _open_writer(folder, analyzer, similarity)
    try:
        document, fields = _new_document()
        with progress(f"indexing {total:,} documents", total) as advance:
            for doc_id, text in documents:
                fields[0].setStringValue(doc_id)
                fields[1].setBytesValue(doc_id.encode())
                fields[2].setStringValue(text)
                writer.addDocument(document)
                advance(1)
        writer.forceMerge(1)
    finally:
        writer.close()
        directory.close()
    (folder / "write.lock").unlink()


@in_turn
def _open_writer(folder: Path, analyzer: Any, similarity: Any) -> tuple[Any, Any]:
    config = java_class("org.apache.lucene.index.IndexWriterConfig")(analyzer)
    config.setSimilarity(similarity)
    config.setRAMBufferSizeMB(_BUFFER_MB)
    neighbours = java_class("org.apache.lucene.index.LogDocMergePolicy")()
    config.setMergePolicy(neighbours)
    at_once = java_class("org.apache.lucene.index.SerialMergeScheduler")()
    config.setMergeScheduler(at_once)
    directory = _directory(folder)
    return directory, java_class("org.apache.lucene.index.IndexWriter")(directory, config)


@in_turn
def _new_document() -> tuple[Any, list[Any]]:
    """A document and its fields: the id, the id again (pyserini orders ties by it), and terms and their frequencies."""
    stored = java_class("org.apache.lucene.document.Field$Store").YES
    kind = java_class("org.apache.lucene.document.FieldType")()
    kind.setIndexOptions(java_class("org.apache.lucene.index.IndexOptions").DOCS_AND_FREQS)
    kind.setTokenized(True)
    empty = java_cast("java.lang.CharSequence", java_class("java.lang.String")(""))
    document = java_class("org.apache.lucene.document.Document")()
    fields = [
        java_class("org.apache.lucene.document.StringField")(_ID, "", stored),
        java_class("org.apache.lucene.document.BinaryDocValuesField")(
            _ID, java_class("org.apache.lucene.util.BytesRef")()
        ),
        java_class("org.apache.lucene.document.Field")(CONTENTS, empty, kind),
    ]
    for field in fields:
        document.add(field)
    return document, fields


@in_turn
def _read(folder: Path) -> Any:
    reader = java_class("org.apache.lucene.index.DirectoryReader").open(_directory(folder))
    return java_cast("org.apache.lucene.index.IndexReader", reader)


def _searcher(reader: Any, similarity: Any) -> Any:
    searcher = java_class("org.apache.lucene.search.IndexSearcher")(reader)
    searcher.setSimilarity(similarity)
    return searcher


def _close(reader: Any) -> None:
    """Closes a reader; ``reader.close`` itself cannot be kept, as pyjnius shares one such method among all readers."""
    reader.close()


def _directory(folder: Path) -> Any:
    path = java_class("java.io.File")(str(folder.resolve())).toPath()
    return java_class("org.apache.lucene.store.FSDirectory").open(path)


def _version() -> str:
    return str(java_class("org.apache.lucene.util.Version").LATEST.toString())


@contextmanager
def _errors_of(path: Path, error: type[RetrievalKDError]) -> Iterator[None]:
    """Raises ``error`` for what Lucene throws."""
    java_class("java.lang.Object")  # pyjnius can be imported once Java is found
    from jnius import JavaException

    try:
        yield
    except JavaException as thrown:
        raise error(f"{path}: Lucene failed: {str(thrown).splitlines()[0]}; make it again") from thrown
