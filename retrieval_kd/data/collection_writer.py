"""Writes a collection artifact from a source's streams, checking every id on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import ALL, QREL_COLUMNS, Collection, id_hash, model_text
from retrieval_kd.errors import DataError, UsageError, first
from retrieval_kd.plan import Draft, Plan

BATCH_ROWS = 4096
BATCH_CHARACTERS = 64 << 20
"""A batch of long documents ends here, far below the 2 GiB that one Arrow string column of a batch can hold."""

RESERVED = ("id", "title", "text")


class SourceDocument(NamedTuple):
    """A document and where it was read (``file:line``)."""

    place: str
    id: str
    title: str
    text: str
    attributes: Mapping[str, Any]


class SourceQuery(NamedTuple):
    """A query and where it was read."""

    place: str
    id: str
    text: str


class SourceQrel(NamedTuple):
    """A judgement and where it was read."""

    place: str
    query_id: str
    doc_id: str
    relevance: int


class Source(ABC):
    """Where a collection comes from. The streams can be read more than once and give the same each time."""

    name: str
    """What the recipe records as ``source``; not a path, so that the same data has the same fingerprint anywhere."""

    @abstractmethod
    def ref(self) -> InputRef:
        """What the source is, for the manifest."""

    @abstractmethod
    def attributes(self) -> dict[str, str]:
        """Attribute column → Arrow type (``string``, ``int64``, ``float64``, ``bool``)."""

    @abstractmethod
    def documents(self) -> Iterator[SourceDocument]:
        """The documents in their order."""

    @abstractmethod
    def queries(self) -> Iterator[SourceQuery]:
        """The queries of all splits in their order."""

    @abstractmethod
    def qrels(self) -> dict[str, Iterable[SourceQrel]]:
        """Split → its judgements."""

    def details(self) -> dict[str, Any]:
        """What else the manifest should say about the source."""
        return {}


def write_collection(source: Source, out: Path, *, sample: int | None = None, force: bool = False) -> Collection:
    """The collection artifact of ``source`` at ``out``; the existing one when it is the same work.

    Raises `UsageError` for a sample below 1, `DataError` for content that breaks an invariant.
    """
    if sample is not None and sample < 1:
        raise UsageError(f"--sample {sample}: a sample has at least 1 document")
    plan = Plan("collection", {"source": source.name, "sample": sample}, {"source": source.ref()})
    if plan.finished(out, force=force):
        return Collection.load(out)
    with plan.write(out, force=force) as draft:
        limit = None if sample is None else _sample_limit(source, sample)
        hashes = _write_documents(source, draft, limit)
        queries = _read_queries(source)
        splits = {split: _read_qrels(split, rows, hashes, queries, draft) for split, rows in source.qrels().items()}
        if limit is not None:
            splits = {split: _sampled(qrels, limit) for split, qrels in splits.items()}
            judged = {query_id for qrels in splits.values() for query_id in qrels}
            queries = {query_id: text for query_id, text in queries.items() if query_id in judged}
        write_queries(draft, queries)
        for split, qrels in splits.items():
            write_qrels(draft, split, qrels)
        draft.details.update({"splits": list(splits), **source.details()})
    return Collection.load(out)


def _sample_limit(source: Source, sample: int) -> int | None:
    """The largest id hash among the ``sample`` smallest; None when that is every document."""
    hashes = np.frombuffer(array("Q", (_hash_of_id(document) for document in source.documents())), dtype=np.uint64)
    return None if sample >= len(hashes) else int(np.partition(hashes, sample - 1)[sample - 1])


def _write_documents(source: Source, draft: Draft, limit: int | None) -> np.ndarray:
    """The sorted id hashes of all the source's documents, after those up to ``limit`` were written."""
    import pyarrow as pa

    attributes = _column_names(source.attributes())
    schema = pa.schema(
        [(name, pa.string()) for name in RESERVED]
        + [(column, pa.type_for_alias(attributes[name][1])) for name, (column, _) in attributes.items()]
    )
    all_ids, kept_ids, texts = array("Q"), array("Q"), array("Q")
    empty = 0
    with pa.OSFile(str(draft.path / "documents.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        batch: list[list[Any]] = []
        characters = 0
        for document in source.documents():
            number = _hash_of_id(document)
            all_ids.append(number)
            if limit is not None and number > limit:
                continue
            kept_ids.append(number)
            text = model_text(document.title, document.text)
            if text:
                texts.append(_hash(text, document.place))
            else:
                empty += 1
            values = [document.attributes.get(name) for name in attributes]
            batch.append([document.id, document.title, document.text, *values])
            characters += len(text)
            if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
                writer.write_batch(_record_batch(batch, schema, document.place))
                batch, characters = [], 0
        if batch:
            writer.write_batch(_record_batch(batch, schema, document.place))
    if not all_ids:
        raise DataError(f"{source.name}: there are no documents")
    sorted_ids = np.sort(np.frombuffer(all_ids, dtype=np.uint64))
    _refuse_repeated_ids(source, sorted_ids)
    _write_lookup(draft, np.frombuffer(kept_ids, dtype=np.uint64))
    repeated_texts = len(texts) - len(np.unique(np.frombuffer(texts, dtype=np.uint64))) if texts else 0
    draft.counts.update(documents=len(kept_ids), empty_documents=empty, duplicate_texts=repeated_texts)
    return sorted_ids


def _column_names(attributes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Attribute → (its column, its type); a name that the documents' own columns have gets an underscore."""
    taken = {*RESERVED, *attributes}
    columns = {}
    for name, kind in attributes.items():
        column = name
        while column in RESERVED or (column != name and column in taken):
            column += "_"
        taken.add(column)
        columns[name] = (column, kind)
    return columns


def _record_batch(rows: list[list[Any]], schema: Any, place: str) -> Any:
    import pyarrow as pa

    columns = zip(*rows, strict=True)
    try:
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    except (UnicodeEncodeError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{place}: in the {len(rows)} documents up to here an attribute is unusable: {error}"
        ) from error
    return pa.record_batch(arrays, schema=schema)


def _refuse_repeated_ids(source: Source, sorted_hashes: np.ndarray) -> None:
    """Raises `DataError` at the place of the first repeated id; equal hashes of different ids are no repetition."""
    suspects = set(sorted_hashes[1:][sorted_hashes[1:] == sorted_hashes[:-1]].tolist())
    if not suspects:
        return
    seen: dict[str, str] = {}
    repeated: list[tuple[str, str]] = []
    for document in source.documents():
        if id_hash(document.id) in suspects:
            if document.id in seen:
                repeated.append((document.place, document.id))
            seen.setdefault(document.id, document.place)
    if repeated:
        place, doc_id = repeated[0]
        more = f"; {len(repeated)} repetitions in all" if len(repeated) > 1 else ""
        raise DataError(f"{place}: document id {doc_id!r} is already at {seen[doc_id]}; ids are unique{more}")


def _write_lookup(draft: Draft, hashes: np.ndarray) -> None:
    """Writes lookup.npy [2, n] uint64: the id hashes in order, and below each the row it belongs to."""
    order = np.argsort(hashes, kind="stable")
    np.save(draft.path / "lookup.npy", np.stack([hashes[order], order.astype(np.uint64)]))


def _read_queries(source: Source) -> dict[str, str]:
    queries: dict[str, str] = {}
    places: dict[str, str] = {}
    for query in source.queries():
        place, query_id, text = query
        _hash_of_id(query)
        _hash(text, place)
        if query_id in queries:
            raise DataError(f"{place}: query id {query_id!r} is already at {places[query_id]}; ids are unique")
        queries[query_id], places[query_id] = text, place
    return queries


Qrels = dict[str, dict[str, int]]


def _read_qrels(
    split: str, rows: Iterable[SourceQrel], hashes: np.ndarray, queries: Mapping[str, str], draft: Draft
) -> Qrels:
    """Query id → document id → relevance. Raises `DataError` for unknown ids and contradictions."""
    if split == ALL:
        raise DataError(f"a split cannot be called '{ALL}', which means every query; rename it")
    found: Qrels = {}
    doc_places: dict[str, str] = {}
    unknown_queries: dict[str, str] = {}
    repeated = 0
    for place, query_id, doc_id, relevance in rows:
        doc_places.setdefault(doc_id, place)
        if query_id not in queries:
            unknown_queries.setdefault(query_id, place)
        judged = found.setdefault(query_id, {})
        if doc_id not in judged:
            judged[doc_id] = relevance
        elif judged[doc_id] == relevance:
            repeated += 1
        else:
            raise DataError(
                f"{place}: query {query_id!r} and document {doc_id!r} were judged {judged[doc_id]} before "
                f"and {relevance} here; keep one of them"
            )
    if not found:
        raise DataError(f"split '{split}' has no judgements; remove it from the source or fill it")
    _refuse_unknown(f"the qrels of split '{split}' name", "document", _not_in(hashes, doc_places))
    _refuse_unknown(f"the qrels of split '{split}' name", "query", unknown_queries)
    draft.counts["repeated_qrels"] = draft.counts.get("repeated_qrels", 0) + repeated
    return found


def _not_in(sorted_hashes: np.ndarray, places: Mapping[str, str]) -> dict[str, str]:
    """The ids of ``places`` (id → where it was read) whose hash is not among ``sorted_hashes``."""
    numbers = np.array([_hash(doc_id, place) for doc_id, place in places.items()], dtype=np.uint64)
    nearest = sorted_hashes[np.minimum(np.searchsorted(sorted_hashes, numbers), len(sorted_hashes) - 1)]
    missing = nearest != numbers
    return {doc_id: place for (doc_id, place), gone in zip(places.items(), missing, strict=True) if gone}


def _refuse_unknown(naming: str, what: str, unknown: Mapping[str, str]) -> None:
    if unknown:
        place = next(iter(unknown.values()))
        raise DataError(f"{place}: {naming} {len(unknown)} unknown {what} ids: {first(unknown)}")


def _sampled(qrels: Qrels, limit: int) -> Qrels:
    """The judgements of documents in the sample, for the queries that keep a relevant one."""
    kept = {
        query_id: {doc_id: relevance for doc_id, relevance in judged.items() if id_hash(doc_id) <= limit}
        for query_id, judged in qrels.items()
    }
    return {query_id: judged for query_id, judged in kept.items() if any(value > 0 for value in judged.values())}


def write_queries(draft: Draft, queries: Mapping[str, str]) -> None:
    """Writes and counts the queries (id → text) of a collection's draft."""
    import pyarrow as pa

    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    items = list(queries.items())
    with pa.OSFile(str(draft.path / "queries.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(items), BATCH_ROWS):
            ids, texts = zip(*items[start : start + BATCH_ROWS], strict=True)
            writer.write_batch(pa.record_batch([pa.array(ids), pa.array(texts)], schema=schema))
    draft.counts["queries"] = len(items)
    draft.counts["empty_queries"] = sum(not text.strip() for text in queries.values())


def write_qrels(draft: Draft, split: str, qrels: Qrels) -> None:
    """Writes and counts the judgements of one split of a collection's draft."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(query_id, doc_id, value) for query_id, judged in qrels.items() for doc_id, value in judged.items()]
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    schema = pa.schema(list(zip(QREL_COLUMNS, (pa.string(), pa.string(), pa.int32()), strict=True)))
    (draft.path / "qrels").mkdir(exist_ok=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    pq.write_table(pa.table(arrays, schema=schema), draft.path / "qrels" / f"{split}.parquet")
    draft.counts[f"qrels_{split}"] = len(rows)


def _hash(text: str, place: str) -> int:
    """The text's 64-bit hash; `DataError` for what is not valid Unicode (a lone surrogate)."""
    try:
        return id_hash(text)
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {first([text])} is not valid Unicode ({error.reason})") from error


def _hash_of_id(item: SourceDocument | SourceQuery) -> int:
    if not item.id:
        raise DataError(f"{item.place}: the id is empty")
    return _hash(item.id, item.place)
