"""Some documents of collections as a collection: for indexes of texts that are built in pieces, or built anew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from retrieval_kd.data.collection import Collection, Documents


class CollectionRows(Collection):
    """The documents whose row i is row ``row_of[i]`` of ``parts[part_of[i]]``, still memory-mapped.

    Queries, judgements and attributes are not among them.
    """

    def __init__(self, parts: Sequence[Collection], part_of: np.ndarray, row_of: np.ndarray) -> None:
        super().__init__(parts[0].path, parts[0].manifest)
        self._parts, self._part_of, self._row_of = parts, part_of, row_of

    @classmethod
    def of_range(cls, whole: Collection, start: int, stop: int) -> CollectionRows:
        """The rows ``start`` to ``stop`` of ``whole``."""
        return cls([whole], np.zeros(stop - start, dtype=np.int64), np.arange(start, stop))

    @property
    def fingerprint(self) -> str:
        """A hash of the parts' fingerprints and the rows."""
        found = hashlib.sha256(b"".join(part.fingerprint.encode() for part in self._parts))
        found.update(np.stack([self._part_of, self._row_of]).astype(np.int64).tobytes())
        return found.hexdigest()

    @cached_property
    def documents(self) -> Documents:
        """The documents, memory-mapped."""
        return _DocumentRows([part.documents for part in self._parts], self._part_of, self._row_of)


class _DocumentRows(Documents):
    def __init__(self, parts: Sequence[Documents], part_of: np.ndarray, row_of: np.ndarray) -> None:
        self._place = parts[0]._place
        self._parts, self._part_of, self._row_of = parts, part_of, row_of

    def __len__(self) -> int:
        return len(self._row_of)

    @cached_property
    def ids(self) -> Any:
        import pyarrow as pa

        ids = np.empty(len(self), dtype=object)
        for i, part in enumerate(self._parts):
            mine = self._part_of == i
            ids[mine] = part.ids.take(pa.array(self._row_of[mine])).to_pylist()
        return pa.chunked_array([pa.array(ids, pa.string())])

    @property
    def attributes(self) -> list[str]:
        return []

    def iter_texts(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        return map(self.text, range(start, len(self) if stop is None else stop))

    def _cell(self, column: str, row: int) -> Any:
        return self._parts[int(self._part_of[row])]._cell(column, int(self._row_of[row]))

    def _lookup(self, doc_ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = pc.index_in(pa.array(doc_ids, pa.string()), value_set=self.ids.combine_chunks()).fill_null(-1)
        found = rows.to_numpy().astype(np.int64)
        return found, [doc_ids[i] for i in np.flatnonzero(found < 0).tolist()]
