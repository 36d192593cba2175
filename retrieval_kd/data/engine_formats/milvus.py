"""Milvus: rows with a dense or sparse vector, their schema, and the function that loads them."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from retrieval_kd.data.engine_formats.engine import EngineFormat, json_text, with_vector
from retrieval_kd.data.engine_formats.fields import ID, TEXT, TITLE, VECTOR
from retrieval_kd.data.engine_formats.json_rows import maps_json, number_texts
from retrieval_kd.data.engine_formats.loading import engine_export
from retrieval_kd.errors import OutputExistsError

LONGEST = 65_535
"""Bytes of a string."""
_TYPES = {"string": "VarChar", "integer": "Int64", "number": "Double", "boolean": "Bool"}
_PYMILVUS = {
    "VarChar": "VARCHAR",
    "Int64": "INT64",
    "Double": "DOUBLE",
    "Bool": "BOOL",
    "FloatVector": "FLOAT_VECTOR",
    "SparseFloatVector": "SPARSE_FLOAT_VECTOR",
}
"""What the REST interface calls a type → what pymilvus does."""
_HITS = 10


class Milvus(EngineFormat):
    """Rows whose primary key is the document's id. A string that is too long is cut, a document without terms left out.

    Milvus has no rows without a vector.
    """

    name = "milvus"
    layouts = MappingProxyType({"dense": 32_768, "sparse": (1 << 32) - 2})
    ids = f"at most {LONGEST} bytes"

    def holds_id(self, doc_id: str) -> bool:
        """Whether it has at most 65,535 bytes."""
        return len(doc_id.encode()) <= LONGEST

    def record(self, doc_id: str, fields: dict[str, Any], vector: str | None) -> str | None:
        """A row, or None without a vector."""
        if vector is None:
            return None
        return with_vector({name: self._cut(value) for name, value in fields.items()}, vector)

    def _cut(self, value: Any) -> Any:
        if not isinstance(value, str) or len(value) * 4 <= LONGEST:
            return value
        data = value.encode()
        if len(data) <= LONGEST:
            return value
        self.counts["cut_strings"] += 1
        return data[:LONGEST].decode(errors="ignore")

    def sparse_texts(self, lengths: np.ndarray, terms: np.ndarray, weights: np.ndarray) -> list[str]:
        """``{"3":0.5}``: terms are numbers."""
        import pyarrow.compute as pc

        keys = pc.binary_join_element_wise('"', number_texts(terms), '"', "")
        return maps_json(lengths, keys, weights)

    def files(self) -> dict[str, Any]:
        """``collection.json``, ``query.json`` and ``README.md``: bodies of the REST interface, and what to do."""
        sparse = self.vectors.layout == "sparse"
        fields = self.contents.fields
        strings = [TITLE, TEXT] if fields.collection else []
        columns = [_field(name, "VarChar") for name in strings]
        columns += [_field(name, _TYPES[type]) for name, type in fields.types.items()]
        vector: dict[str, Any] = {"fieldName": VECTOR, "dataType": "SparseFloatVector" if sparse else "FloatVector"}
        if not sparse:
            vector["elementTypeParams"] = {"dim": self.vectors.dimension}
        key = {"fieldName": ID, "dataType": "VarChar", "isPrimary": True}
        schema_fields = [{**key, "elementTypeParams": {"max_length": LONGEST}}, *columns, vector]
        index = {
            "fieldName": VECTOR,
            "indexName": VECTOR,
            "metricType": "COSINE" if self.cosine and not sparse else "IP",
            "indexType": "SPARSE_INVERTED_INDEX" if sparse else "AUTOINDEX",
        }
        query = {"data": [self.example], "annsField": VECTOR, "limit": _HITS, "outputFields": [ID]}
        return {
            "collection.json": {
                "schema": {"autoId": False, "enableDynamicField": False, "fields": schema_fields},
                "indexParams": [index],
            },
            "query.json": json_text(query),
            "README.md": self.instructions(_README),
        }


def _field(name: str, type: str) -> dict[str, Any]:
    field: dict[str, Any] = {"fieldName": name, "dataType": type, "nullable": True}
    return {**field, "elementTypeParams": {"max_length": LONGEST}} if type == "VarChar" else field


_README = """# For Milvus

`collection.json` has the schema and the index as the REST interface takes them, `rows-*.jsonl` a row a line. Needs
Milvus 2.5 or later, or a file of Milvus Lite. `AUTOINDEX` is approximate on a server. In this
directory (`pip install 'retrieval-kd[milvus]'`):

```python
from pymilvus import MilvusClient
from retrieval_kd.data.engine_formats.milvus import load_milvus

client = MilvusClient("http://localhost:19530")
load_milvus(".", client, "documents")
```

`query.json` is a search, with the vector of one query (of a document, if no queries were exported); the REST interface
also wants a `collectionName` in it.
"""


def load_milvus(export: str | Path, client: Any, collection_name: str) -> int:
    """The number of rows that were loaded into a new collection of Milvus by a `pymilvus.MilvusClient`.

    Raises `ArtifactError` for something else than an export for Milvus, `OutputExistsError` when the collection is
    there already.
    """
    from pymilvus import DataType

    source = engine_export(export, Milvus.name)
    if client.has_collection(collection_name):
        raise OutputExistsError(f"Milvus has a collection '{collection_name}'; drop it or choose another name")
    body = json.loads((source.path / "collection.json").read_text(encoding="utf-8"))
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    for field in body["schema"]["fields"]:
        schema.add_field(
            field["fieldName"],
            DataType[_PYMILVUS[field["dataType"]]],
            is_primary=field.get("isPrimary", False),
            nullable=field.get("nullable", False),
            **field.get("elementTypeParams", {}),
        )
    index_params = client.prepare_index_params()
    for index in body["indexParams"]:
        names = {"index_name": "indexName", "index_type": "indexType", "metric_type": "metricType"}
        index_params.add_index(index["fieldName"], **{name: index[key] for name, key in names.items()})
    client.create_collection(collection_name, schema=schema, index_params=index_params)
    loaded = source.load_with(lambda batch: client.insert(collection_name, [_row(row) for row in batch]))
    client.load_collection(collection_name)
    return loaded


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose sparse vector has numbers for terms, which JSON's keys cannot be."""
    vector = row[VECTOR]
    if isinstance(vector, dict):
        row[VECTOR] = {int(term): weight for term, weight in vector.items()}
    return row
