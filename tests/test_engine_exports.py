"""Exports searched as their engines search them: the hits are those of our own exact indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine_exports as tiny
from typer.testing import CliRunner

from retrieval_kd.cli import app
from retrieval_kd.data.engine_formats.engine import Contents
from retrieval_kd.data.engine_formats.export import FORMATS, export_vectors
from retrieval_kd.data.engine_formats.fields import Fields
from retrieval_kd.data.engine_formats.milvus import load_milvus
from retrieval_kd.data.engine_formats.qdrant import load_qdrant
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import OutputExistsError


def json_queries(format: str, documents: Vectors, queries: Vectors) -> list[Any]:
    """``query.json`` of each query in turn; None for one whose vector is empty."""
    engine: Any = FORMATS[format](Contents(documents, Fields(None), queries))
    found = []
    for row in range(len(queries)):
        (text,) = engine.vector_texts(queries, row, row + 1)
        engine.example = text and json.loads(text)
        found.append(text and json.loads(engine.files()["query.json"]))
    return found


def ranked(scores: dict[str, float], k: int = 10) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)[:k]


@pytest.mark.parametrize(("layout", "similarity"), tiny.SIMILARITIES)
def test_qdrant_finds_what_our_index_finds(layout: str, similarity: str, tmp_path: Path) -> None:
    from qdrant_client import QdrantClient, models

    documents, queries = tiny.make_pair(tmp_path, layout, similarity)
    export = export_vectors(documents, format="qdrant", out=tmp_path / "export")
    client = QdrantClient(":memory:")
    assert load_qdrant(export.path, client, "documents") == tiny.DOCUMENTS
    found = []
    for body in json_queries("qdrant", documents, queries):
        hits = [] if body is None else client.query_points("documents", **read(models, body)).points
        found.append([(hit.payload["id"], hit.score) for hit in hits])
    expected = tiny.exact_hits(documents, queries)
    assert_same_but_zeros(found, expected)
    with pytest.raises(OutputExistsError, match="Qdrant has a collection 'documents'"):
        load_qdrant(export.path, client, "documents")
    client.close()


def read(models: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a search from the body of a request."""
    request = models.QueryRequest.model_validate(body)
    return {
        "query": request.query,
        "using": request.using,
        "limit": request.limit,
        "with_payload": request.with_payload,
    }


def assert_same_but_zeros(found: tiny.Hits, expected: tiny.Hits) -> None:
    """Engines of sparse vectors may fill up with documents that share no term, which score 0."""
    tiny.assert_same_hits([[hit for hit in hits if hit[1]] for hits in found], expected)
    assert any(len(hits) == 10 for hits in expected)


def test_payloads_can_be_filtered_by(tmp_path: Path) -> None:
    from qdrant_client import QdrantClient, models

    vectors = tiny.write(tmp_path / "vectors", np.array([[1.0, 0], [0, 1]]))
    books = tiny.make_books(tmp_path)
    export = export_vectors(vectors, format="qdrant", out=tmp_path / "export", collection=books)
    client = QdrantClient(":memory:")
    load_qdrant(export.path, client, "books")
    only = models.Filter(must=[models.FieldCondition(key="in_print", match=models.MatchValue(value=False))])
    (hit,) = client.query_points("books", query=[1.0, 0.0], using="vector", query_filter=only).points
    assert hit.payload == {"id": "d1", "text": 'A "quoted" word', "in_print": False, "field_2nd": "y"}
    client.close()


@pytest.mark.parametrize(
    ("format", "local"), [("qdrant", 'QdrantClient(":memory:")'), ("milvus", 'MilvusClient("milvus.db")')]
)
def test_the_written_python_loads_it(format: str, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the server's place is another."""
    vectors = tiny.write(tmp_path / "vectors", np.array([[1.0, 0], [0, 1]]), "cosine")
    export = export_vectors(vectors, format=format, out=tmp_path / "export")
    script = (export.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    server = f'{local.split("(")[0]}("http://localhost:{ {"qdrant": 6333, "milvus": 19530}[format] }")'
    assert server in script
    monkeypatch.chdir(export.path)
    names: dict[str, Any] = {}
    exec(script.replace(server, local), names)
    client = names["client"]
    if format == "qdrant":
        assert client.count("documents").count == 2
    else:
        assert client.get_collection_stats("documents")["row_count"] == 2
    client.close()


def test_milvus_finds_what_our_index_finds(tmp_path: Path) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(str(tmp_path / "milvus.db"))
    for layout, similarity in tiny.SIMILARITIES[:4]:
        place = tmp_path / f"{layout}-{similarity}"
        documents, queries = tiny.make_pair(place, layout, similarity)
        export = export_vectors(documents, format="milvus", out=place / "export")
        name = f"{layout}_{similarity}"
        assert load_milvus(export.path, client, name) == tiny.DOCUMENTS - (layout == "sparse")
        found: tiny.Hits = []
        for body in json_queries("milvus", documents, queries):
            data = [] if body is None else body["data"]
            if layout == "sparse":
                data = [{int(term): weight for term, weight in vector.items()} for vector in data]
            (hits,) = client.search(name, data, anns_field=body["annsField"], limit=body["limit"]) if data else ([],)
            found.append([(hit["id"], hit["distance"]) for hit in hits])
        assert_same_but_zeros(found, tiny.exact_hits(documents, queries))
    with pytest.raises(OutputExistsError, match="Milvus has a collection 'dense_dot'"):
        load_milvus(tmp_path / "dense-dot" / "export", client, "dense_dot")
    vectors = tiny.write(tmp_path / "vectors", np.array([[1.0, 0], [0, 1]]))
    books = tiny.make_books(tmp_path)
    load_milvus(export_vectors(vectors, format="milvus", out=tmp_path / "b", collection=books).path, client, "books")
    asked = {
        "data": [[1.0, 0.0]],
        "anns_field": "vector",
        "output_fields": ["title", "text", "year", "price", "field_2nd"],
    }
    ((hit,),) = client.search("books", filter="in_print == false", **asked)
    assert hit["id"] == "d1"
    values = {"title": None, "text": 'A "quoted" word', "year": None, "price": None, "field_2nd": "y"}
    assert dict(hit["entity"]) == values
    client.close()


@pytest.mark.parametrize("format", ["elasticsearch", "opensearch"])
@pytest.mark.parametrize(("layout", "similarity"), tiny.SIMILARITIES[:4])
def test_bulk_files_score_as_our_index_does(format: str, layout: str, similarity: str, tmp_path: Path) -> None:
    """No server runs here: the written vectors are compared as the servers say that they compare them."""
    documents, queries = tiny.make_pair(tmp_path, layout, similarity)
    export = export_vectors(documents, format=format, out=tmp_path / "export")
    sent = {entry["id"]: entry.get("vector") for entry in tiny.lines(export.path, "bulk-00001.ndjson")[1::2]}
    found = []
    for body in json_queries(format, documents, queries):
        query = None if body is None else vector_of(body)
        found.append([] if query is None else ranked(products(query, sent, cosine=similarity == "cosine")))
    tiny.assert_same_hits(found, tiny.exact_hits(documents, queries))


def vector_of(body: dict[str, Any]) -> Any:
    """The vector in a search of OpenSearch or Elasticsearch."""
    if "knn" in body:
        return body["knn"]["query_vector"]
    ((kind, inner),) = body["query"].items()
    if kind == "knn":
        return inner["vector"]["vector"]
    return inner["query_vector"] if kind == "sparse_vector" else inner["vector"]["query_tokens"]


def products(query: Any, documents: dict[str, Any], *, cosine: bool) -> dict[str, float]:
    """Document → dot product (of dense vectors their cosine); documents of no common token are not there."""
    found = {}
    for doc_id, vector in documents.items():
        if isinstance(query, list):
            length = np.linalg.norm(query) * np.linalg.norm(vector) if cosine else 1
            found[doc_id] = float(np.dot(query, vector) / length)
        elif common := set(query) & set(vector or ()):
            found[doc_id] = sum(query[token] * vector[token] for token in common)
    return found


def test_whole_weights_rank_as_exact_ones(tmp_path: Path) -> None:
    """A weight is off by 0.005 at most: scores stay within 2 %, and nearly all hits are the same."""
    documents, queries = tiny.make_pair(tmp_path, "sparse", "dot")
    export = export_vectors(documents, format="lucene-jsonl", out=tmp_path / "export", queries=queries)
    sent = {line["id"]: line["vector"] for line in tiny.lines(export.path, "documents/part-00001.jsonl")}
    assert all(isinstance(weight, int) for vector in sent.values() for weight in vector.values())
    topics = dict(line.split("\t") for line in (export.path / "topics.tsv").read_text().splitlines())
    expected = tiny.exact_hits(documents, queries)
    common = total = 0
    for query, hits in zip(queries.ids, expected, strict=True):
        words = topics[query].split()
        weights = {token: words.count(token) for token in set(words)}
        found = {doc: score / 100**2 for doc, score in products(weights, sent, cosine=False).items()}
        assert [found[doc] for doc, _ in hits] == pytest.approx([score for _, score in hits], rel=0.02)
        common += len({doc for doc, _ in ranked(found)} & {doc for doc, _ in hits})
        total += len(hits)
    assert total >= 60 and common / total >= 0.97


def call(*arguments: object, expect: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    return result.output


def test_the_verb(tmp_path: Path) -> None:
    documents, queries = tiny.make_pair(tmp_path, "sparse", "dot")
    arguments = ["export", documents.path, "--format", "lucene-jsonl", "--out", tmp_path / "out"]
    made = json.loads(call(*arguments, "--queries", queries.path, "--scale", 50, "--json"))
    assert (made["artifact"], made["counts"]["documents"], made["already_done"]) == ("engine-export", 60, False)
    assert (tmp_path / "out" / "topics.tsv").is_file()
    assert "already done" in call(*arguments, "--queries", queries.path, "--scale", 50)
    for options, message in [
        (["--format", "opensaerch"], "unknown format 'opensaerch' (did you mean 'opensearch'?)"),
        ([], "(vectors) has no format 'onnx'; its formats: elasticsearch, lucene-jsonl, milvus, opensearch, qdrant"),
        (["--format", "qdrant", "--min-cosine", "0.5", "--split", "test"], "--split, --min-cosine: only for models"),
    ]:
        assert message in call("export", documents.path, "--out", tmp_path / "no", *options, expect=2)
    assert "--scale: only for vectors" in call("export", "builtin", "--out", tmp_path / "no", "--scale", 9, expect=2)
    missing = ["export", tmp_path / "nothing", "--format", "qdrant", "--out", tmp_path / "no"]
    assert "nothing: no such file or directory" in call(*missing, expect=4)


def test_the_help_names_every_format() -> None:
    shown = call("export", "--help")
    assert all(name in " ".join(shown.split()) for name in FORMATS)
