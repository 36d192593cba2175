"""The queries of a log: real ones, without any document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.score_formats.lines import blocks
from retrieval_kd.errors import DataError, InputError, UsageError
from retrieval_kd.fingerprint import file_sha256
from retrieval_kd.queries.base import QueriesRecipe, QueryMaker, RawQuery

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

FORMATS = (".txt", ".tsv", ".jsonl")


class QueryLogRecipe(QueriesRecipe):
    """Keys of ``kind: query-log``."""

    kind: Literal["query-log"]
    column: int = Field(default=2, ge=1)
    """Of a .tsv file: the column of the query, counted from 1."""
    field: str = "text"
    """Of a .jsonl file: the key of the query."""
    lines: int | None = Field(default=None, ge=1)
    """So many lines at random, in the log's order; all when not given."""


class QueryLog(QueryMaker):
    """The queries of a file: .txt (a query a line), .tsv or .jsonl, each also with .gz. Blank lines are skipped.

    Raises `UsageError` when no file is given, `InputError` when it is not there or of another format.
    """

    Recipe = QueryLogRecipe
    recipe: QueryLogRecipe

    def __init__(self, recipe: Any, query_log: Path | None = None) -> None:
        super().__init__(recipe)
        if query_log is None:
            raise UsageError("kind 'query-log' needs a file of queries: give --query-log FILE")
        if not query_log.is_file():
            raise InputError(f"{query_log}: no such file; give a query log ({', '.join(FORMATS)}, each also .gz)")
        self.path = query_log
        self.format = Path(query_log.name.removesuffix(".gz")).suffix
        if self.format not in FORMATS:
            raise InputError(f"{query_log}: a query log ends in {', '.join(FORMATS)}, each also with .gz")

    def refs(self) -> dict[str, InputRef]:
        """The bytes of the log."""
        return {"query_log": InputRef(file_sha256(self.path), name=self.path.name)}

    def details(self) -> dict[str, Any]:
        """The log's name."""
        return {"query_log": self.path.name}

    def raw(self, collection: Collection, work: Path) -> Iterator[RawQuery]:
        """The chosen queries in the log's order."""
        found = list(self._queries())
        self.counts["log_lines"] = len(found)
        chosen = np.random.default_rng(self.recipe.seed).permutation(len(found))[: self.recipe.lines]
        for i in np.sort(chosen):
            number, text = found[i]
            yield RawQuery(text, None, number)

    def estimate(self, collection: Collection) -> dict[str, Any]:
        """The lines of the log that are not blank."""
        lines = sum(1 for _ in self._queries())
        return {"log_lines": lines, "queries_at_most": min(lines, self.recipe.lines or lines)}

    def _queries(self) -> Iterator[tuple[int, str]]:
        """Line number and query of each line that is not blank."""
        for start, lines in blocks(self.path):
            for number, line in enumerate(lines, start):
                try:
                    text = line.decode().rstrip("\r")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{self.path}:{number}: not valid UTF-8 ({error.reason}); convert the file to UTF-8"
                    ) from error
                if text.strip():
                    yield number, self._query(text, f"{self.path}:{number}")

    def _query(self, line: str, place: str) -> str:
        if self.format == ".txt":
            return line
        if self.format == ".tsv":
            columns = line.split("\t")
            if len(columns) < self.recipe.column:
                raise DataError(
                    f"{place}: {len(columns)} tab-separated columns, the query is in column {self.recipe.column} "
                    "(--set column=1 for the first)"
                )
            return columns[self.recipe.column - 1]
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not valid JSON ({error})") from error
        key = self.recipe.field
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise DataError(f"{place}: {line[:40]!r} has no text '{key}' (--set field=… names another key)")
        return str(entry[key])
