from __future__ import annotations

import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_score_files import (
    GOLDEN,
    HOFSTAETTER,
    HOFSTAETTER_BY_QRELS,
    MAXIMUM,
    PYLATE,
    ROWS,
    SENTENCE_TRANSFORMERS,
    SUBNORMAL,
    TREC,
    bits,
    bits_of,
    export,
    imported,
    make_scores,
    written,
)

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.score_formats.convert import FORMATS
from retrieval_kd.data.scores import Scores
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import ArtifactError, DataError, InputError, OutputExistsError, UsageError

BY_ID = [name for name in GOLDEN if name != "sentence-transformers"]


@pytest.fixture
def pets(beir: Path, tmp_path: Path) -> Collection:
    """d3 and d4 both read ``Dogs bark``."""
    return make_collection(str(beir), tmp_path / "collection")


@pytest.fixture
def scores(pets: Collection, tmp_path: Path) -> Scores:
    return make_scores(tmp_path / "scores", collection=pets)


def test_every_written_format_has_a_golden_file() -> None:
    assert set(GOLDEN) == {name for name, layout in FORMATS.items() if layout.write}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_text(name: str, scores: Scores, tmp_path: Path) -> None:
    file, text = GOLDEN[name]
    assert export(scores, name, tmp_path / file).read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", BY_ID)
@pytest.mark.parametrize("packed", [False, True])
def test_golden_text_is_read_back(name: str, packed: bool, tmp_path: Path) -> None:
    file, text = GOLDEN[name]
    path = tmp_path / (file + ".gz" if packed else file)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = imported(path, name)
    assert bits(found) == bits_of(ROWS)
    assert found.problems() == []
    repeated = 1 if name == "hofstaetter-tsv" else 0
    counts = {"queries": 2, "pairs": 5, "shards": 1, "repeated_pairs": repeated, "empty_queries": 0}
    assert found.manifest.counts == counts
    details = {"score_kind": "imported", "teacher": "import", "independent": True, "format": name}
    assert found.manifest.details == details
    assert [row.tokens_lost for row in found] == [None, None]


def test_gzip_is_written_and_the_same_bytes_again(scores: Scores, tmp_path: Path) -> None:
    first = export(scores, "trec", tmp_path / "a.trec.gz").read_bytes()
    assert gzip.decompress(first).decode() == TREC
    assert export(scores, "trec", tmp_path / "b.trec.gz").read_bytes() == first


def test_queries_are_in_the_order_of_their_hash_and_documents_as_first_read(tmp_path: Path) -> None:
    ids = [f"q{i}" for i in range(50)]
    text = "".join(f"{query} Q0 {doc} 1 {i} t\n" for i, doc in enumerate("zaby") for query in ids)
    found = list(imported(written(tmp_path, text), "trec"))
    assert [row.query_id for row in found] == sorted(ids, key=lambda one: zlib.crc32(one.encode()))
    assert all(row.doc_ids == list("zaby") and row.scores.tolist() == [0, 1, 2, 3] for row in found)


def test_manifest_of_an_import(pets: Collection, tmp_path: Path) -> None:
    path = written(tmp_path, PYLATE)
    found = imported(path, "pylate", collection=pets, score_kind="cosine")
    assert found.manifest.recipe == {
        "kind": "import",
        "format": "pylate",
        "source": "in.jsonl",
        "score_kind": "cosine",
    }
    assert found.score_kind == "cosine"
    assert found.manifest.inputs["source"]["name"] == str(path.resolve())
    assert found.manifest.inputs["collection"]["fingerprint"] == pets.fingerprint
    assert imported(path, "pylate", collection=pets, score_kind="cosine").manifest == found.manifest
    with pytest.raises(OutputExistsError, match="score_kind differ"):
        imported(path, "pylate", collection=pets)
    assert imported(path, "pylate", collection=pets, force=True).score_kind == "imported"


def test_shards_hold_whole_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.data.score_formats.convert._PAIRS_PER_SHARD", 5)
    text = "".join(f"q{i} Q0 d{j} 1 {i}.{j} t\n" for i in range(4) for j in range(2 if i else 9))
    found = imported(written(tmp_path, text), "trec")
    assert [path.name for path in found.shards] == [f"shard-{i:05d}-of-00003.parquet" for i in range(3)]
    lengths = {row.query_id: len(row.doc_ids) for row in found}
    assert lengths == {"q0": 9, "q1": 2, "q2": 2, "q3": 2}
    assert found.manifest.counts == {"queries": 4, "pairs": 15, "shards": 3, "repeated_pairs": 0, "empty_queries": 0}
    assert found.problems() == []


# Positives and negatives


def test_positives_of_qrels(scores: Scores, tmp_path: Path) -> None:
    assert export(scores, "hofstaetter-tsv", tmp_path / "x.tsv", labels="test").read_text() == HOFSTAETTER_BY_QRELS
    with pytest.raises(InputError, match="no split 'dev'"):
        export(scores, "hofstaetter-tsv", tmp_path / "y.tsv", labels="dev")


def test_best_document_ties_go_to_the_higher_id(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "s", [("q", ["a", "c", "b"], [1.0, 1.0, 0.0])])
    assert export(scores, "hofstaetter-tsv", tmp_path / "x.tsv").read_text() == (
        "1.0\t1.0\tq\tc\ta\n1.0\t0.0\tq\tc\tb\n"
    )


def test_every_pair_of_a_positive_and_a_negative(pets: Collection, tmp_path: Path) -> None:
    rows = [("q1", ["d1", "d2", "d3"], [1.0, 2.0, 3.0]), ("q2", ["d4", "d1"], [4.0, 5.0]), ("q3", ["d1"], [6.0])]
    scores = make_scores(tmp_path / "s", rows, pets)
    found = imported(export(scores, "hofstaetter-tsv", tmp_path / "x.tsv", labels="test"), "hofstaetter-tsv")
    assert bits(found) == bits_of(rows[:2])


def test_queries_left_out_are_named(pets: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("q1", ["d1", "d2"], [1.0, 2.0]), ("q2", ["d4"], [4.0])]
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        export(make_scores(tmp_path / "s", rows, pets), "flagembedding", tmp_path / "x.jsonl")
    assert "1 of 2 queries are not in" in caplog.text and "'q2'" in caplog.text
    with pytest.raises(DataError, match="none of its 1 queries has what tevatron needs"):
        export(make_scores(tmp_path / "t", rows[1:], pets), "tevatron", tmp_path / "y.jsonl")
    assert not (tmp_path / "y.jsonl").exists() and not (tmp_path / ".tmp-y.jsonl").exists()


def test_rows_of_n_negatives(pets: Collection, tmp_path: Path) -> None:
    """Three negatives in rows of two: the second row takes the last two."""
    rows = [("q1", ["d1", "d2", "d3", "d5"], [9.0, 2.0, 3.0, 5.0]), ("q2", ["d4", "d1"], [4.0, 5.0])]
    scores = make_scores(tmp_path / "s", rows, pets)
    path = export(scores, "sentence-transformers", tmp_path / "x.parquet", negatives=2)
    table = pq.read_table(path)
    assert table.schema.field("label").type == pa.list_(pa.float32())
    assert table.column_names == ["query", "positive", "negative_1", "negative_2", "label"]
    cats = "Cats sleep all day"
    assert [list(row.values()) for row in table.to_pylist()] == [
        ["who sleeps", cats, "Empty", "Dogs bark", [9.0, 2.0, 3.0]],
        ["who sleeps", cats, "Dogs bark", "", [9.0, 3.0, 5.0]],
    ]


# Texts


def test_texts_become_ids(pets: Collection, tmp_path: Path) -> None:
    rows = [("q1", ["d2", "d1"], [0.1, 2.5]), ("q2", ["d1", "d5", "d2"], [1.0, MAXIMUM, SUBNORMAL])]
    scores = make_scores(tmp_path / "s", rows, pets)
    for suffix in (".jsonl", ".parquet", ".jsonl.gz"):
        path = export(scores, "sentence-transformers", tmp_path / f"x{suffix}")
        found = imported(path, "sentence-transformers", collection=pets)
        assert bits(found) == bits_of(rows)
    lines = export(scores, "flagembedding", tmp_path / "fe.jsonl").read_text().splitlines()
    plain = [{k: v for k, v in json.loads(line).items() if not k.endswith(("_id", "_ids"))} for line in lines]
    path = written(tmp_path, "".join(json.dumps(record) + "\n" for record in plain), "plain.jsonl")
    assert bits(imported(path, "flagembedding", collection=pets)) == bits_of(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neg": ["Dogs bark"]}, r"in\.jsonl:1: 2 of the collection's texts are 'Dogs bark'.*'d3', 'd4'"),
        ({"neg": ["Dogs  bark"]}, r"in\.jsonl:1: no document of .* has exactly the text 'Dogs  bark'"),
        ({"query": "who"}, r"in\.jsonl:1: no query of .* has exactly the text 'who'"),
        ({"query": 7}, r"in\.jsonl:1: query is '7', not a string"),
    ],
)
def test_texts_that_name_nothing(changes: dict[str, Any], message: str, pets: Collection, tmp_path: Path) -> None:
    good = {"query": "who barks", "pos": ["Cats sleep all day"], "neg": ["Empty"], "pos_scores": [1], "neg_scores": [0]}
    assert bits(imported(written(tmp_path, json.dumps(good), "ok.jsonl"), "flagembedding", collection=pets)) == bits_of(
        [("q2", ["d1", "d2"], [1, 0])]
    )
    with pytest.raises(DataError, match=message):
        imported(written(tmp_path, json.dumps({**good, **changes})), "flagembedding", collection=pets)


def test_texts_need_a_collection(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds texts and no ids; name the collection .* --collection"):
        imported(written(tmp_path, SENTENCE_TRANSFORMERS), "sentence-transformers")
    with pytest.raises(ArtifactError, match="made without a collection; give one with --collection"):
        export(make_scores(tmp_path / "s"), "flagembedding", tmp_path / "x.jsonl")


def test_another_collection_is_refused(scores: Scores, beir: Path, tmp_path: Path) -> None:
    other = make_collection(str(beir), tmp_path / "other", sample=3)
    with pytest.raises(InputError, match="these scores are of another collection"):
        export(scores, "tevatron", tmp_path / "x.jsonl", collection=other)


def test_ids_that_the_collection_lacks(pets: Collection, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in\.jsonl:2: document id 'd9' is not in the collection"):
        imported(written(tmp_path, "q1 Q0 d1 1 1 t\nq1 Q0 d9 1 1 t\n"), "trec", collection=pets)
    with pytest.raises(DataError, match=r"in\.jsonl:1: query id 'q9' is not in the collection"):
        imported(written(tmp_path, "q9 Q0 d1 1 1 t\n"), "trec", collection=pets)
    unknown = make_scores(tmp_path / "s", [("q9", ["d1", "d2"], [1.0, 2.0])])
    with pytest.raises(DataError, match="query id 'q9' is unknown"):
        export(unknown, "tevatron", tmp_path / "x.jsonl", collection=pets)


def test_pylate_with_its_texts(scores: Scores, pets: Collection, tmp_path: Path) -> None:
    """Four of five documents occur; the texts are those that models read."""
    out = export(scores, "pylate", tmp_path / "train.parquet", collection=pets)
    assert bits(imported(out, "pylate")) == bits_of(ROWS)
    table = pq.read_table(out)
    assert table.column_names == ["query_id", "document_ids", "scores"]
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    assert pq.read_table(tmp_path / "train.queries.parquet").to_pylist() == [
        {"query_id": "q1", "text": "who sleeps"},
        {"query_id": "q2", "text": "who barks"},
    ]
    assert pq.read_table(tmp_path / "train.documents.parquet").to_pylist() == [
        {"document_id": "d1", "text": "Cats sleep all day"},
        {"document_id": "d3", "text": "Dogs bark"},
        {"document_id": "d2", "text": "Empty"},
        {"document_id": "d4", "text": "Dogs bark"},
    ]


# Files of others


def test_pylate_lists_as_text_and_ids_as_numbers(tmp_path: Path) -> None:
    text = '{"query_id": 7, "document_ids": "[3, 40]", "scores": "[0.25, 1]"}\n'
    assert bits(imported(written(tmp_path, text), "pylate")) == bits_of([("7", ["3", "40"], [0.25, 1.0])])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"query_id": [7], "document_ids": [[3, 40]], "scores": [[0.1, 1e-3]]}), path)
    assert bits(imported(path, "pylate")) == bits_of([("7", ["3", "40"], [0.1, 1e-3])])


def test_passages_in_parquet(tmp_path: Path) -> None:
    """Published datasets of tevatron are Parquet; its passages are lists of structs."""
    passages = [[{"docid": "a", "text": "t", "score": 0.1}, {"docid": "b", "text": "u", "score": -3.0}]]
    table = pa.table({"query_id": ["7"], "positive_passages": passages, "negative_passages": [[]]})
    pq.write_table(
        table.cast(table.schema.set(2, table.schema.field(1).with_name("negative_passages"))), tmp_path / "x.parquet"
    )
    assert bits(imported(tmp_path / "x.parquet", "tevatron")) == bits_of([("7", ["a", "b"], [0.1, -3])])


def test_sentence_transformers_by_id(tmp_path: Path) -> None:
    """One score for one document is a score; columns count by position."""
    text = '{"query_id": "1", "passage_id": 2, "score": 0.5}\n{"query_id": "1", "passage_id": 3, "score": -4}\n'
    assert bits(imported(written(tmp_path, text), "sentence-transformers")) == bits_of([("1", ["2", "3"], [0.5, -4])])
    rows = {
        "query_id": [1],
        "positive_id": [2],
        "negative_id_1": [3],
        "negative_2_id": [4],
        "scores": [[1.0, 2.0, 3.0]],
    }
    pq.write_table(pa.table(rows).rename_columns([*list(rows)[:3], "negative_id_2", "scores"]), tmp_path / "x.parquet")
    found = imported(tmp_path / "x.parquet", "sentence-transformers")
    assert bits(found) == bits_of([("1", ["2", "3", "4"], [1, 2, 3])])


def test_lines_of_windows_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeff" + HOFSTAETTER.replace("\n", "\r\n") + "\r\n\n"
    assert bits(imported(written(tmp_path, text, "x.tsv"), "hofstaetter-tsv")) == bits_of(ROWS)
    assert bits(imported(written(tmp_path, "\n  " + TREC + "\n", "x.trec"), "trec")) == bits_of(ROWS)
    assert bits(imported(written(tmp_path, "\ufeff" + PYLATE + "\n"), "pylate")) == bits_of(ROWS)


def test_lines_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.data.score_formats.lines._BLOCK_BYTES", 7)
    assert bits(imported(written(tmp_path, HOFSTAETTER.rstrip("\n"), "x.tsv"), "hofstaetter-tsv")) == bits_of(ROWS)
    with pytest.raises(DataError, match=r"y\.tsv:3: 4 columns"):
        imported(written(tmp_path, HOFSTAETTER.replace("\td4", ""), "y.tsv"), "hofstaetter-tsv")
