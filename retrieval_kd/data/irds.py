"""Reads datasets of ir_datasets, which downloads them to its own folder on first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any, get_type_hints

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection_writer import Source, SourceDocument, SourceQrel, SourceQuery
from retrieval_kd.errors import DataError, InputError, did_you_mean

_SPLITS = ("train", "dev", "validation", "valid", "val", "test")
_TEXT_FIELDS = ("doc_id", "title", "text")


class IrdsSource(Source):
    """One dataset id, or several with commas: documents of the first, queries and qrels of each as a split.

    The split is called as the last part of the id if that is train, dev, validation, valid, val or test (``dev`` of
    ``msmarco-passage/dev/small``), else ``test``.
    """

    def __init__(self, ids: str) -> None:
        self._ids = [part.strip().removeprefix("irds:") for part in ids.split(",")]
        self.name = "irds:" + ",".join(self._ids)
        for i, name in enumerate(self._ids):
            if not name or name in self._ids[:i]:
                raise InputError(f"irds:{ids}: {'names ' + name + ' twice' if name else 'an id is empty'}")
        self._split_of = {name: split_name(name) for name in self._ids}
        if len(set(self._split_of.values())) != len(self._ids):
            raise InputError(f"irds:{ids}: two of these would be the same split; make a collection of each")

    def ref(self) -> InputRef:
        """The dataset ids and the version of ir_datasets; what an id names does not change."""
        text = json.dumps([self._ids, metadata.version("ir_datasets")])
        return InputRef(hashlib.sha256(text.encode()).hexdigest(), name=self.name)

    def attributes(self) -> dict[str, str]:
        """The document type's other string fields."""
        fields = get_type_hints(self._load(self._ids[0]).docs_cls())
        return {name: "string" for name, kind in fields.items() if name not in _TEXT_FIELDS and kind is str}

    def documents(self) -> Iterator[SourceDocument]:
        """The documents of the first dataset: ``title`` if there is one, and ``text`` or else the default text."""
        columns = list(self.attributes())
        for place, doc in self._records(self._ids[0], "document", "docs_iter"):
            title = _string(getattr(doc, "title", None) or "", place)
            text = _string(doc.text if hasattr(doc, "text") else doc.default_text(), place)
            if not hasattr(doc, "text"):
                text = text.removeprefix(title).strip()  # the default text begins with the title
            values = {name: getattr(doc, name) for name in columns}
            yield SourceDocument(place, _string(doc.doc_id, place), title, text, values)

    def queries(self) -> Iterator[SourceQuery]:
        """The queries of every dataset; one that several share is given once."""
        seen: dict[str, tuple[str, str]] = {}
        for name in filter(lambda name: self._load(name).has_queries(), self._ids):
            for place, query in self._records(name, "query", "queries_iter"):
                text = _string(query.default_text(), place)
                former = seen.setdefault(query.query_id, (name, text))
                if former == (name, text) or former[1] != text:
                    yield SourceQuery(place, _string(query.query_id, place), text)

    def qrels(self) -> dict[str, Iterable[SourceQrel]]:
        """The judgements of each dataset that has some."""
        return {split: self._judgements(name) for name, split in self._split_of.items() if self._load(name).has_qrels()}

    def _judgements(self, name: str) -> Iterator[SourceQrel]:
        for place, qrel in self._records(name, "qrel", "qrels_iter"):
            yield SourceQrel(place, qrel.query_id, qrel.doc_id, int(qrel.relevance))

    def _records(self, name: str, what: str, iterator: str) -> Iterator[tuple[str, Any]]:
        try:
            for number, record in enumerate(getattr(self._load(name), iterator)(), start=1):
                yield f"irds:{name}: {what} {number}", record
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            raise InputError(f"irds:{name}: cannot be downloaded or read ({error})") from error

    def _load(self, name: str) -> Any:
        import ir_datasets

        try:
            dataset = ir_datasets.load(name)
        except KeyError:
            known = list(ir_datasets.registry)
            raise InputError(f"irds:{name}: ir_datasets knows no such id{_near(name, known)}") from None
        needed = "docs" if name == self._ids[0] else "queries"
        if not getattr(dataset, f"has_{needed}")():
            raise InputError(f"irds:{name}: has no {needed}")
        return dataset


def split_name(dataset_id: str) -> str:
    """The split that a dataset id names, ``test`` when it names none."""
    parts = [part for part in dataset_id.split("/") if part in _SPLITS]
    return parts[-1] if parts else "test"


def _near(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else "; see https://ir-datasets.com for its ids"


def _string(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {value!r} is not a string")
    return value
