"""OpenSearch and Elasticsearch: bulk requests, a mapping, and an example of a query, which they read alike."""

from __future__ import annotations

import re
from abc import abstractmethod
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from retrieval_kd.data.engine_formats.engine import EngineFormat, json_text, with_vector
from retrieval_kd.data.engine_formats.fields import ID, TEXT, TITLE, VECTOR
from retrieval_kd.data.engine_formats.json_rows import maps_json
from retrieval_kd.data.engine_formats.names import TOKENS, TokenNames

_LONGEST_ID = 512
_LONGEST_KEYWORD = 8191
"""Characters, each of 4 bytes at most: Lucene's terms have at most 32,766 bytes."""
_TYPES = {
    "string": {"type": "keyword", "ignore_above": _LONGEST_KEYWORD},
    "integer": {"type": "long"},
    "number": {"type": "double"},
    "boolean": {"type": "boolean"},
}
_HITS = 10
_README = """
`mapping.json` is the body that makes an index, `bulk-*.ndjson` are the documents, each part one request. `load.sh`
makes the index and sends them; what follows its name is handed to curl (`-u user:password`):

```bash
URL=http://localhost:9200 INDEX=documents bash load.sh
```

`query.json` is a search, with the vector of one query (of a document, if no queries were exported):

```bash
curl -sS -X POST "http://localhost:9200/documents/_search" -H 'Content-Type: application/json' --data-binary @query.json
```
"""
_SPARSE = f"""
Names of features may hold no dot: `{TOKENS}` has the name of each token that got another one, and queries must use it
too. Weights are stored with 9 significant bits: scores differ by up to 0.4 %.
"""
_LOAD = """#!/bin/bash
# Makes the index $INDEX of the server at $URL and loads all parts; arguments are handed to curl.
set -eu -o pipefail
cd "$(dirname "$0")"
send() { curl -sS --fail-with-body "$@"; }
send "$@" -X PUT "$URL/$INDEX" -H 'Content-Type: application/json' --data-binary @mapping.json
for part in bulk-*.ndjson; do
  reply=$(send "$@" -X POST "$URL/$INDEX/_bulk?filter_path=errors,items.*.error" \\
    -H 'Content-Type: application/x-ndjson' --data-binary "@$part")
  case "$reply" in
    *'"errors":false'*) ;;
    *) echo "$part was not taken whole: ${reply:0:2000}" >&2; exit 1 ;;
  esac
done
send "$@" -X POST "$URL/$INDEX/_refresh"
"""


class SearchServer(EngineFormat):
    """What both have in common. Feature names may hold no dot: it becomes ``__``, as Elasticsearch's own models do it.

    A vector of zeros has no cosine, which both refuse: its document is written without a vector.
    """

    parts = "bulk-{:05d}.ndjson"
    ids = f"at most {_LONGEST_ID} bytes"
    title: ClassVar[str]

    def holds_id(self, doc_id: str) -> bool:
        """Whether it has at most 512 bytes."""
        return len(doc_id.encode()) <= _LONGEST_ID

    def takes_zero(self) -> bool:
        """Not where vectors are compared by their cosine."""
        return not self.cosine

    def record(self, doc_id: str, fields: dict[str, Any], vector: str | None) -> str:
        """The line of the action and the line of the document."""
        return json_text({"index": {"_id": doc_id}}) + "\n" + with_vector(fields, vector)

    def sparse_texts(self, lengths: np.ndarray, terms: np.ndarray, weights: np.ndarray) -> list[str]:
        """``{"token":0.5}``, by the names that tokens have as features."""
        return maps_json(lengths, self.tokens.json.take(terms), weights)

    def files(self) -> dict[str, Any]:
        """Mapping, query, instructions, the script that follows them, and ``tokens.json``: tokens with another name."""
        texts = {TITLE: {"type": "text"}, TEXT: {"type": "text"}} if self.contents.fields.collection else {}
        attributes = {field: _TYPES[type] for field, type in self.contents.fields.types.items()}
        properties = {ID: {"type": "keyword"}, **texts, VECTOR: self.vector_field(), **attributes}
        files: dict[str, Any] = {
            "mapping.json": {**self.settings(), "mappings": {"properties": properties}},
            "query.json": json_text({"size": _HITS, "_source": {"excludes": [VECTOR]}, **self.query(self.example)}),
        }
        if self.vectors.layout == "sparse":
            files[TOKENS] = self.tokens.renamed
        return {**files, "load.sh": _LOAD, "README.md": self._readme()}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What stands beside the mapping in the body that makes an index."""

    @abstractmethod
    def vector_field(self) -> dict[str, Any]:
        """The mapping of the field ``vector``."""

    @abstractmethod
    def query(self, vector: Any) -> dict[str, Any]:
        """A search for the documents nearest to ``vector``."""

    @cached_property
    def tokens(self) -> TokenNames:
        """The names of features."""
        return TokenNames(self.vectors, re.escape("."), "__")

    def _readme(self) -> str:
        notes = [f"# For {self.title}", _README, self.note()] + [_SPARSE] * (self.vectors.layout == "sparse")
        return self.instructions("\n\n".join(note.strip() for note in notes) + "\n")

    @abstractmethod
    def note(self) -> str:
        """What a reader of the instructions must know of this server."""


class OpenSearch(SearchServer):
    """``knn_vector`` fields on FAISS's HNSW, ``rank_features`` for learned sparse vectors."""

    name = "opensearch"
    title = "OpenSearch"
    layouts = MappingProxyType({"dense": 16_000, "sparse": 1 << 31})

    def settings(self) -> dict[str, Any]:
        """An index of vectors says so."""
        return {"settings": {"index": {"knn": True}}} if self.vectors.layout == "dense" else {}

    def vector_field(self) -> dict[str, Any]:
        """``knn_vector`` with the model's similarity, or ``rank_features``."""
        if self.vectors.layout == "sparse":
            return {"type": "rank_features"}
        space = "cosinesimil" if self.cosine else "innerproduct"
        method = {"name": "hnsw", "engine": "faiss", "space_type": space}
        return {"type": "knn_vector", "dimension": self.vectors.dimension, "method": method}

    def query(self, vector: Any) -> dict[str, Any]:
        """``knn``, or ``neural_sparse`` by tokens."""
        if self.vectors.layout == "sparse":
            return {"query": {"neural_sparse": {VECTOR: {"query_tokens": vector}}}}
        return {"query": {"knn": {VECTOR: {"vector": vector, "k": _HITS}}}}

    def note(self) -> str:
        """Versions, and what its scores are."""
        if self.vectors.layout == "sparse":
            return "Needs OpenSearch 2.14 or later, with the plugin neural-search that the distribution has."
        if self.cosine:
            return "Needs OpenSearch 2.19 or later. A score is (1 + cosine) / 2."
        return (
            "Needs OpenSearch 2.19 or later. A score is the inner product + 1, below 0 it is 1 / (1 - inner product)."
        )


class Elasticsearch(SearchServer):
    """``dense_vector`` fields on an HNSW of whole floats, ``sparse_vector`` for learned sparse vectors."""

    name = "elasticsearch"
    title = "Elasticsearch"
    layouts = MappingProxyType({"dense": 4_096, "sparse": 1 << 31})

    def settings(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def vector_field(self) -> dict[str, Any]:
        """``dense_vector`` with the model's similarity, or ``sparse_vector``."""
        if self.vectors.layout == "sparse":
            return {"type": "sparse_vector"}
        return {
            "type": "dense_vector",
            "dims": self.vectors.dimension,
            "index": True,
            "similarity": "cosine" if self.cosine else "max_inner_product",
            "index_options": {"type": "hnsw"},
        }

    def query(self, vector: Any) -> dict[str, Any]:
        """``knn``, or ``sparse_vector`` by tokens."""
        if self.vectors.layout == "sparse":
            return {"query": {"sparse_vector": {"field": VECTOR, "query_vector": vector}}}
        return {"knn": {"field": VECTOR, "query_vector": vector, "k": _HITS, "num_candidates": 10 * _HITS}}

    def note(self) -> str:
        """Versions, and what its scores are."""
        needs = "Needs Elasticsearch 8.15 or later."
        if self.vectors.layout == "sparse":
            return needs
        if self.cosine:
            return f"{needs} A score is (1 + cosine) / 2."
        return f"{needs} A score is the inner product + 1, below 0 it is 1 / (1 - inner product)."
