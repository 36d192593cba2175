"""Reads a BEIR folder: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection_writer import Source, SourceDocument, SourceQrel, SourceQuery
from retrieval_kd.errors import DataError, InputError
from retrieval_kd.fingerprint import file_sha256

_OWN_KEYS = ("_id", "title", "text")
_SCORE_HEADERS = ("score", "relevance", "label")
_INT64 = range(-(2**63), 2**63)


class BeirSource(Source):
    """A BEIR folder. Other keys of the corpus, ``metadata`` too, become attribute columns.

    Values of one type keep it (whole numbers int64, with fractions among them float64); objects and lists become
    JSON text; a key whose values differ in type becomes strings. A key that is always empty gives no column.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self._folder = folder
        self._corpus = folder / "corpus.jsonl"
        self._queries = folder / "queries.jsonl"
        self._qrels = sorted((folder / "qrels").glob("*.tsv"))
        for path in (self._corpus, self._queries):
            if not path.is_file():
                raise InputError(f"{path}: not there; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/*.tsv")
        self._types: dict[str, str] | None = None

    def ref(self) -> InputRef:
        """The bytes of the folder's files."""
        files = {path.relative_to(self._folder).as_posix(): file_sha256(path) for path in self.files()}
        text = json.dumps(files, sort_keys=True)
        # A name, not a path: only artifacts are found again by their path.
        return InputRef(hashlib.sha256(text.encode()).hexdigest(), name=str(self._folder.resolve()))

    def files(self) -> list[Path]:
        """The files that are read."""
        return [self._corpus, self._queries, *self._qrels]

    def attributes(self) -> dict[str, str]:
        """The columns that a first pass over the corpus finds, in the order their keys appear."""
        if self._types is None:
            kinds: dict[str, set[str]] = {}
            for _, entry in _json_lines(self._corpus):
                for key, value in entry.items():
                    if key not in _OWN_KEYS and value not in (None, {}, []):
                        kinds.setdefault(key, set()).add(_kind(value))
            self._types = {key: _common(found) for key, found in kinds.items()}
        return self._types

    def documents(self) -> Iterator[SourceDocument]:
        """The lines of corpus.jsonl; a missing title is empty."""
        types = self.attributes()
        for place, entry in _json_lines(self._corpus):
            title = "" if entry.get("title") is None else _text(entry, "title", place)
            values = {key: _as(kind, entry.get(key)) for key, kind in types.items()}
            yield SourceDocument(place, _text(entry, "_id", place), title, _text(entry, "text", place), values)

    def queries(self) -> Iterator[SourceQuery]:
        """The lines of queries.jsonl."""
        for place, entry in _json_lines(self._queries):
            yield SourceQuery(place, _text(entry, "_id", place), _text(entry, "text", place))

    def qrels(self) -> dict[str, Iterable[SourceQrel]]:
        """The files of qrels/, by their names."""
        return {path.stem: _qrels(path) for path in self._qrels}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not valid UTF-8 ({error.reason}); convert the file to UTF-8") from error
            if text.strip():
                yield place, text


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(path):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON ({error})") from error
        if not isinstance(entry, dict):
            raise DataError(f"{place}: {line[:40]!r} is not a JSON object; write {{'_id': …, 'text': …}}")
        yield place, entry


def _qrels(path: Path) -> Iterator[SourceQrel]:
    for number, (place, line) in enumerate(_lines(path)):
        columns = line.split("\t")
        if len(columns) != 3:
            raise DataError(f"{place}: {len(columns)} tab-separated columns; a line has 3 (query-id corpus-id score)")
        if number == 0 and columns[2].strip().lower() in _SCORE_HEADERS:
            continue
        try:
            relevance = int(columns[2])
        except ValueError:
            raise DataError(f"{place}: score {columns[2]!r} is not a whole number") from None
        if relevance not in range(-(2**31), 2**31):
            raise DataError(f"{place}: score {relevance} does not fit into 32 bits")
        yield SourceQrel(place, columns[0], columns[1], relevance)


def _text(entry: dict[str, Any], key: str, place: str) -> str:
    if key not in entry:
        raise DataError(f"{place}: no '{key}'")
    value = entry[key]
    if not isinstance(value, str):
        raise DataError(f"{place}: '{key}' is {json.dumps(value)[:40]}, not a string; write it in quotes")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if value in _INT64 else "string"
    if isinstance(value, float):
        return "float64"
    return "string" if isinstance(value, str) else "json"


def _common(kinds: set[str]) -> str:
    """The column type for values of ``kinds``."""
    if kinds == {"int64", "float64"}:
        return "float64"
    (kind,) = kinds if len(kinds) == 1 else ("string",)
    return "string" if kind == "json" else kind


def _as(kind: str, value: Any) -> Any:
    """A value as its column holds it; what is empty is None."""
    if value in (None, {}, []):
        return None
    if kind == "string" and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == "float64" else value
