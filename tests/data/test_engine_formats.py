"""Files for other engines, line by line, and what is refused."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_engine_exports as tiny
from pytest_httpserver import HTTPServer
from scipy.sparse import csr_array
from werkzeug import Request, Response

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.engine_formats import engine, json_rows, loading
from retrieval_kd.data.engine_formats.export import FORMATS, export_vectors
from retrieval_kd.data.engine_formats.names import field_names, token_names
from retrieval_kd.data.engine_formats.qdrant import load_qdrant, point_id
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, DataError, OutputExistsError, UsageError

DENSE = np.array([[0.1, -2], [0, 0]])
SPARSE = csr_array(np.array([[0, 2.5, 0.004, 1], [0, 0, 0, 0], [0.25, 0, 0, 1.5]]))
TOKENS = ["a.b", "w x", "a__b", None]


def sparse(folder: Path, values: Any = SPARSE, similarity: str = "dot", **rest: Any) -> Vectors:
    return tiny.write(folder / "vectors", values, similarity, vocabulary=TOKENS, **rest)


def test_bulk_requests_and_mapping_for_opensearch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under cosine a vector of zeros is left out, as the server would refuse it."""
    books = tiny.make_books(tmp_path)
    vectors = tiny.write(tmp_path / "vectors", DENSE, "cosine")
    with caplog.at_level(logging.INFO, "retrieval_kd"):
        made = export_vectors(vectors, format="opensearch", out=tmp_path / "out", collection=books)
    assert tiny.lines(made.path, "bulk-00001.ndjson") == [
        {"index": {"_id": "d0"}},
        {
            "id": "d0",
            "title": "Émile",
            "text": "On\neducation",
            "year": 1762,
            "price": 2.5,
            "in_print": True,
            "vector_": "x",
            "vector": [0.1, -2],
        },
        {"index": {"_id": "d1"}},
        {"id": "d1", "text": 'A "quoted" word', "in_print": False, "field_2nd": "y"},
    ]
    keyword = {"type": "keyword", "ignore_above": 8191}
    assert json.loads((made.path / "mapping.json").read_text()) == {
        "settings": {"index": {"knn": True}},
        "mappings": {
            "properties": {
                "id": {"type": "keyword"},
                "title": {"type": "text"},
                "text": {"type": "text"},
                "vector": {
                    "type": "knn_vector",
                    "dimension": 2,
                    "method": {"name": "hnsw", "engine": "faiss", "space_type": "cosinesimil"},
                },
                "year": {"type": "long"},
                "price": {"type": "double"},
                "in_print": {"type": "boolean"},
                "vector_": keyword,
                "field_2nd": keyword,
            }
        },
    }
    query = {"query": {"knn": {"vector": {"vector": [0.1, -2], "k": 10}}}}
    assert json.loads((made.path / "query.json").read_text()) == {
        "size": 10,
        "_source": {"excludes": ["vector"]},
        **query,
    }
    assert made.manifest.counts == {"documents": 2, "without_vector": 1}
    assert made.manifest.details["fields"]["in print"] == "in_print"
    assert "documents without a vector that opensearch takes, which no search for vectors finds: 1" in caplog.text
    assert "in print is in_print, vector is vector_, 2nd is field_2nd" in caplog.text
    assert set(made.manifest.inputs) == {"vectors", "collection"}


def test_dot_products_for_elasticsearch_keep_zeros(tmp_path: Path) -> None:
    made = export_vectors(tiny.write(tmp_path / "vectors", DENSE), format="elasticsearch", out=tmp_path / "out")
    assert (made.path / "bulk-00001.ndjson").read_text() == (
        '{"index":{"_id":"d0"}}\n{"id":"d0","vector":[0.1,-2]}\n{"index":{"_id":"d1"}}\n{"id":"d1","vector":[0,0]}\n'
    )
    field = json.loads((made.path / "mapping.json").read_text())["mappings"]["properties"]["vector"]
    assert (field["similarity"], field["dims"], field["index_options"]) == ("max_inner_product", 2, {"type": "hnsw"})
    assert json.loads((made.path / "query.json").read_text())["knn"]["query_vector"] == [0.1, -2]
    assert made.manifest.counts == {"documents": 2}


def test_cosines_for_elasticsearch_refuse_zeros(tmp_path: Path) -> None:
    vectors = tiny.write(tmp_path / "vectors", DENSE, "cosine")
    made = export_vectors(vectors, format="elasticsearch", out=tmp_path / "out")
    field = json.loads((made.path / "mapping.json").read_text())["mappings"]["properties"]["vector"]
    assert field["similarity"] == "cosine"
    assert tiny.lines(made.path, "bulk-00001.ndjson")[3] == {"id": "d1"}
    assert made.manifest.counts == {"documents": 2, "without_vector": 1}


@pytest.mark.parametrize(
    ("format", "type", "query"),
    [
        ("opensearch", "rank_features", lambda vector: {"neural_sparse": {"vector": {"query_tokens": vector}}}),
        (
            "elasticsearch",
            "sparse_vector",
            lambda vector: {"sparse_vector": {"field": "vector", "query_vector": vector}},
        ),
    ],
)
def test_features_have_no_dots(format: str, type: str, query: Any, tmp_path: Path) -> None:
    """``a.b`` would become ``a__b``, which is another token's name and stays that one's."""
    queries = sparse(tmp_path / "q", csr_array(np.array([[0, 0, 0, 0], [0.5, 0, 0, 0]])), of="queries")
    made = export_vectors(sparse(tmp_path), format=format, out=tmp_path / "out", queries=queries)
    assert tiny.lines(made.path, "bulk-00001.ndjson")[1::2] == [
        {"id": "d0", "vector": {"w x": 2.5, "a__b": 0.004, "[term-3]": 1}},
        {"id": "d1"},
        {"id": "d2", "vector": {"a__b_": 0.25, "[term-3]": 1.5}},
    ]
    assert json.loads((made.path / "tokens.json").read_text()) == {"a.b": "a__b_", "term 3": "[term-3]"}
    properties = json.loads((made.path / "mapping.json").read_text())["mappings"]["properties"]
    assert properties == {"id": {"type": "keyword"}, "vector": {"type": type}}
    assert json.loads((made.path / "query.json").read_text())["query"] == query({"a__b_": 0.5})
    version = {"opensearch": "2.14", "elasticsearch": "8.15"}[format]  # the first to take tokens in a query
    assert f"{version} or later" in (made.path / "README.md").read_text()


def test_whole_weights_and_topics_for_lucene(tmp_path: Path) -> None:
    """Weights are rounded; 0.004 × 100 is 0 and dropped."""
    vectors = sparse(tmp_path, ids=["a", "b", "c"])
    weights = np.array([[0.021, 0.018, 0, 0], [0, 0, 0, 0.01]])
    queries = sparse(tmp_path / "q", csr_array(weights), of="queries")
    made = export_vectors(vectors, format="lucene-jsonl", out=tmp_path / "out", queries=queries)
    assert (made.path / "documents/part-00001.jsonl").read_text() == (
        '{"id":"a","contents":"","vector":{"w_x":250,"[term-3]":100}}\n'
        '{"id":"b","contents":"","vector":{}}\n'
        '{"id":"c","contents":"","vector":{"a.b":25,"[term-3]":150}}\n'
    )
    assert (made.path / "topics.tsv").read_text() == "q0\ta.b a.b w_x w_x\nq1\t[term-3]\n"
    assert made.manifest.counts == {"documents": 3, "without_vector": 1, "dropped_weights": 1}
    assert made.manifest.recipe["scale"] == 100
    finer = export_vectors(vectors, format="lucene-jsonl", out=tmp_path / "finer", scale=1000)
    assert tiny.lines(finer.path, "documents/part-00001.jsonl")[0]["vector"] == {
        "w_x": 2500,
        "a__b": 4,
        "[term-3]": 1000,
    }
    assert "dropped_weights" not in finer.manifest.counts and not (finer.path / "topics.tsv").exists()


def test_contents_for_lucene_are_title_and_text(tmp_path: Path) -> None:
    values = csr_array(np.array([[1.0, 0, 0, 0], [1, 0, 0, 0]]))
    made = export_vectors(
        sparse(tmp_path, values), format="lucene-jsonl", out=tmp_path / "out", collection=tiny.make_books(tmp_path)
    )
    contents = [line["contents"] for line in tiny.lines(made.path, "documents/part-00001.jsonl")]
    assert contents == ["Émile On\neducation", 'A "quoted" word']


def test_points_for_qdrant(tmp_path: Path) -> None:
    tokens = [np.array([[1, 0.5], [0.1, 0]]), np.zeros((0, 2))]
    made = export_vectors(tiny.write(tmp_path / "tokens", tokens, "maxsim"), format="qdrant", out=tmp_path / "out")
    assert tiny.lines(made.path, "points-00001.jsonl") == [
        {"id": point_id("d0"), "payload": {"id": "d0"}, "vector": {"vector": [[1, 0.5], [0.1, 0]]}},
        {"id": point_id("d1"), "payload": {"id": "d1"}, "vector": {}},
    ]
    assert point_id("d0") == "2b4a2814-2c63-52e4-898d-34de96f9b954", "another id would double documents on a new load"
    config = {"size": 2, "distance": "Dot", "multivector_config": {"comparator": "max_sim"}}
    assert json.loads((made.path / "collection.json").read_text()) == {"vectors": {"vector": config}}


def test_rows_for_milvus_are_cut_and_left_out(tmp_path: Path) -> None:
    """A string may have 65,535 bytes; ``é`` has two, so that the cut falls before one."""
    books = tiny.make_books(tmp_path)
    path = books.path / "documents.arrow"
    table = pa.ipc.open_file(path).read_all()
    texts = pa.array(["é" * 40_000, "x" * 65_535])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.set_column(2, "text", texts).set_column(4, "price", pa.array([np.nan, 1.5])))
    values = csr_array(np.array([[1.0, 0, 0, 0], [0.5, 0, 0.25, 0]]))
    made = export_vectors(sparse(tmp_path, values), format="milvus", out=tmp_path / "out", collection=books)
    first, second = tiny.lines(made.path, "rows-00001.jsonl")
    assert first["text"] == "é" * 32_767 and second["text"] == "x" * 65_535
    assert "price" not in first and second["price"] == 1.5
    assert second["vector"] == {"0": 0.5, "2": 0.25}
    assert made.manifest.counts == {"documents": 2, "cut_strings": 1, "attributes_not_finite": 1}
    left = export_vectors(sparse(tmp_path / "other"), format="milvus", out=tmp_path / "left")
    assert [row["id"] for row in tiny.lines(left.path, "rows-00001.jsonl")] == ["d0", "d2"]
    assert left.manifest.counts == {"documents": 2, "left_out": 1}


def test_numbers_read_back_as_the_same_float32() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([numbers[np.isfinite(numbers)], np.float32([0.1, 1e-45, 16777216, 3.4028235e38, 0])])
    (text,) = json_rows.lists_json(np.array([len(numbers)]), numbers)
    assert np.array(json.loads(text), dtype=np.float32).tolist() == numbers.tolist()
    assert json_rows.lists_json(np.array([1, 0, 2]), np.float32([0.1, 1, 2.5])) == ["[0.1]", "[]", "[1,2.5]"]


def test_parts_and_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is never divided: one that is longer than a part is a part of its own."""
    vectors = tiny.write(tmp_path / "vectors", tiny.random_values("multi-vector", 9, 3), "maxsim")
    whole = export_vectors(vectors, format="qdrant", out=tmp_path / "whole")
    monkeypatch.setattr(json_rows, "PART_BYTES", 700)
    monkeypatch.setattr(engine, "_NUMBERS", 1)
    monkeypatch.setattr(loading, "_BATCH_CHARACTERS", 500)
    parts = export_vectors(vectors, format="qdrant", out=tmp_path / "parts")
    texts = [path.read_text() for path in parts.parts]
    assert "".join(texts) == whole.parts[0].read_text() and len(texts) > 2
    assert all(len(text) <= 700 or text.count("\n") == 1 for text in texts) and max(map(len, texts)) > 350
    batches = list(parts.batches())
    assert len(batches) > len(texts)
    assert [point for batch in batches for point in batch] == tiny.lines(whole.path, "points-00001.jsonl")


def test_names_that_fit_stay_and_none_become_the_same() -> None:
    assert field_names(["a b", "a_b", "id", "_id", "é", "2", "ok"], ("id", "vector")) == {
        "a b": "a_b_",
        "a_b": "a_b",
        "id": "id_",
        "_id": "field_id",
        "é": "field_",
        "2": "field_2",
        "ok": "ok",
    }
    assert token_names(["a", "a", "a."], r"\.", "__") == ["a", "a_", "a__"]
    long = "x" * 256
    assert token_names(["a.", "a__", ".a", "", None, long, "[term-3]", "a."], r"\.", "__") == [
        "a___", "a__", "__a", "[term-3]_", "[term-4]", "[term-5]", "[term-3]", "a____",
    ]  # fmt: skip


def test_the_same_command_again_is_done(tmp_path: Path) -> None:
    vectors = tiny.write(tmp_path / "vectors", DENSE)
    arguments: dict[str, Any] = {"format": "qdrant", "out": tmp_path / "out"}
    first = export_vectors(vectors, **arguments)
    assert export_vectors(vectors.path, **arguments).manifest == first.manifest
    with pytest.raises(OutputExistsError, match="format differ"):
        export_vectors(vectors, **{**arguments, "format": "milvus"})
    assert export_vectors(vectors, **{**arguments, "format": "milvus"}, force=True).format == "milvus"


@pytest.mark.parametrize("format", ["opensearch", "elasticsearch"])
def test_the_written_commands_load_every_part(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, httpserver: HTTPServer
) -> None:
    """The README's own commands, run against a server that notes what it is sent, and then refuses a document."""
    monkeypatch.setattr(json_rows, "PART_BYTES", 150)
    values = tiny.random_values("dense", 4, 0)
    made = export_vectors(tiny.write(tmp_path / "vectors", values), format=format, out=tmp_path / "out")
    asked: list[tuple[str, str, str]] = []
    reply = {"errors": False}

    def answer(request: Request) -> Response:
        asked.append((request.method, request.path, request.get_data(as_text=True)))
        assert request.authorization and request.authorization.password == "secret"
        return Response(json.dumps(reply, separators=(",", ":")), content_type="application/json")

    for path in ("/documents", "/documents/_bulk", "/documents/_refresh", "/documents/_search"):
        httpserver.expect_request(path).respond_with_handler(answer)
    url = httpserver.url_for("").rstrip("/")
    readme = (made.path / "README.md").read_text().replace("http://localhost:9200", url)
    load, search = (part.split("```")[0].strip() for part in readme.split("```bash\n")[1:])

    def run(script: str) -> tuple[int, str]:
        done = subprocess.run(["bash", "-c", script], cwd=made.path, capture_output=True, timeout=30, text=True)
        return done.returncode, done.stderr

    assert run(f"{load} -u me:secret") == (0, "")
    assert run(f"{search} -u me:secret") == (0, "")
    assert [(method, path) for method, path, _ in asked] == [
        ("PUT", "/documents"),
        *[("POST", "/documents/_bulk")] * len(made.parts),
        ("POST", "/documents/_refresh"),
        ("POST", "/documents/_search"),
    ]
    assert asked[0][2] == (made.path / "mapping.json").read_text()
    assert asked[-1][2] == (made.path / "query.json").read_text()
    sent = [json.loads(line) for _, path, body in asked if path.endswith("_bulk") for line in body.splitlines()]
    assert [line["_id"] for line in (entry["index"] for entry in sent[::2])] == ["d0", "d1", "d2", "d3"]
    np.testing.assert_array_equal(np.float32([line["vector"] for line in sent[1::2]]), values)
    asked.clear()
    reply["errors"] = True
    message = 'bulk-00001.ndjson was not taken whole: {"errors":true}\n'
    assert run(f"{load} -u me:secret") == (1, message) and len(asked) == 2, "it stops at the first such part"
    httpserver.clear()
    assert run(load)[0] != 0, "the index could not be made"


def bad_values(place: Path, format: str, values: Any, match: str, **rest: Any) -> None:
    with pytest.raises(DataError, match=match):
        export_vectors(sparse(place, values, **rest), format=format, out=place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("format", ["elasticsearch", "lucene-jsonl", "milvus", "opensearch"])
def test_negative_weights_are_refused(format: str, tmp_path: Path) -> None:
    bad_values(
        tmp_path,
        format,
        csr_array(np.array([[1, 0, 0, 0], [1, -1, 0, 0]])),
        f"1 of .* {format} have weights below .*'d1'",
    )


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad_values(
        tmp_path, "qdrant", csr_array(np.array([[1, 0, 0, 0], [np.inf, 1, 0, 0]])), "NaN or infinite weights: 'd1'"
    )
    for name, values in {
        "dense": np.array([[1, 2], [np.nan, 1]]),
        "tokens": [np.ones((2, 2)), np.full((1, 2), np.inf)],
    }.items():
        vectors = tiny.write(tmp_path / name, values)
        with pytest.raises(DataError, match="1 of the vectors for qdrant have NaN or infinite values: 'd1'"):
            export_vectors(vectors, format="qdrant", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "doc_id", "message"),
    [
        ("elasticsearch", "é" * 257, "1 document ids .* elasticsearch .at most 512 bytes.: 'é{40}…'"),
        ("opensearch", "x" * 513, "at most 512 bytes"),
        ("milvus", "x" * 65_536, "at most 65535 bytes"),
        ("lucene-jsonl", "a b", "lucene-jsonl .without white space.: 'a b'"),
    ],
)
def test_ids_that_do_not_fit(format: str, doc_id: str, message: str, tmp_path: Path) -> None:
    bad_values(tmp_path, format, SPARSE, message, ids=["d0", doc_id, "d2"])


def test_longest_ids_fit(tmp_path: Path) -> None:
    vectors = tiny.write(tmp_path / "vectors", DENSE, ids=["é" * 256, "x" * 512])
    assert len(export_vectors(vectors, format="elasticsearch", out=tmp_path / "out")) == 2


@pytest.mark.parametrize(("format", "limit"), [("elasticsearch", 4096), ("opensearch", 16_000), ("milvus", 32_768)])
def test_dimensions_that_are_too_many(format: str, limit: int, tmp_path: Path) -> None:
    fits = tiny.write(tmp_path / "fits", np.ones((1, limit)))
    assert len(export_vectors(fits, format=format, out=tmp_path / "out")) == 1
    with pytest.raises(UsageError, match=f"{limit + 1:,} dimensions; {format} takes {limit:,} at most"):
        export_vectors(tiny.write(tmp_path / "more", np.ones((1, limit + 1))), format=format, out=tmp_path / "more-out")


def test_a_point_of_too_many_numbers_is_refused(tmp_path: Path) -> None:
    tokens = [np.ones((1, 32_768)), np.ones((31, 32_768)), np.ones((32, 32_768))]
    with pytest.raises(DataError, match=r"1 of the vectors for qdrant have more than 1,048,575 numbers .*: 'd2'"):
        export_vectors(tiny.write(tmp_path / "tokens", tokens, "maxsim"), format="qdrant", out=tmp_path / "out")


def test_instructions_say_how_scores_differ(tmp_path: Path) -> None:
    cosine = sparse(tmp_path, similarity="cosine")
    for format in ("elasticsearch", "lucene-jsonl", "milvus", "opensearch", "qdrant"):
        text = (export_vectors(cosine, format=format, out=tmp_path / format).path / "README.md").read_text()
        assert "queries must be for equal scores" in text
    mean = tiny.write(tmp_path / "mean", [np.ones((2, 2))], "meanmaxsim")
    assert "divides it" in (export_vectors(mean, format="qdrant", out=tmp_path / "q").path / "README.md").read_text()


def test_mistakes_are_named(tmp_path: Path) -> None:
    dense, terms = tiny.write(tmp_path / "dense", DENSE), sparse(tmp_path)
    tokens = tiny.write(tmp_path / "tokens", [np.ones((1, 2))], "maxsim")
    queries = tiny.write(tmp_path / "queries", DENSE, of="queries")
    others = tiny.write(tmp_path / "others", DENSE, of="queries", model=InputRef("e" * 64, name="nobody/other"))
    out = tmp_path / "out"
    for vectors, options, message in [
        (dense, {"format": "opensaerch"}, r"unknown format 'opensaerch' \(did you mean 'opensearch'\?\)"),
        (
            dense,
            {"format": "lucene-jsonl"},
            "lucene-jsonl holds sparse vectors, these are dense ones; formats for them: ela",
        ),
        (tokens, {"format": "milvus"}, "these are multi-vector ones; formats for them: qdrant$"),
        (queries, {"format": "qdrant"}, "vectors of queries; give vectors of documents"),
        (dense, {"format": "qdrant", "queries": dense}, "vectors of documents; --queries are vectors of queries"),
        (dense, {"format": "qdrant", "scale": 10}, "a scale is for weights that become whole"),
        (terms, {"format": "lucene-jsonl", "scale": 0}, r"1 or more \(got 0\)"),
    ]:
        with pytest.raises(UsageError, match=message):
            export_vectors(vectors, out=out, **options)
    with pytest.raises(ArtifactError, match="its model is not the one of"):
        export_vectors(dense, format="qdrant", queries=others, out=out)
    with pytest.raises(ArtifactError, match="its 1 rows are not the collection's 2 documents"):
        export_vectors(tokens, format="qdrant", collection=tiny.make_books(tmp_path), out=out)
    with pytest.raises(DataError, match="none of the 2 vectors has anything but zeros"):
        zeros = tiny.write(tmp_path / "zeros", np.zeros((2, 3)), "cosine")
        export_vectors(zeros, format="elasticsearch", out=out)
    white = sparse(tmp_path / "w", of="queries", ids=["q 0", "q1", "q2"])
    with pytest.raises(DataError, match="1 query ids have white space: 'q 0'"):
        export_vectors(terms, format="lucene-jsonl", queries=white, out=out)
    with pytest.raises(ArtifactError, match="an export for milvus; one for qdrant is needed here"):
        load_qdrant(export_vectors(dense, format="milvus", out=out).path, None, "x")
    assert set(FORMATS) == {"elasticsearch", "lucene-jsonl", "milvus", "opensearch", "qdrant"}
