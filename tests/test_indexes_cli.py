"""The verbs of an index on the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_indexes import sparse_documents, write_documents
from typer.testing import CliRunner

from retrieval_kd.cli import app
from retrieval_kd.indexes.base import Index


def call(*arguments: object, expect: int = 0) -> Any:
    """The result of one command line, whose exit code must be ``expect``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    return result


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "vectors", sparse_documents(10), [f"d{row}" for row in range(10)]).path


def test_shards_on_the_command_line(vectors: Path, tmp_path: Path) -> None:
    arguments = ("index", "sparse-exact", "--vectors", vectors, "--shards", 3, "--out", tmp_path / "index")
    plan = json.loads(call(*arguments, "--dry-run", "--json").stdout)
    assert plan["recipe"]["shards"] == 3 and plan["cost"]["documents"] == 10
    made = json.loads(call(*arguments, "--json").stdout)
    assert made["details"]["segments"] == ["segment-000001", "segment-000002", "segment-000003"]
    assert call("check", tmp_path / "index").stdout.strip().endswith("all well")
    refused = call("index", "sparse-exact", "--vectors", vectors, "--scores", "x", "--out", tmp_path / "b", expect=2)
    assert "learns nothing; leave out --scores" in refused.stderr


def test_updates_on_the_command_line(vectors: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    call("index", "sparse-exact", "--vectors", vectors, "--out", index)
    more = write_documents(tmp_path / "more", sparse_documents(2), ["new1", "new2"]).path
    added = call("update", index, "add", "--vectors", more).stdout
    assert added.startswith(f"{index}: index with 12 documents")
    (tmp_path / "ids.txt").write_text("d1\nnew2\n\n")
    deleted = json.loads(call("update", index, "delete", "--ids-file", tmp_path / "ids.txt", "--json").stdout)
    assert (deleted["counts"]["documents"], deleted["counts"]["deleted"]) == (10, 2)
    call("update", index, "delete", "--ids", "d2, d3")
    assert json.loads(call("update", index, "compact", "--json").stdout)["counts"]["documents"] == 8
    assert Index.load(index).ids.to_pylist() == ["d0", "d4", "d5", "d6", "d7", "d8", "d9", "new1"]


def test_updates_that_are_refused(vectors: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    call("index", "sparse-exact", "--vectors", vectors, "--out", index)
    assert "1 of 1 ids are not in it: 'd99'" in call("update", index, "delete", "--ids", "d99", expect=4).stderr
    assert "not both" in call("update", index, "delete", "--ids", "a", "--ids-file", "b", expect=2).stderr
    assert "cannot be read" in call("update", index, "delete", "--ids-file", tmp_path / "no", expect=2).stderr
    assert "no such file" in call("update", tmp_path / "nothing", "compact", expect=4).stderr
    assert "does not take --rebuild" in call("update", index, "compact", "--rebuild", expect=2).stderr
    call("update", index, "remove", expect=2)


def test_a_filter_on_the_command_line(tmp_path: Path) -> None:
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{i}", "title": "", "text": "cat", "year": 2000 + i} for i in range(5)]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (beir / "queries.jsonl").write_text('{"_id": "q1", "text": "cat"}\n')
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    call("data", beir, "--out", tmp_path / "c")
    call("index", "bm25", "--collection", tmp_path / "c", "--out", tmp_path / "bm25")
    filters = ("--filter", "year >= 2001", "--filter", "year in 2000,2001,2003")
    found = json.loads(call("search", tmp_path / "bm25", "cat", *filters, "--json").stdout)["hits"]
    assert [hit["doc_id"] for hit in found] == ["d3", "d1"]
    run = ("--collection", tmp_path / "c", "--split", "test", "--out", tmp_path / "run.trec")
    call("search", tmp_path / "bm25", *run, *filters)
    assert [line.split()[2] for line in (tmp_path / "run.trec").read_text().splitlines()] == ["d3", "d1"]
    assert "no attribute 'yaer'" in call("search", tmp_path / "bm25", "cat", "--filter", "yaer = 1", expect=2).stderr
