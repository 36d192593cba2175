"""Attributes of the documents beside an index, and filters over them: ``year >= 2020``, ``lang in en,de``."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrieval_kd.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

ATTRIBUTES = "attributes.arrow"
_STEP = 65536
"""Documents whose attributes are copied at a time."""

_FILTER = re.compile(
    r"^\s*(?P<field>.+?)\s*(?:(?P<sign>!=|<=|>=|=|<|>)(?![=<>])|\s(?P<word>in)\s)(?P<value>.*)$", re.DOTALL
)
_QUOTED = re.compile(r'"([^"]|"")*"')
_COMPARE = {
    "=": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}


class Filter(NamedTuple):
    """One condition on an attribute: its name, the operator, and the value as it was written."""

    field: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Filter:
        """The condition that ``text`` writes; `UsageError` when it is none."""
        found = _FILTER.match(text)
        if found is None:
            raise UsageError(
                f"filter {text!r}: write it as 'field = value', with one of = != < <= > >=, or 'field in a,b'"
            )
        return cls(found["field"], found["sign"] or found["word"], found["value"].strip())


def attributes_of(collection: Collection, ids: Sequence[str] | None = None) -> Any:
    """The Arrow table of the attributes of all documents, or of ``ids`` in this order; None when there are none."""
    import pyarrow as pa

    names = collection.documents.attributes
    if not names:
        return None
    with pa.memory_map(str(collection.path / "documents.arrow")) as source:
        table = pa.ipc.open_file(source).read_all().select(names)
    if ids is None or collection.documents.ids.to_pylist() == ids:
        return table
    rows = collection.documents.rows(ids)
    return pa.concat_tables([table.take(rows[i : i + _STEP]) for i in range(0, len(rows), _STEP)])


def write_attributes(path: Path, table: Any) -> None:
    """Writes a table as the Arrow file ``path``, in batches."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=_STEP):
            writer.write_batch(batch)


def read_attributes(path: Path) -> Any:
    """The Arrow table in ``path``, memory-mapped; None where there is no file."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all() if path.is_file() else None


def joined(first: Any, rows: int, second: Any, more: int) -> Any:
    """The table of two parts with ``rows`` and ``more`` documents; what a part has no column for is null.

    None when neither has any. Raises `DataError` for a column of types that do not go together.
    """
    import pyarrow as pa

    if first is None and second is None:
        return None
    known = first if second is None else second
    empty = {field.name: field.type for field in known.schema}
    parts = [
        part if part is not None else pa.table({name: pa.nulls(number, kind) for name, kind in empty.items()})
        for part, number in ((first, rows), (second, more))
    ]
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the attributes of the new documents do not fit those of the index: {error}") from error


def matching(table: Any, filters: Sequence[str], where: str) -> np.ndarray:
    """Whether each document [n] fulfils every one of ``filters``; one without the attribute (null) fulfils none.

    Raises `UsageError` for an unknown field, or a value that its column cannot have.
    """
    if table is None:
        raise UsageError(
            f"{where}: has no attributes to filter by; build it from vectors with --collection C, "
            "whose documents have some"
        )
    found = np.ones(table.num_rows, dtype=bool)
    for text in filters:
        found &= _matching_one(table, Filter.parse(text), text)
    return found


def _matching_one(table: Any, condition: Filter, text: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    names = table.column_names
    if condition.field not in names:
        suggestion = did_you_mean(condition.field, names)
        raise UsageError(
            f"filter {text!r}: no attribute '{condition.field}'{suggestion}; there are: {', '.join(names)}"
        )
    column = table[condition.field]
    listed = [condition.value]
    if condition.operator == "in" or _QUOTED.fullmatch(condition.value):
        listed = next(csv.reader([condition.value], skipinitialspace=True), [])
    try:
        values = pa.array([value.strip() for value in listed], pa.string()).cast(column.type)
        if condition.operator == "in":
            matches = pc.and_(pc.is_in(column, value_set=values), pc.is_valid(column))
        else:
            matches = getattr(pc, _COMPARE[condition.operator])(column, values[0])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(
            f"filter {text!r}: '{condition.field}' is a column of {column.type}; "
            f"{condition.value!r} cannot be compared with it by {condition.operator}"
        ) from error
    return np.asarray(matches.fill_null(False).to_numpy(), dtype=bool)
