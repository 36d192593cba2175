"""``st-pickle``: a pickled ``{query id: {document id: score}}``, read without running anything that it names.

The layout of the cross-encoder scores beside sentence-transformers' hard negatives. A pickle is a program; this
reader refuses one that asks for any name (classes, functions, NumPy scalars), so that only dicts, strings and numbers
can come out. A pickle is the one layout that is held in memory as a whole.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.score_formats.lines import opened
from retrieval_kd.data.score_formats.pairs import Pairs, Row, batches, identifier
from retrieval_kd.errors import DataError

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source

# What the unpickler raises for malformed bytes: MemoryError and OverflowError for a length that cannot be true.
_MALFORMED = (
    pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, ImportError, MemoryError,
    OverflowError,
)  # fmt: skip


class _Plain(pickle.Unpickler):
    """Every opcode that reaches code goes through one of these two."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module_name}.{global_name}; only plain dicts, strings and numbers are read"
        )

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError(f"it asks for the persistent object {pid!r:.40}")


def read(source: Source) -> Iterator[Pairs]:
    """The pairs of each entry. Raises `DataError` for a pickle of anything else, before any of it runs."""
    return batches(source, _rows(source))


def _rows(source: Source) -> Iterator[Row]:
    with opened(source.path) as file:
        try:
            entries = _Plain(file).load()
        except _MALFORMED as error:
            raise DataError(f"{source.path}: refused pickle ({str(error) or type(error).__name__})") from error
    if not isinstance(entries, dict):
        raise DataError(f"{source.path}: a pickled {type(entries).__name__}, not {{query id: {{document id: score}}}}")
    for number, (query_id, scores) in enumerate(entries.items()):
        place = source.place(number)
        if not isinstance(scores, dict):
            raise DataError(f"{place}: query {query_id!r:.40} has {scores!r:.40}, not {{document id: score}}")
        doc_ids = [identifier(doc_id, "document id", place) for doc_id in scores]
        yield Row(number, identifier(query_id, "query id", place), doc_ids, list(scores.values()))
