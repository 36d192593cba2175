"""Lucene's files: written in the order that breaks ties, opened, and searched; what both of its engines share."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from retrieval_kd.artifact import Draft
from retrieval_kd.errors import ArtifactError, DataError, RetrievalKDError, first
from retrieval_kd.indexes.base import Index, arrow_ids, write_rows
from retrieval_kd.indexes.java import java_cast, java_class, leave_java_with_thread
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

    def open(self, recipe: Any, search: Any) -> None:
        """Opens Lucene's files, which it memory-maps."""
        leave_java_with_thread()
        built = self.manifest.details["lucene"]
        if built != _version():
            log.warning(
                "%s: built with Lucene %s, %s is installed; build again if hits differ", self.path, built, _version()
            )
        self._order = _order(self.rank)
        with _errors_of(self.path, ArtifactError):
            self._reader = _read(self.path / _FOLDER)
        # Java never lets go of what it has mapped; an old generation's files would stay on the disk.
        weakref.finalize(self, _close, self._reader).atexit = False
        self._searcher = java_class("org.apache.lucene.search.IndexSearcher")(self._reader)
        self._similarity = self.similarity(search)
        self._searcher.setSimilarity(self._similarity)
        self._part: Any = None
        self._generator = java_class("io.anserini.search.query.BagOfWordsQueryGenerator")()
        self._json = java_class("com.fasterxml.jackson.databind.ObjectMapper")()

    def hits(self, query: Any, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """At most ``k`` scores and rows of Lucene's query, in the fixed order; more are read until k are allowed."""
        leave_java_with_thread()
        share = 1.0 if allowed is None else np.count_nonzero(allowed) / len(self)
        if not share:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        wanted = int(k / share)
        while True:
            wanted = min(wanted, len(self))
            top = self._searcher.search(query, wanted) if self._part is None else self._of_part(query, wanted)
            # As JSON, many hits cross from Java in one call.
            found = json.loads(self._json.writeValueAsString(top))["scoreDocs"]
            scores = np.array([hit["score"] for hit in found], dtype=np.float32)
            places = np.array([hit["doc"] for hit in found], dtype=np.int64)
            rows = self._order[places - (0 if self._part is None else self._part.docBase)].astype(np.int64)
            if allowed is not None:
                scores, rows = scores[allowed[rows]], rows[allowed[rows]]
            if len(rows) >= k or len(found) < wanted or wanted == len(self):
                return scores[:k], rows[:k]
            wanted *= 4

    def _of_part(self, query: Any, k: int) -> Any:
        """Lucene's best ``k`` of this segment, with the statistics of all that the searcher has."""
        modes = java_class("org.apache.lucene.search.ScoreMode")
        weight = self._searcher.createWeight(self._searcher.rewrite(query), modes.TOP_SCORES, 1.0)
        scorer = weight.bulkScorer(self._part)
        collector = java_class("org.apache.lucene.search.TopScoreDocCollector").create(k, k)
        if scorer is not None:
            scorer.score(collector.getLeafCollector(self._part), None)
        return collector.topDocs()

    def problems(self) -> list[str]:
        """Broken rows, or another number of documents in Lucene."""
        found = super().problems()
        if self._reader.numDocs() != len(self):
            found.append(f"{len(self)} documents but Lucene has {self._reader.numDocs()}")
        return found


def share_statistics(segments: Sequence[LuceneIndex]) -> None:
    """Makes each segment count terms and lengths over the documents of all, as Lucene does over its own segments."""
    reader = java_class("org.apache.lucene.index.MultiReader")([segment._reader for segment in segments], True)
    searcher = java_class("org.apache.lucene.search.IndexSearcher")(
        java_cast("org.apache.lucene.index.IndexReader", reader)
    )
    searcher.setSimilarity(segments[0]._similarity)
    for number, segment in enumerate(segments):
        segment._searcher, segment._part = searcher, reader.leaves().get(number)


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
    config = java_class("org.apache.lucene.index.IndexWriterConfig")(analyzer)
    config.setSimilarity(similarity)
    config.setRAMBufferSizeMB(_BUFFER_MB)
    config.setMergePolicy(java_class("org.apache.lucene.index.LogDocMergePolicy")())
    config.setMergeScheduler(java_class("org.apache.lucene.index.SerialMergeScheduler")())
    directory = _directory(folder)
    writer = java_class("org.apache.lucene.index.IndexWriter")(directory, config)
    try:
        document = java_class("org.apache.lucene.document.Document")()
        fields = _new_fields()
        for field in fields:
            document.add(field)
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


def _new_fields() -> tuple[Any, Any, Any]:
    """The id, the id again (pyserini orders ties by it), and the content: terms and their frequencies."""
    stored = java_class("org.apache.lucene.document.Field$Store").YES
    kind = java_class("org.apache.lucene.document.FieldType")()
    kind.setIndexOptions(java_class("org.apache.lucene.index.IndexOptions").DOCS_AND_FREQS)
    kind.setTokenized(True)
    empty = java_cast("java.lang.CharSequence", java_class("java.lang.String")(""))
    return (
        java_class("org.apache.lucene.document.StringField")(_ID, "", stored),
        java_class("org.apache.lucene.document.BinaryDocValuesField")(
            _ID, java_class("org.apache.lucene.util.BytesRef")()
        ),
        java_class("org.apache.lucene.document.Field")(CONTENTS, empty, kind),
    )


def _read(folder: Path) -> Any:
    reader = java_class("org.apache.lucene.index.DirectoryReader").open(_directory(folder))
    return java_cast("org.apache.lucene.index.IndexReader", reader)


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
