"""What a conversion says: what it left out or repeated, which file is meant, and which names do not fit."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_score_files import HOFSTAETTER, PYLATE, TREC, bits, bits_of, export, imported, make_scores, written

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.score_formats.convert import convert_scores
from retrieval_kd.data.score_formats.export import Written
from retrieval_kd.data.score_kinds import SCORE_KINDS
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import DataError, InputError, RetrievalKDError, UsageError

EMPTY = '{"query_id": "%s", "document_ids": [], "scores": []}\n'


@pytest.fixture
def pets(beir: Path, tmp_path: Path) -> Collection:
    return make_collection(str(beir), tmp_path / "collection")


# Queries without documents


def test_queries_without_documents_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Six empty lists, one of a query that has documents on another line and one that is repeated."""
    empty = "".join(EMPTY % name for name in ("e1", "e2", "q1", "e3", "e4", "e1"))
    path = written(tmp_path, empty + PYLATE)
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        found = imported(path, "pylate")
    assert found.manifest.counts == {"queries": 2, "pairs": 5, "shards": 1, "repeated_pairs": 0, "empty_queries": 4}
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 4 queries have an empty list of documents and are left out: 'e1', 'e2', 'e3', …"
    ]
    assert found.problems() == []


def test_they_are_also_counted_on_the_way_to_another_layout(tmp_path: Path) -> None:
    path = written(tmp_path, PYLATE + EMPTY % "e1")
    found = convert_scores(path, from_format="pylate", to_format="trec", out=tmp_path / "x.trec")
    assert found == Written(tmp_path / "x.trec", {"queries": 2, "queries_left_out": 0, "empty_queries": 1})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("st-pickle", pickle.dumps({1: {}, "q": {"d": 1.5}})),
        (
            "flagembedding",
            b'{"query_id": "1", "pos_ids": [], "neg_ids": [], "pos_scores": [], "neg_scores": []}\n'
            b'{"query_id": "q", "pos_ids": ["d"], "neg_ids": [], "pos_scores": [1.5], "neg_scores": []}\n',
        ),
        (
            "tevatron",
            b'{"query_id": "1", "positive_passages": [], "negative_passages": []}\n'
            b'{"query_id": "q", "positive_passages": [{"docid": "d", "score": 1.5}], "negative_passages": []}\n',
        ),
    ],
)
def test_every_layout_that_can_hold_an_empty_query(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    found = imported(tmp_path / "in.jsonl", name)
    assert bits(found) == bits_of([("q", ["d"], [1.5])])
    assert found.manifest.counts["empty_queries"] == 1


def test_nothing_but_empty_queries(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in\.jsonl: no scored pairs in it"):
        imported(written(tmp_path, EMPTY % "q"), "pylate")


# What a score is


@pytest.mark.parametrize(("kind", "independent"), [("logit", True), ("rank", False)])
def test_ranks_depend_on_the_list(kind: str, independent: bool, tmp_path: Path) -> None:
    found = imported(written(tmp_path, TREC), "trec", score_kind=kind)
    assert found.manifest.details["independent"] is independent


def test_kinds_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.split("| `score_kind` | is |\n|---|---|\n")[1].split("\n\n")[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert named == list(SCORE_KINDS)


# Rows of sentence-transformers


def test_rows_and_repetitions_are_told(pets: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two negatives a row: three make two rows that share one; two make one row; one is too few."""
    rows = [
        ("q1", ["d1", "d2", "d3", "d5"], [9.0, 2.0, 3.0, 5.0]),
        ("q2", ["d4", "d1", "d2"], [6.0, 5.0, 4.0]),
        ("q3", ["d1", "d2"], [1.0, 0.0]),
    ]
    scores = make_scores(tmp_path / "s", rows, pets)
    formats: dict[str, str] = {"from_format": "retrieval-kd", "to_format": "sentence-transformers"}
    out = tmp_path / "x.jsonl"
    with caplog.at_level(logging.INFO, "retrieval_kd"):
        found = convert_scores(scores.path, out=out, negatives=2, **formats)
    assert found == Written(
        out,
        {
            "queries": 2,
            "queries_left_out": 1,
            "rows": 3,
            "negatives_a_row": 2,
            "repeated_documents": 1,
            "most_rows_a_query": 2,
        },
    )
    assert len(out.read_text().splitlines()) == 3
    said = "3 rows of 2 queries; 2 negatives a row, 1 of them repeated to fill a row; a query has up to 2 rows"
    assert f"{out}: {said}" in caplog.text


def test_the_default_loses_no_query(pets: Collection, tmp_path: Path) -> None:
    """The smaller query has two negatives, the larger three: rows of two."""
    rows = [("q1", ["d1", "d2", "d3", "d5"], [9.0, 2.0, 3.0, 5.0]), ("q2", ["d4", "d1", "d2"], [6.0, 5.0, 4.0])]
    scores = make_scores(tmp_path / "s", rows, pets)
    found = convert_scores(
        scores.path, from_format="retrieval-kd", to_format="sentence-transformers", out=tmp_path / "x.jsonl"
    )
    assert isinstance(found, Written)
    assert found.counts["queries_left_out"] == 0
    assert (found.counts["rows"], found.counts["negatives_a_row"], found.counts["repeated_documents"]) == (3, 2, 1)


def test_margins_name_the_columns_that_were_taken(pets: Collection, tmp_path: Path) -> None:
    row = {"idx": "7", "query": "q", "positive": "p", "label": [1.5]}
    message = r"in\.jsonl:1: 1 label\(s\) for 2 documents are margins .* the query is 'idx', its documents 'query', "
    with pytest.raises(DataError, match=message + "'positive'; remove what is none of these"):
        imported(written(tmp_path, json.dumps(row)), "sentence-transformers", collection=pets)


# Names of files


@pytest.mark.parametrize(
    ("name", "file", "mend"),
    [
        ("flagembedding", "x.parquet", r"written as \.jsonl; end the name so"),
        ("tevatron", "x.parquet", r"written as \.jsonl; end the name so"),
        ("tevatron", "x", r"written as \.jsonl; end the name so"),
        ("pylate", "x.csv", r"written as \.parquet or \.jsonl; end the name so"),
        ("sentence-transformers", "x.csv", r"written as \.parquet or \.jsonl; end the name so"),
        ("sentence-transformers", "x.parquet.gz", r"written as \.parquet or \.jsonl; end the name so"),
        ("trec", "x.parquet", r"written as plain lines, not as this name says; end it in \.tsv or \.txt"),
        ("hofstaetter-tsv", "x.jsonl.gz", r"written as plain lines, not as this name says; end it in \.tsv or \.txt"),
    ],
)
def test_names_that_say_something_else(name: str, file: str, mend: str, pets: Collection, tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "s", collection=pets)
    out = tmp_path / "new" / file
    with pytest.raises(UsageError, match=f"^{re.escape(str(out))}: {name} is {mend}"):
        export(scores, name, out)
    assert not out.parent.exists()


def from_triples(source: Path, to_format: str, out: Path, **options: Any) -> None:
    convert_scores(source, from_format="hofstaetter-tsv", to_format=to_format, out=out, **options)


def test_errors_name_the_file_that_was_given(pets: Collection, tmp_path: Path) -> None:
    """Between two foreign layouts lies an artifact that nobody has heard of."""
    source = written(tmp_path, HOFSTAETTER, "x.tsv")
    with pytest.raises(
        UsageError, match=rf"^{source}: hofstaetter-tsv does not say of which collection .*--collection"
    ):
        from_triples(source, "tevatron", tmp_path / "y.jsonl")
    with pytest.raises(UsageError, match=rf"^{source}: .*--collection"):
        from_triples(source, "flagembedding", tmp_path / "y.jsonl")
    few = {"negatives": 9, "collection": pets}
    with pytest.raises(DataError, match=f"^{source}: none of its 2 queries has what sentence-transformers needs"):
        from_triples(source, "sentence-transformers", tmp_path / "y.jsonl", **few)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["x.tsv"]


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.EACCES, InputError, "cannot be written (Permission denied)"),
        (errno.ENOSPC, RetrievalKDError, "the disk is full"),
    ],
)
def test_what_the_system_refuses_names_the_output(
    code: int, kind: type[RetrievalKDError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("retrieval_kd.data.score_formats.trec.writing", refuse)
    out = tmp_path / "out.trec"
    with pytest.raises(kind, match=f"^{re.escape(f'{out}: {message}')}") as caught:
        export(make_scores(tmp_path / "s"), "trec", out)
    assert ".tmp" not in str(caught.value)
