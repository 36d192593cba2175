"""Collections: documents with random access by row and by id, queries, and judgements per split, all on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrieval_kd.artifact import Artifact
from retrieval_kd.data.query_origins import QueryOrigin, origin_problems, read_origins
from retrieval_kd.errors import DataError, InputError, first

ALL = "all"
"""The split that means every query; no split of a source may be called so."""


class Document(NamedTuple):
    """One document as its source had it; an attribute that a document lacks is None."""

    id: str
    title: str
    text: str
    attributes: dict[str, Any]


class Collection(Artifact):
    """Documents, queries and judgements (qrels) per split."""

    kind = "collection"

    @property
    def name(self) -> str:
        """What the collection is called in tables: its source, and the sample's size if it is one."""
        recipe = self.manifest.recipe
        name = str(recipe["source"]).removeprefix("irds:")
        return name if recipe.get("sample") is None else f"{name}-sample-{recipe['sample']}"

    @cached_property
    def documents(self) -> Documents:
        """The documents, memory-mapped."""
        return Documents(self.path)

    @property
    def splits(self) -> list[str]:
        """The names of the splits that have qrels."""
        return list(self.manifest.details["splits"])

    @property
    def unjudged_splits(self) -> list[str]:
        """The names of the splits that have synthetic queries and no qrels."""
        return list(self.manifest.details.get("unjudged_splits", ()))

    @cached_property
    def origins(self) -> list[QueryOrigin]:
        """Where each synthetic query comes from; empty for a collection without any."""
        return read_origins(self.path)

    def queries(self, split: str) -> dict[str, str]:
        """Query id → text of the queries of ``split`` (those it judges, where it has qrels), in the source's order;
        ``all`` is every query.

        Raises `InputError` for an unknown split.
        """
        if split == ALL:
            return dict(self._queries)
        if split in self.unjudged_splits:
            members = {origin.query_id for origin in self.origins if origin.split == split}
        else:
            members = set(self._qrels_table(split)["query_id"].to_pylist())
        return {query_id: text for query_id, text in self._queries.items() if query_id in members}

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """Query id → document id → relevance of ``split``; 0 is judged not relevant.

        Raises `InputError` for an unknown split.
        """
        table = self._qrels_table(split)
        found: dict[str, dict[str, int]] = {}
        for query_id, doc_id, relevance in zip(*(table[name].to_pylist() for name in QREL_COLUMNS), strict=True):
            found.setdefault(query_id, {})[doc_id] = relevance
        return found

    def problems(self) -> list[str]:
        """Ids that are not unique or that the lookup does not find, qrels of unknown ids, and wrong counts."""
        found = self.documents.problems()
        counts = {"documents": len(self.documents), "queries": len(self._queries)}
        if len(self._queries) != _arrow_table(self.path / "queries.arrow").num_rows:
            found.append("query ids are not unique")
        for split in self.splits:
            table = self._qrels_table(split)
            counts[f"qrels_{split}"] = table.num_rows
            if len({*zip(table["query_id"].to_pylist(), table["doc_id"].to_pylist(), strict=True)}) != table.num_rows:
                found.append(f"qrels of split {split} judge a pair twice")
            known, queries = self.documents.known, self._queries
            found += _unknown(split, "document", (i for i in _distinct(table, "doc_id") if not known(i)))
            found += _unknown(split, "query", (i for i in _distinct(table, "query_id") if i not in queries))
        for name, count in counts.items():
            if self.manifest.counts.get(name) != count:
                found.append(f"{name}: {count} on disk, {self.manifest.counts.get(name)} in the manifest")
        return found + origin_problems(self)

    @cached_property
    def _queries(self) -> dict[str, str]:
        table = _arrow_table(self.path / "queries.arrow")
        return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))

    def _qrels_table(self, split: str) -> Any:
        import pyarrow.parquet as pq

        if split in self.unjudged_splits:
            raise InputError(
                f"{self.path}: split '{split}' has queries and no qrels; let a teacher say what is relevant "
                "(groups: {positive: teacher}), or name a split with qrels"
            )
        if split not in self.splits:
            splits = [*self.splits, *self.unjudged_splits]
            have = f"its splits: {', '.join(splits)}" if splits else "it has no judged split"
            raise InputError(f"{self.path}: no split '{split}' ({have}; '{ALL}' for every query)")
        return pq.read_table(self.path / "qrels" / f"{split}.parquet", memory_map=True, partitioning=None)


QREL_COLUMNS = ("query_id", "doc_id", "relevance")


class Documents:
    """The documents of a collection; nothing but the rows asked for is read from the disk."""

    def __init__(self, directory: Path) -> None:
        self._place = directory
        self._table = _arrow_table(directory / "documents.arrow")
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._table["id"].chunks)])
        self._hashes, self._rows = np.load(directory / "lookup.npy", mmap_mode="r")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def ids(self) -> Any:
        """The ids in row order, a `pyarrow.ChunkedArray` of strings."""
        return self._table["id"]

    @property
    def attributes(self) -> list[str]:
        """The names of the attribute columns."""
        return list(self._table.column_names[3:])

    def id(self, row: int) -> str:
        """The id of a row; `IndexError` outside the collection."""
        return str(self._cell("id", row))

    def ids_of(self, rows: Iterable[int]) -> list[str]:
        """The ids of rows, in the order given."""
        return [self.id(row) for row in rows]

    def row(self, doc_id: str) -> int:
        """The row of an id; `DataError` when it is unknown."""
        return int(self.rows([doc_id])[0])

    def rows(self, doc_ids: Sequence[str]) -> np.ndarray:
        """The rows [n] int64 of ids; `DataError` with the count and the first three of those that are unknown."""
        rows, missing = self._lookup(doc_ids)
        if missing:
            raise DataError(
                f"{self._place}: {len(missing)} of {len(doc_ids)} document ids are unknown: {first(missing)}; "
                "use the collection that they came from"
            )
        return rows

    def known(self, doc_id: str) -> bool:
        """Whether a document has this id."""
        return not self._lookup([doc_id])[1]

    def __getitem__(self, row: int) -> Document:
        attributes = {name: self._cell(name, row) for name in self.attributes}
        return Document(self.id(row), str(self._cell("title", row)), str(self._cell("text", row)), attributes)

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    def text(self, row: int) -> str:
        """What models read of a document: title and text joined by a space, stripped."""
        return model_text(self._cell("title", row), self._cell("text", row))

    def texts(self, rows: Iterable[int]) -> list[str]:
        """What models read of several documents, in the order given."""
        return [self.text(row) for row in rows]

    def iter_texts(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """What models read of the documents ``start`` to ``stop``, a batch at a time from the disk."""
        part = self._table.slice(start, max(0, (len(self) if stop is None else stop) - start))
        for batch in part.select(["title", "text"]).to_batches():
            for title, text in zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True):
                yield model_text(title, text)

    def problems(self) -> list[str]:
        """What is wrong with the ids or their lookup, in words."""
        found = []
        if len(self._rows) != len(self):
            return [f"lookup.npy has {len(self._rows)} entries for {len(self)} documents"]
        for chunk, start in zip(self.ids.chunks, self._starts, strict=False):
            ids = chunk.to_pylist()
            rows, missing = self._lookup(ids)
            if missing:
                found.append(f"lookup.npy does not find {len(missing)} ids: {first(missing)}")
            repeated = [ids[i] for i in np.flatnonzero((rows != np.arange(start, start + len(ids))) & (rows >= 0))]
            if repeated:
                found.append(f"document ids are not unique: {first(repeated)}")
        return found

    def _cell(self, column: str, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"{self._place}: no row {row}; there are {len(self)} documents")
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._table[column].chunk(chunk)[int(row - self._starts[chunk])].as_py()

    def _lookup(self, doc_ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """The rows [n] of ids (-1 where there is none), and the ids that are unknown."""
        wanted = np.array([id_hash(doc_id) for doc_id in doc_ids], dtype=np.uint64)
        places = np.searchsorted(self._hashes, wanted)
        rows = np.full(len(doc_ids), -1, dtype=np.int64)
        missing = []
        for i, (doc_id, place) in enumerate(zip(doc_ids, places, strict=True)):
            while place < len(self._hashes) and self._hashes[place] == wanted[i]:
                if self.id(int(self._rows[place])) == doc_id:
                    rows[i] = self._rows[place]
                    break
                place += 1
            else:
                missing.append(doc_id)
        return rows, missing


def id_hash(text: str) -> int:
    """The same 64-bit number for the same text on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def model_text(title: str, text: str) -> str:
    """What models read of a document."""
    return f"{title} {text}".strip()


def _arrow_table(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _distinct(table: Any, column: str) -> list[str]:
    return list(dict.fromkeys(table[column].to_pylist()))


def _unknown(split: str, what: str, ids: Iterable[str]) -> list[str]:
    missing = list(ids)
    return [f"qrels of split {split} name {len(missing)} unknown {what} ids: {first(missing)}"] if missing else []
