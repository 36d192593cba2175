"""Records in JSON Lines or Parquet: read one at a time, written a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.data.score_formats.lines import json_line, json_objects, writing
from retrieval_kd.errors import DataError, InputError, UsageError

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source

PARQUET = ".parquet"
JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_ROWS_AT_ONCE = 1024

STRING, STRINGS, SCORES = "string", "strings", "scores"
"""What a column holds."""


def read_records(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place and content of each record; numbers of JSON are `Number` texts.

    Raises `UsageError` for a file whose name ends neither in ``.parquet`` nor in ``.jsonl``.
    """
    if _is_parquet(source.path):
        return _parquet_rows(source)
    return json_objects(source)


def refuse_suffix(path: Path, layout: str, suffixes: tuple[str, ...]) -> None:
    """Raises `UsageError` for a name that ends in none of ``suffixes``, or, without any, as a file of records does."""
    name = path.name.lower()
    if suffixes and not name.endswith(suffixes):
        kinds = " or ".join(suffix for suffix in (PARQUET, JSON[0]) if suffix in suffixes)
        raise UsageError(f"{path}: {layout} is written as {kinds}; end the name so")
    if not suffixes and name.removesuffix(".gz").endswith((PARQUET, *JSON)):
        raise UsageError(f"{path}: {layout} is written as plain lines, not as this name says; end it in .tsv or .txt")


@contextmanager
def record_writer(path: Path, columns: Mapping[str, str]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds a record to a new file: Parquet or JSON Lines, as the name ends.

    ``columns`` are name → `STRING`, `STRINGS` or `SCORES` (float32 arrays), in order. Raises `UsageError` for other
    names of files.
    """
    if not _is_parquet(path):
        with writing(path) as file:

            def add_line(record: dict[str, Any]) -> None:
                file.write(json_line(record))

            yield add_line
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {STRING: pa.string(), STRINGS: pa.list_(pa.string()), SCORES: pa.list_(pa.float32())}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    pending: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as table:

        def flush() -> None:
            arrays = [pa.array([record[field.name] for record in pending], field.type) for field in schema]
            table.write_table(pa.table(arrays, schema=schema))
            pending.clear()

        def add(record: dict[str, Any]) -> None:
            pending.append(record)
            if len(pending) == _ROWS_AT_ONCE:
                flush()

        yield add
        flush()


def _parquet_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(source.path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for record in batch.to_pylist():
                    yield number, record
                    number += 1
    except pa.ArrowInvalid as error:
        raise DataError(f"{source.path}: not a Parquet file ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read ({error})") from error


def _is_parquet(path: Path) -> bool:
    if path.name.lower().endswith(PARQUET):
        return True
    if path.name.lower().endswith(JSON):
        return False
    raise UsageError(f"{path}: end its name in {PARQUET} or {JSON[0]}, which says what kind of file it is")
