"""What an engine is given of a document besides its vector: title, text and the attributes of a collection."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.engine_formats.names import field_names

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

ID, TITLE, TEXT, VECTOR = "id", "title", "text", "vector"
_OWN = (ID, TITLE, TEXT)


class Fields:
    """The columns of a collection's documents as fields of an engine; without a collection there are none."""

    def __init__(self, collection: Collection | None) -> None:
        self.collection = collection
        columns = [name for name in self._table.column_names if name not in _OWN] if collection else []
        self.names = field_names(columns, (*_OWN, VECTOR))
        """Attribute column → its field."""
        self.types = {self.names[column]: _type(self._table.schema.field(column).type) for column in columns}
        """Field of an attribute → ``string``, ``integer``, ``number`` or ``boolean``."""
        self.counts: Counter[str] = Counter()

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Field → value of the documents ``start`` to ``stop``, without empty titles and texts and what is missing.

        NaN and infinity, which JSON has not, are left out too and counted.
        """
        if self.collection is None:
            return [{} for _ in range(start, stop)]
        rows = self._table.slice(start, stop - start).to_pylist()
        return [
            {self.names.get(name, name): value for name, value in row.items() if self._holds(name, value)}
            for row in rows
        ]

    def _holds(self, name: str, value: Any) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            self.counts["attributes_not_finite"] += 1
            return False
        return value is not None and (value != "" or name not in (TITLE, TEXT))

    @cached_property
    def _table(self) -> Any:
        import pyarrow as pa

        assert self.collection is not None
        table = pa.ipc.open_file(pa.memory_map(str(self.collection.path / "documents.arrow"))).read_all()
        return table.drop_columns([ID])


def _type(arrow: Any) -> str:
    import pyarrow as pa

    if pa.types.is_boolean(arrow):
        return "boolean"
    if pa.types.is_integer(arrow):
        return "integer"
    return "number" if pa.types.is_floating(arrow) else "string"
