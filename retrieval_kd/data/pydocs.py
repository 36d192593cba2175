"""The built-in collection: the running interpreter's standard library, read offline in a child process."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import id_hash, model_text
from retrieval_kd.data.collection_writer import Source, SourceDocument, SourceQrel, SourceQuery
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.fingerprint import file_sha256

READER = Path(__file__).with_name("pydocs_reader.py")
TIMEOUT_SECONDS = 300
QUERY_WORDS = range(5, 41)
"""A first paragraph of this many words is a query."""

_PARAGRAPH_END = re.compile(r"\n\s*\n")


class PydocsSource(Source):
    """Docstrings of public modules, classes, functions and methods; a first paragraph asks for its own document.

    A document's title is its qualified name and signature, its text the docstring after the first paragraph. The
    first paragraph, if it has 5 to 40 words, is a query with this one relevant document. Of documents with the same
    title and text, and of queries with the same text, only the first in the order of document ids is kept.
    """

    name = "pydocs"

    def ref(self) -> InputRef:
        """The Python build, the platform and the reader: together they decide what is read."""
        build = [sys.version, platform.platform(), file_sha256(READER)]
        return InputRef(
            hashlib.sha256(json.dumps(build).encode()).hexdigest(), name=f"Python {platform.python_version()}"
        )

    def attributes(self) -> dict[str, str]:
        """The module, and whether it is a module, class, function or method."""
        return {"module": "string", "type": "string"}

    def documents(self) -> Iterator[SourceDocument]:
        """The documents in the order of their ids."""
        for entry in self._entries:
            attributes = {"module": entry["module"], "type": entry["type"]}
            yield SourceDocument(_place(entry), entry["id"], entry["title"], _split_doc(entry)[1], attributes)

    def queries(self) -> Iterator[SourceQuery]:
        """A query for each document whose first paragraph can be one and was not seen before."""
        for entry, text in self._asking:
            yield SourceQuery(_place(entry), query_id_of(entry["id"]), text)

    def qrels(self) -> dict[str, Iterable[SourceQrel]]:
        """About 70 % train, 10 % dev, 20 % test, by a hash of the document's id."""
        splits: dict[str, list[SourceQrel]] = {"train": [], "dev": [], "test": []}
        for entry, _ in self._asking:
            qrel = SourceQrel(_place(entry), query_id_of(entry["id"]), entry["id"], 1)
            splits[split_of(entry["id"])].append(qrel)
        return {split: qrels for split, qrels in splits.items() if qrels}

    def details(self) -> dict[str, Any]:
        """What the reader could not import on this platform, and how many repetitions were left out."""
        return {
            "modules_not_importable": self._read[0],
            "repeated_documents_left_out": len(self._read[1]) - len(self._entries),
            "repeated_queries_left_out": sum(_asks(entry) for entry in self._entries) - len(self._asking),
        }

    @cached_property
    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        return read_standard_library()

    @cached_property
    def _entries(self) -> list[dict[str, str]]:
        """One object for each title and text, in the order of ids."""
        first: dict[str, dict[str, str]] = {}
        for entry in sorted(self._read[1], key=lambda entry: entry["id"]):
            first.setdefault(model_text(entry["title"], _split_doc(entry)[1]), entry)
        return list(first.values())

    @cached_property
    def _asking(self) -> list[tuple[dict[str, str], str]]:
        """The objects whose first paragraph is a query, and the query."""
        first: dict[str, dict[str, str]] = {}
        for entry in self._entries:
            if _asks(entry):
                first.setdefault(_split_doc(entry)[0], entry)
        return [(entry, text) for text, entry in first.items()]


def read_standard_library() -> tuple[list[str], list[dict[str, str]]]:
    """The modules that cannot be imported here, and one entry (id, title, module, type, doc) for each object.

    A child process imports the modules, so nothing is imported here. Raises `RetrievalKDError` when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="retrieval-kd-pydocs-") as folder:
        out, log = Path(folder, "docs.jsonl"), Path(folder, "log")
        cwd = Path(folder, "cwd")
        cwd.mkdir()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        # Sets are shown in signatures in the order of their hashes.
        environment |= {"PYTHONHASHSEED": "0", "TMPDIR": str(cwd)}
        command = [sys.executable, "-s", "-S", "-P", "-B", str(READER), str(out)]
        with log.open("wb") as silent:
            try:
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=silent, stderr=silent, cwd=cwd, env=environment,
                    timeout=TIMEOUT_SECONDS, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise RetrievalKDError(f"pydocs: reading the library took over {TIMEOUT_SECONDS} seconds") from None
        if code != 0:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RetrievalKDError(
                f"pydocs: {sys.executable} failed ({code}): {said[-1] if said else 'it said nothing'}"
            )
        with out.open(encoding="utf-8") as lines:
            head = json.loads(next(lines))
            return head["unimportable"], [json.loads(line) for line in lines]


def query_id_of(doc_id: str) -> str:
    """The id of the query that a document's first paragraph is."""
    return f"q:{doc_id}"


def split_of(doc_id: str) -> str:
    """``train``, ``dev`` or ``test``: the same for the same id everywhere."""
    part = id_hash(doc_id) % 100
    return "train" if part < 70 else "dev" if part < 80 else "test"


def _split_doc(entry: dict[str, str]) -> tuple[str, str]:
    """The first paragraph of a docstring in one line, and the rest."""
    head, *rest = _PARAGRAPH_END.split(entry["doc"], maxsplit=1)
    return " ".join(head.split()), rest[0].strip() if rest else ""


def _asks(entry: dict[str, str]) -> bool:
    return len(_split_doc(entry)[0].split()) in QUERY_WORDS


def _place(entry: dict[str, str]) -> str:
    return f"pydocs: {entry['id']}"
