from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_score_files import (
    HOFSTAETTER,
    PYLATE,
    ROWS,
    TREC,
    bits,
    bits_of,
    export,
    imported,
    make_scores,
    written,
)

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.score_formats.convert import convert_scores
from retrieval_kd.data.scores import Scores
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import DataError, InputError, OutputExistsError, UsageError


@pytest.fixture
def pets(beir: Path, tmp_path: Path) -> Collection:
    """d3 and d4 both read ``Dogs bark``."""
    return make_collection(str(beir), tmp_path / "collection")


@pytest.fixture
def scores(pets: Collection, tmp_path: Path) -> Scores:
    return make_scores(tmp_path / "scores", collection=pets)


@pytest.mark.parametrize(
    "text",
    [
        '{"query_id": 1, "positive_id": 2, "negative_id": 3, "score": 1.5}',
        '{"query_id": 1, "positive_id": 2, "negative_id": 3, "label": [1.5]}',
        '{"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m", "labels": [1.5, 2]}',
    ],
)
def test_margins_are_refused(text: str, pets: Collection, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in\.jsonl:1: .* are margins .* a score file holds the scores themselves"):
        imported(written(tmp_path, text), "sentence-transformers", collection=pets)


GOOD = {
    "hofstaetter-tsv": "1\t0\tq\ta\tb",
    "trec": "q Q0 a 1 1 t",
    "pylate": '{"query_id": "q", "document_ids": ["a"], "scores": [1]}',
}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("hofstaetter-tsv", "1\tq\ta\tb", r"4 columns; a line has 5 .*; one margin for two documents is not two"),
        ("hofstaetter-tsv", "1\t0\tq\ta\tb\tc", "6 columns"),
        ("hofstaetter-tsv", "1\t0\tq\ta\t", "the document id is empty"),
        ("hofstaetter-tsv", "1\t0\t\ta\tb", "the query id is empty"),
        ("hofstaetter-tsv", "1\tnan\tq\ta\tb", "score 'nan' is not a finite number"),
        ("hofstaetter-tsv", "1e39\t0\tq\ta\tb", "score '1e39' is not a finite number that float32 can hold"),
        ("hofstaetter-tsv", "high\t0\tq\ta\tb", "score 'high' is not a number"),
        ("hofstaetter-tsv", "\t0\tq\ta\tb", "score '' is not a number"),
        ("trec", "q Q0 a 1 1", "5 columns; a line has 6"),
        ("trec", "q Q0 b 1 -inf t", "score '-inf' is not a finite"),
        ("pylate", '{"query_id": "q"', "not valid JSON"),
        ("pylate", "[1]", "is not a JSON object"),
        ("pylate", '{"document_ids": ["a"], "scores": [1]}', "query_id None is neither a string nor a whole number"),
        ("pylate", '{"query_id": 1.5, "document_ids": ["a"], "scores": [1]}', "query_id '1.5' is neither"),
        ("pylate", '{"query_id": true, "document_ids": ["a"], "scores": [1]}', "query_id True is neither"),
        ("pylate", '{"query_id": "", "document_ids": ["a"], "scores": [1]}', "the query id is empty"),
        ("pylate", '{"query_id": "q", "document_ids": ["a"]}', r"no 'scores' \(it has query_id, document_ids\)"),
        ("pylate", '{"query_id": "q", "document_ids": "a", "scores": [1]}', "'document_ids' is the text 'a'"),
        ("pylate", '{"query_id": "q", "document_ids": {}, "scores": [1]}', "'document_ids' is {}, not a list"),
        ("pylate", '{"query_id": "q", "document_ids": ["a", "b"], "scores": [1]}', "2 documents but 1 scores"),
        ("pylate", '{"query_id": "q", "document_ids": ["a"], "scores": [NaN]}', "score 'NaN' is not a finite"),
        ("pylate", '{"query_id": "q", "document_ids": ["a"], "scores": ["1"]}', "score '1' is not a number"),
        ("pylate", '{"query_id": "q", "document_ids": ["a"], "scores": [null]}', "score None is not a number"),
        ("tevatron", '{"query_id": "q", "positive_passages": [{"docid": "a"}], "negative_passages": []}', "without"),
        ("pylate", '{"query_id": "\\ud800", "document_ids": ["a"], "scores": [1]}', "is not valid Unicode"),
        ("pylate", "[" * 100_000, "not valid JSON"),
        ("sentence-transformers", '{"query_id": "q", "passage": "a", "label": 1}', "neither all ids"),
        ("sentence-transformers", '{"query_id": "q", "positive_id": "a"}', "0 columns of label, labels"),
        ("sentence-transformers", '{"query_id": "q", "label": 1}', "a query and at least one document"),
        ("sentence-transformers", '{"query_id": "q", "a_id": "a", "label": [1, 2, 3]}', "3 label.* for 1 doc"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(name: str, line: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"{GOOD.get(name, '')}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{message}"):
        imported(path, name)
    assert [path.name for path in tmp_path.iterdir()] in (["in.jsonl"], ["in.jsonl", "in.jsonl.scores.partial"])
    assert not (tmp_path / "in.jsonl.scores").exists()


def test_bad_parquet(tmp_path: Path) -> None:
    path = written(tmp_path, "PAR1", "x.parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        imported(path, "pylate")
    table = {"query_id": ["a", "b"], "document_ids": [["d"], ["d"]], "scores": [[1.0], [float("inf")]]}
    pq.write_table(pa.table(table), path)
    with pytest.raises(DataError, match=r"x\.parquet, row 1: query 'b', document 'd': score inf is not finite"):
        imported(path, "pylate")


def test_other_bad_files(tmp_path: Path) -> None:
    (tmp_path / "bad.tsv").write_bytes(b"1\t0\tq\ta\tb\n1\t0\tq\t\xff\tb\n")
    with pytest.raises(DataError, match=r"bad\.tsv:2: not valid UTF-8"):
        imported(tmp_path / "bad.tsv", "hofstaetter-tsv")
    with pytest.raises(DataError, match="no scored pairs"):
        imported(written(tmp_path, "", "empty.tsv"), "hofstaetter-tsv")
    with pytest.raises(DataError, match="no scored pairs"):
        imported(written(tmp_path, "\n\n", "blank.tsv"), "hofstaetter-tsv")
    packed = gzip.compress(HOFSTAETTER.encode())
    for content in (b"plain", packed[:-9], packed[:20] + b"xx" + packed[22:]):
        (tmp_path / "x.tsv.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.tsv\.gz: damaged gzip file"):
            imported(tmp_path / "x.tsv.gz", "hofstaetter-tsv")
    with pytest.raises(UsageError, match=r"end its name in \.parquet or \.jsonl"):
        imported(written(tmp_path, PYLATE, "x.txt"), "pylate")
    with pytest.raises(InputError, match="no such file"):
        imported(tmp_path / "nothing", "trec")


def test_a_pair_with_two_scores(tmp_path: Path) -> None:
    """0.1 written with more digits is the same float32; 0.10000001 is the next one."""
    text = "1\t0.1\tq\ta\tb\n1.0\t0\tq\ta\tc\n2\t{}\tq\td\tb\n"
    same = imported(written(tmp_path, text.format("0.1000000014901161"), "x.tsv"), "hofstaetter-tsv")
    assert same.manifest.counts == {"queries": 1, "pairs": 4, "shards": 1, "repeated_pairs": 2, "empty_queries": 0}
    message = r"y\.tsv:1 and .*y\.tsv:3: query 'q', document 'b' has two scores, 0\.1 and 0\.10000001;"
    with pytest.raises(DataError, match=message):
        imported(written(tmp_path, text.format("0.10000001"), "y.tsv"), "hofstaetter-tsv")


# Arguments and outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_format": "treck"}, r"--from treck: unknown format \(did you mean 'trec'\?\)"),
        ({"to_format": "parquet"}, "--to parquet: unknown format"),
        ({"to_format": "trec"}, "both trec"),
        ({"to_format": "st-pickle"}, "only read"),
        ({"labels": "test"}, "--labels: retrieval-kd does not tell positives"),
        ({"to_format": "pylate", "labels": "test"}, "--labels: pylate does not tell"),
        ({"to_format": "tevatron", "negatives": 3}, "--negatives 3: only for"),
        ({"to_format": "sentence-transformers", "negatives": 0}, "at least 1"),
        ({"to_format": "pylate", "score_kind": "logit"}, "--score-kind: pylate does not say"),
        ({"score_kind": "logits"}, r"--score-kind logits: unknown kind of score \(did you mean 'logit'\?\)"),
        ({"score_kind": "banana"}, r"unknown kind of score \(valid: bm25, cosine, dot, ensemble, grade"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"from_format": "trec", "to_format": "retrieval-kd", **options}
    with pytest.raises(UsageError, match=message):
        convert_scores(written(tmp_path, TREC), out=tmp_path / "out", **given)


def test_one_foreign_layout_to_another(pets: Collection, tmp_path: Path) -> None:
    source = written(tmp_path, HOFSTAETTER, "x.tsv")
    out = tmp_path / "new" / "x.jsonl"
    convert_scores(source, from_format="hofstaetter-tsv", to_format="tevatron", out=out, collection=pets)
    assert bits(imported(out, "tevatron")) == bits_of(ROWS)
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.jsonl", "x.jsonl.scores"]


def test_files_that_are_there_stay(scores: Scores, pets: Collection, tmp_path: Path) -> None:
    out = written(tmp_path, "mine", "x.parquet")
    with pytest.raises(OutputExistsError, match=r"x\.parquet exists; choose another --out or pass --force"):
        export(scores, "pylate", out)
    run = written(tmp_path, "mine", "x.trec")
    with pytest.raises(DataError, match="white space cannot be written as trec"):
        export(make_scores(tmp_path / "s", [("q q", ["a"], [1.0])]), "trec", run, force=True)
    assert (out.read_text(), run.read_text()) == ("mine", "mine")
    assert bits(imported(export(scores, "pylate", out, force=True), "pylate")) == bits_of(ROWS)
    written(tmp_path, "mine too", "y.queries.parquet")
    with pytest.raises(OutputExistsError, match=r"y\.queries\.parquet exists"):
        export(scores, "pylate", tmp_path / "y.parquet", collection=pets)
    assert not (tmp_path / "y.parquet").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(OutputExistsError, match="is a directory"):
        export(scores, "trec", scores.path, force=True)


@pytest.mark.parametrize(("name", "bad"), [("hofstaetter-tsv", "a\tb"), ("hofstaetter-tsv", "a\r"), ("trec", "a b")])
def test_ids_that_a_layout_cannot_hold(name: str, bad: str, tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "s", [("q", [bad, "c"], [1.0, 2.0])])
    with pytest.raises(DataError, match=f"cannot be written as {name}: {bad!r}".replace("\\", "\\\\")):
        export(scores, name, tmp_path / "out")
    rows = [("q\t1", ['d"\n1', "é\u2028"], [1.0, 2.0])]
    found = imported(export(make_scores(tmp_path / "t", rows), "pylate", tmp_path / "x.jsonl"), "pylate")
    assert bits(found) == bits_of(rows)


def test_an_interrupted_import_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    path = written(tmp_path, TREC)
    with monkeypatch.context() as patch:
        patch.setattr("retrieval_kd.data.score_formats.convert.write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            imported(path, "trec")
    assert not (tmp_path / "in.jsonl.scores").exists()
    assert bits(imported(path, "trec")) == bits_of(ROWS)
    assert sorted(child.name for child in (tmp_path / "in.jsonl.scores").iterdir()) == [
        "manifest.json",
        "shard-00000-of-00001.parquet",
    ]


def test_zeros_of_both_signs_are_one_score(tmp_path: Path) -> None:
    found = imported(written(tmp_path, "0\t-0.0\tq\ta\tb\n1\t0.0\tq\tc\tb\n"), "hofstaetter-tsv")
    (row,) = found
    assert row.doc_ids == ["a", "b", "c"]
    assert np.signbit(row.scores).tolist() == [False, True, False]
