"""Qdrant: points with one named vector, dense, sparse or one a token, and the function that loads them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from retrieval_kd.data.engine_formats.engine import EngineFormat, json_text
from retrieval_kd.data.engine_formats.fields import VECTOR
from retrieval_kd.data.engine_formats.json_rows import lists_json
from retrieval_kd.data.engine_formats.loading import engine_export
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import OutputExistsError

_NAMESPACE = uuid.UUID("6f0f6c1e-2d64-5c2f-9d0b-8a4f6b0b6a51")
_HITS = 10
_LONGEST_MATRIX = 1_048_575
"""Numbers of all token vectors of a document."""


def point_id(doc_id: str) -> str:
    """The UUID of a document's point: version 5, of its id. Points have no other ids than UUIDs and numbers."""
    return str(uuid.uuid5(_NAMESPACE, doc_id))


class Qdrant(EngineFormat):
    """Points as the REST interface takes them; the payload has the document's own id and its fields."""

    name = "qdrant"
    layouts = MappingProxyType({"dense": 65_535, "sparse": 1 << 32, "multi-vector": 65_535})
    parts = "points-{:05d}.jsonl"
    takes_negative = True

    def vector_texts(self, vectors: Vectors, start: int, stop: int) -> list[str | None]:
        """The JSON of some vectors; `DataError` too for a document with more numbers than a point may have."""
        bad = vectors.lengths[start:stop] * vectors.dimension > _LONGEST_MATRIX
        if vectors.layout == "multi-vector":
            self.refuse_rows(vectors, start, bad, f"more than {_LONGEST_MATRIX:,} numbers (pool their tokens)")
        return super().vector_texts(vectors, start, stop)

    def record(self, doc_id: str, fields: dict[str, Any], vector: str | None) -> str:
        """A point; one whose vector is empty is in the collection without it."""
        point = json_text({"id": point_id(doc_id), "payload": fields})
        return f'{point[:-1]},"vector":{{{"" if vector is None else f"{json_text(VECTOR)}:{vector}"}}}}}'

    def sparse_texts(self, lengths: np.ndarray, terms: np.ndarray, weights: np.ndarray) -> list[str]:
        """``{"indices":[3],"values":[0.5]}``: terms are numbers."""
        pairs = zip(lists_json(lengths, terms), lists_json(lengths, weights), strict=True)
        return [f'{{"indices":{indices},"values":{values}}}' for indices, values in pairs]

    def files(self) -> dict[str, Any]:
        """``collection.json``, ``query.json`` and ``README.md``: bodies of the REST interface, and what to do."""
        return {
            "collection.json": self._collection(),
            "query.json": json_text({"query": self.example, "using": VECTOR, "limit": _HITS, "with_payload": True}),
            "README.md": self.instructions(_README),
        }

    def _collection(self) -> dict[str, Any]:
        if self.vectors.layout == "sparse":
            return {"vectors": {}, "sparse_vectors": {VECTOR: {}}}
        config: dict[str, Any] = {"size": self.vectors.dimension, "distance": "Cosine" if self.cosine else "Dot"}
        if self.vectors.layout == "multi-vector":
            config["multivector_config"] = {"comparator": "max_sim"}
        return {"vectors": {VECTOR: config}}


_README = """# For Qdrant

`collection.json` is the body that makes a collection, `points-*.jsonl` has a point a line. A point's id is a UUID made
of the document's id, which is `id` in the payload. In this directory
(`pip install 'retrieval-kd[qdrant]'`):

```python
from qdrant_client import QdrantClient
from retrieval_kd.data.engine_formats.qdrant import load_qdrant

client = QdrantClient("http://localhost:6333")
load_qdrant(".", client, "documents")
```

`query.json` is a search, with the vector of one query (of a document, if no queries were exported):

```bash
curl -sS -X POST "http://localhost:6333/collections/documents/points/query" \\
  -H 'Content-Type: application/json' --data-binary @query.json
```
"""


def load_qdrant(export: str | Path, client: Any, collection_name: str) -> int:
    """The number of points that were loaded into a new collection of Qdrant by a `qdrant_client.QdrantClient`.

    Raises `ArtifactError` for something else than an export for Qdrant, `OutputExistsError` when the collection is
    there already.
    """
    from qdrant_client import models

    source = engine_export(export, Qdrant.name)
    if client.collection_exists(collection_name):
        raise OutputExistsError(f"Qdrant has a collection '{collection_name}'; delete it or choose another name")
    body = json.loads((source.path / "collection.json").read_text(encoding="utf-8"))
    config = models.CreateCollection.model_validate(body)
    client.create_collection(
        collection_name, vectors_config=config.vectors, sparse_vectors_config=config.sparse_vectors
    )

    def send(batch: list[Any]) -> None:
        client.upsert(collection_name, points=[models.PointStruct.model_validate(point) for point in batch])

    return source.load_with(send)
