from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from retrieval_kd.cli import app
from retrieval_kd.data.collection import Collection
from retrieval_kd.teachers.bm25 import BM25Teacher


def call(*arguments: object, expect: int = 0) -> Any:
    """The result of one command line, whose exit code must be ``expect``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    return result


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return tiny.make_tiny_collection(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def candidates(collection: Collection) -> Path:
    return tiny.make_candidates(collection.path.parent, collection)


@pytest.fixture(scope="module")
def recipe(collection: Collection) -> str:
    """BM25 needs no model, so that it can run anywhere."""
    return tiny.write_recipe(collection.path.parent / "bm25.yaml", {"kind": "bm25", "pairs_per_shard": 60})


def score(recipe: str, collection: Collection, candidates: Path, out: Path, *options: object, expect: int = 0) -> Any:
    inputs = ["--collection", collection.path, "--candidates", candidates, "--out", out]
    return call("score", recipe, *inputs, *options, expect=expect)


def test_slices_and_merge(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    score(recipe, collection, candidates, tmp_path / "whole")
    parts = [tmp_path / f"part-{i}" for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        score(recipe, collection, candidates, part, "--shard", f"{i}/3")
    said = call("scores", "merge", *parts, "--out", tmp_path / "merged").stdout
    assert said.startswith(f"{tmp_path / 'merged'}: scores with 30 queries, 180 pairs, 3 shards")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "merged")]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    refused = call("scores", "merge", parts[0], parts[2], "--out", tmp_path / "gap", expect=4)
    assert "1 of 3 shards are in none of the files: 1" in refused.output


def test_workers_reuse_and_max_failed(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    score(recipe, collection, candidates, tmp_path / "first", "--workers", 1, "--max-failed", 0)
    wide = tiny.make_candidates(tmp_path, collection, depth=8)
    said = score(recipe, collection, wide, tmp_path / "second", "--reuse", tmp_path / "first", "--json").stdout
    assert json.loads(said)["counts"]["reused_pairs"] == 180


def test_show(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    score(recipe, collection, candidates, tmp_path / "scores")
    picture = tmp_path / "scores.png"
    text = call("scores", "show", tmp_path / "scores", "--png", picture).stdout
    assert "180" in text and "bm25" in text and picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(call("scores", "show", tmp_path / "scores", "--split", "train", "--json").stdout)
    assert json.dumps(found) and "nan" not in json.dumps(found).lower()
    refused = call("scores", "show", tmp_path / "scores", "--split", "nobody", expect=4)
    assert "no split 'nobody'" in refused.output


def test_show_lists_what_the_driver_could_not_score(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = collection.documents.text(0)
    scored = BM25Teacher.score

    def refuse(self: BM25Teacher, shard: Any, texts: Any) -> Any:
        if any(poison in of_query for of_query in texts):
            raise ValueError("cannot read this")
        return scored(self, shard, texts)

    monkeypatch.setattr(BM25Teacher, "score", refuse)
    said = score(recipe, collection, candidates, tmp_path / "scores", "--json").stdout
    failed = json.loads(said)["counts"]["failed_pairs"]
    text = call("scores", "show", tmp_path / "scores").stdout.splitlines()
    at = text.index(f"{failed:,} pairs could not be scored and are not in the file")
    assert failed and f", document '{collection.documents.id(0)}': ValueError: cannot read this" in text[at + 1]


def test_convert_there_and_back(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    score(recipe, collection, candidates, tmp_path / "scores")
    run, back = tmp_path / "scores.trec", tmp_path / "back"
    said = call("scores", "convert", tmp_path / "scores", "--from", "retrieval-kd", "--to", "trec", "--out", run).stdout
    assert said == f"{run}: trec with 30 queries, 0 queries left out\n" and len(run.read_text().splitlines()) == 180
    said = call(
        "scores", "convert", run, "--from", "trec", "--to", "retrieval-kd", "--score-kind", "bm25", "--out", back
    )
    assert said.stdout.startswith(f"{back}: scores with 30 queries, 180 pairs")
    unknown = call(
        "scores", "convert", run, "--from", "trek", "--to", "retrieval-kd", "--out", tmp_path / "x", expect=2
    )
    assert "did you mean 'trec'?" in unknown.output
    facts = call(
        "scores", "convert", back, "--from", "retrieval-kd", "--to", "pylate", "--out", tmp_path / "p.jsonl", "--json"
    )
    found = json.loads(facts.stdout)
    assert (found["format"], found["counts"]) == ("pylate", {"queries": 30, "queries_left_out": 0})


def test_convert_tells_its_rows(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    """Every query has six candidates: one positive, and five negatives in rows of two."""
    score(recipe, collection, candidates, tmp_path / "scores")
    out = tmp_path / "x.parquet"
    options = ["--from", "retrieval-kd", "--to", "sentence-transformers", "--negatives", 2]
    said = call("scores", "convert", tmp_path / "scores", *options, "--out", out, "--json").stdout
    counts = json.loads(said)["counts"]
    assert (counts["queries"], counts["rows"], counts["negatives_a_row"]) == (30, 90, 2)
    assert counts["repeated_documents"] == 30
    said = " ".join(call("scores", "convert", "--help").stdout.split())
    assert "by default the fewest that a query has" in said and "meanmaxsim" in said
    refused = call("scores", "convert", tmp_path / "scores", *options, "--out", tmp_path / "x.csv", expect=2)
    assert "written as .parquet or .jsonl" in refused.output


def test_ensemble(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    score(recipe, collection, candidates, tmp_path / "one")
    score(recipe, collection, candidates, tmp_path / "two", "--set", "k1=2.0")
    members = [f"a={tmp_path / 'one'}", f"b={tmp_path / 'two'}"]
    said = call("scores", "ensemble", "teachers/ensemble-heterogeneous", *members, "--out", tmp_path / "both").stdout
    assert said.startswith(f"{tmp_path / 'both'}: scores with 30 queries, 180 pairs")
    shown = call("scores", "show", tmp_path / "both").stdout.splitlines()
    fingerprint = json.loads((tmp_path / "one" / "manifest.json").read_text())["fingerprint"][:12]
    assert shown[shown.index("Members") + 1] == f"  a: bm25, bm25, bm25, fingerprint {fingerprint}"
    assert "  0 queries were left out: not every member has them" in shown
    refused = call(
        "score",
        "teachers/ensemble-t2",
        "--collection",
        collection.path,
        "--candidates",
        candidates,
        "--out",
        tmp_path / "x",
        expect=2,
    )
    assert "combines score files: retrieval-kd scores ensemble teachers/ensemble-t2" in refused.output


@pytest.mark.parametrize("verb", ["show", "merge", "convert", "ensemble"])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    assert f"Example: retrieval-kd scores {verb} " in call("scores", verb, "--help").stdout
