from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import trivial

from retrieval_kd.artifact import resolve
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import Scores, read_shard, shard_statistics, teacher_identity, write_shard
from retrieval_kd.errors import (
    ArtifactError,
    DataError,
    InputError,
    OutputExistsError,
    RecipeError,
    RetrievalKDError,
    UsageError,
)
from retrieval_kd.registry import TEACHERS
from retrieval_kd.teachers import shards as shards_module
from retrieval_kd.teachers.score import estimate_score, score
from retrieval_kd.verify import check


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TEACHERS, "trivial", trivial.ENTRY)
    return tiny.write_recipe(tmp_path / "trivial.yaml", {"kind": "trivial", "pairs_per_shard": 20})


def made_run(path: Path, hits: dict[str, list[str]]) -> Path:
    """A TREC file with each query's documents in this order."""
    lines = [f"{q} Q0 {d} {i + 1} {100 - i} made\n" for q, docs in hits.items() for i, d in enumerate(docs)]
    path.write_text("".join(lines))
    return path


def by_query(scores: Scores) -> dict[str, dict[str, float]]:
    return {row.query_id: dict(zip(row.doc_ids, row.scores.tolist(), strict=True)) for row in scores}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def failed(scores: Scores) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (scores.path / "failed.jsonl").read_text().splitlines()]
    return [(row["query_id"], row["doc_id"]) for row in rows]


def stops_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Ctrl-C when this many shards were written."""
    written: list[Path] = []

    def write(path: Path, *arguments: Any) -> None:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, *arguments)

    monkeypatch.setattr(shards_module, "write_shard", write)


def test_every_pair_has_its_score(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    scores = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    found = by_query(scores)
    for i in range(30):
        rows = [(i + j) % 40 for j in range(6)]
        assert list(found[f"train-{i}"]) == tiny.ids_of(rows)
        texts = [f" train-{i} {tiny.document_text(row)}".encode() for row in rows]
        expected = [int.from_bytes(hashlib.sha256(text).digest()[:4], "little") / 2**32 for text in texts]
        np.testing.assert_array_equal(list(found[f"train-{i}"].values()), np.array(expected, dtype=np.float32))
    assert scores.manifest.counts == {
        "queries": 30,
        "pairs": 180,
        "shards": 10,
        "truncated_pairs": 150,
        "tokens_lost": 30 * (1 + 2 + 3 + 4 + 5),
        "failed_pairs": 0,
        "seen": 180,
    }
    assert scores.manifest.details["execution"] == {"log": None, "seconds": 0.0}
    assert all(row.tokens_lost is not None and row.tokens_lost.tolist() == [0, 1, 2, 3, 4, 5] for row in scores)
    assert sorted(scores.manifest.inputs) == ["candidates", "collection", "model"]
    assert scores.problems() == [] and check(scores.path) == []


def test_depth_and_union(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    """Two of each run: d05, d06 for train-5 from the first; the second adds d30 and repeats d05."""
    second = made_run(tmp_path / "second.trec", {"train-5": ["d30", "d05", "d31"], "test-1": ["d02"]})
    scores = score(
        recipe,
        collection=collection,
        candidates=[candidates, second, "qrels:dev"],
        out=tmp_path / "scores",
        overrides=["depth=2"],
    )
    found = by_query(scores)
    assert list(found["train-5"]) == ["d05", "d06", "d30"]
    assert list(found["test-1"]) == ["d02"]
    assert list(found) == [f"train-{i}" for i in range(30)] + ["test-1"] + [f"dev-{i}" for i in range(6)]
    assert scores.manifest.counts["pairs"] == 30 * 2 + 1 + 1 + 6
    assert sorted(scores.manifest.inputs) == ["candidates", "candidates_2", "collection", "model"]


def test_a_score_file_can_be_the_candidates(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    first = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "first")
    second = score(
        recipe,
        collection=collection,
        candidates=[first.path],
        out=tmp_path / "second",
        overrides=["depth=2", "salt=other"],
    )
    for query_id, scored in by_query(second).items():
        best = sorted(by_query(first)[query_id].items(), key=lambda item: -item[1])[:2]
        assert list(scored) == [doc_id for doc_id, _ in best]


def test_judged_documents_as_candidates(recipe: str, collection: Collection, tmp_path: Path) -> None:
    scores = score(recipe, collection=collection, candidates=["qrels:train", "qrels:dev"], out=tmp_path / "scores")
    found = {query: list(docs) for query, docs in by_query(scores).items()}
    assert found == {f"{split}-{i}": [f"d{i:02d}"] for split, n in (("train", 30), ("dev", 6)) for i in range(n)}
    assert scores.manifest.recipe["candidates"] == ["qrels:train", "qrels:dev"]
    with pytest.raises(InputError, match="no split 'tran'"):
        score(recipe, collection=collection, candidates=["qrels:tran"], out=tmp_path / "other")
    with pytest.raises(OutputExistsError, match=r"candidates"):
        score(recipe, collection=collection, candidates=["qrels:train"], out=tmp_path / "scores")


def test_finished_scores_are_kept(
    recipe: str, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with other execution keys, which cannot change a score."""
    first = score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "scores")
    monkeypatch.setattr(shards_module, "write_shard", lambda *_: pytest.fail("scored again"))
    again = score(
        recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "scores", overrides=["seconds=0.5"]
    )
    assert again.manifest.created == first.manifest.created


def test_candidates_that_do_not_fit(recipe: str, collection: Collection, tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, *sources: str | Path) -> None:
        with pytest.raises(error, match=message):
            score(recipe, collection=collection, candidates=sources, out=tmp_path / "scores")

    queries = {"train-1": ["d01"], "nobody-1": ["d01"], "nobody-2": ["d01"]}
    refused(
        InputError,
        r"queries.trec: 2 queries are not in the collection: 'nobody-1', 'nobody-2'",
        made_run(tmp_path / "queries.trec", queries),
    )
    documents = {"train-1": ["d01", "x9"], "train-2": ["x9", "x8"]}
    refused(
        DataError,
        r"documents.trec: 2 documents are not in the collection: 'x9', 'x8'",
        made_run(tmp_path / "documents.trec", documents),
    )
    refused(UsageError, "--candidates")
    refused(ArtifactError, "no such file", tmp_path / "nothing")
    empty = tmp_path / "empty"
    Run.from_hits([], [], []).save(empty, recipe={"kind": "made"}, inputs={})
    refused(InputError, "empty: no candidates", empty)
    assert not (tmp_path / "scores").exists()


def test_unknown_key_of_a_recipe(recipe: str, collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'slat' \(did you mean 'salt'\?\)"):
        score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "s", overrides=["slat=x"])


def test_what_was_cut_is_said(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    assert "150 pairs were cut at the teacher's length, 450 tokens lost" in caplog.text


@pytest.mark.parametrize("trouble", ["raises", "nan"])
def test_a_poison_document_is_left_out_and_named(
    trouble: str,
    recipe: str,
    collection: Collection,
    candidates: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Document d07 is a candidate of train-2 to train-7; every other pair has the score it always has."""
    whole = by_query(score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "whole"))
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        scores = score(
            recipe, collection=collection, candidates=[candidates], out=tmp_path / "s", overrides=[f"{trouble}=w7"]
        )
    for query_id, of_query in whole.items():
        of_query.pop("d07", None)
        assert by_query(scores)[query_id] == of_query
    assert failed(scores) == [(f"train-{i}", "d07") for i in range(2, 8)]
    assert (scores.manifest.counts["pairs"], scores.manifest.counts["failed_pairs"]) == (174, 6)
    assert scores.manifest.counts["seen"] == 174
    assert "'d07'" in caplog.text and "6 pairs could not be scored and were left out" in caplog.text
    assert check(scores.path) == []


def test_a_poison_document_of_a_listwise_teacher(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """Which score is NaN says nothing about which document is to blame: it is looked for."""
    scores = score(
        recipe,
        collection=collection,
        candidates=[candidates],
        out=tmp_path / "s",
        overrides=["nan=w7", "listwise=true"],
    )
    assert failed(scores) == [(f"train-{i}", "d07") for i in range(2, 8)]
    assert scores.manifest.details["independent"] is False


def test_no_failed_document_may_be_allowed(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """train-2 in the first shard is the first to have d07: nothing is written. All that is done before it is kept."""
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates], "out": tmp_path / "scores"}
    with pytest.raises(
        RetrievalKDError, match=r"1 documents or queries could not be scored \(document 'd07': the score is NaN"
    ):
        score(recipe, **arguments, overrides=["nan=w7"], max_failed=0)
    assert not (tmp_path / "scores").exists() and shard_bytes(tmp_path / "scores.partial") == {}
    with pytest.raises(RetrievalKDError, match="document 'd23': the score is NaN"):
        score(recipe, **arguments, overrides=["nan=w23"], max_failed=0, force=True)
    assert len(shard_bytes(tmp_path / "scores.partial")) == 6
    scores = score(recipe, **arguments, overrides=["nan=w23"], max_failed=1)
    assert len(failed(scores)) == 6


def test_a_shard_too_large_for_the_teacher_is_scored_in_parts(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    whole = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "whole")
    parts = score(
        recipe, collection=collection, candidates=[candidates], out=tmp_path / "parts", overrides=["most_pairs=7"]
    )
    assert by_query(parts) == by_query(whole) and parts.manifest.counts["failed_pairs"] == 0


def test_an_interrupted_run_goes_on(
    recipe: str,
    collection: Collection,
    candidates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One of the finished shards is damaged in between: it is found, said and scored again. Failures are remembered."""
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates], "overrides": ["nan=w7"]}
    undisturbed = score(recipe, **arguments, out=tmp_path / "undisturbed")
    log = tmp_path / "log"
    arguments["overrides"] = ["nan=w7", f"log={log}"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stops_after(patch, 4)
        score(recipe, **arguments, out=tmp_path / "scores")
    log.unlink()
    partial = tmp_path / "scores.partial"
    broken = partial / "shard-00001-of-00010.parquet"
    broken.write_bytes(broken.read_bytes()[:-30])
    with caplog.at_level(logging.INFO, "retrieval_kd"):
        resumed = score(recipe, **arguments, out=tmp_path / "scores")
    assert f"{broken.name}: damaged score shard" in caplog.text and "scoring it again" in caplog.text
    assert "going on after 3 of 10 shards" in caplog.text
    assert shard_bytes(resumed.path) == shard_bytes(undisturbed.path)
    assert resumed.manifest.counts == undisturbed.manifest.counts
    assert resumed.fingerprint == undisturbed.fingerprint
    assert {line.split()[1] for line in log.read_text().splitlines()} == {
        "train-3",
        *(f"train-{i}" for i in range(12, 30, 3)),
    }


def test_the_same_shard_is_the_same_bytes(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """Alone, in a slice, or in the whole run."""
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates]}
    whole = shard_bytes(score(recipe, **arguments, out=tmp_path / "whole").path)
    found: dict[str, bytes] = {}
    for i in (1, 2, 3):
        part = score(recipe, **arguments, out=tmp_path / f"part-{i}", shard=f"{i}/3")
        assert part.manifest.recipe["slice"] == f"{i}/3" and check(part.path) == []
        assert not found.keys() & shard_bytes(part.path).keys()
        found |= shard_bytes(part.path)
    assert found == whole


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_slice_that_is_none(text: str, recipe: str, collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--shard {text}: write it as i/n"):
        score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "s", shard=text)


def test_more_slices_than_shards(recipe: str, collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there are only 1 shards; lower pairs_per_shard"):
        score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "s", shard="1/2")


def test_reuse_scores_only_what_is_new(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    """Of 12 candidates a query has now, 6 were scored before."""
    wide = tiny.make_candidates(tmp_path, collection, depth=12)
    first = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "first")
    log = tmp_path / "log"
    arguments: dict[str, Any] = {"collection": collection, "candidates": [wide]}
    reused = score(
        recipe, **arguments, out=tmp_path / "reused", reuse=[first.path], overrides=[f"log={log}", "pairs_per_shard=50"]
    )
    assert sum(int(line.split()[2]) for line in log.read_text().splitlines()) == 180
    assert (reused.manifest.counts["reused_pairs"], reused.manifest.counts["seen"]) == (180, 180)
    anew = score(recipe, **arguments, out=tmp_path / "anew")
    assert by_query(reused) == by_query(anew)
    assert reused.manifest.inputs["reuse"]["fingerprint"] == first.fingerprint


def test_reuse_of_a_listwise_teacher_takes_whole_lists(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    listwise = {"overrides": ["listwise=true"], "collection": collection}
    first = score(recipe, **listwise, candidates=[candidates], out=tmp_path / "first")  # type: ignore[arg-type]
    more = made_run(tmp_path / "more.trec", {"train-5": ["d30"]})
    again = score(  # type: ignore[misc]
        recipe, **listwise, candidates=[candidates, more], out=tmp_path / "again", reuse=[first.path]
    )
    assert (again.manifest.counts["reused_pairs"], again.manifest.counts["seen"]) == (29 * 6, 7)


def test_reuse_of_another_teacher_is_refused(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"candidates": [candidates], "out": tmp_path / "s"}
    first = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "first")
    for overrides, message in ((["salt=x"], "of another model"), (["nan=w1"], "recipe differs in nan")):
        with pytest.raises(ArtifactError, match=message):
            score(recipe, **arguments, collection=collection, overrides=overrides, reuse=[first.path])
    other = tiny.make_tiny_collection(tmp_path, "other")
    documents = resolve(other.path) / "documents.arrow"
    assert documents.is_file()
    changed = Collection(other.path, other.manifest)
    object.__setattr__(changed.manifest, "fingerprint", "0" * 64)
    with pytest.raises(ArtifactError, match="of another collection"):
        score(recipe, **arguments, collection=changed, reuse=[first.path])


def test_reuse_of_scores_in_another_precision_is_refused(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "first")
    monkeypatch.setattr(trivial.TrivialTeacher, "details", lambda _: {"dtype": "bfloat16"})
    with pytest.raises(ArtifactError, match="scored in None, this run in bfloat16"):
        score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "s", reuse=[first.path])


def test_identity_leaves_out_what_is_scored_and_how_it_is_divided() -> None:
    recipe = {"kind": "x", "model": "m", "depth": 3, "pairs_per_shard": 5, "slice": "1/2", "candidates": []}
    assert teacher_identity(recipe) == {"kind": "x", "model": "m"}


def test_statistics_travel_in_the_shard(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    scores = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "s", overrides=["raises=w7"])
    assert shard_statistics(read_shard(scores.shards[0])) == {
        "queries": 3,
        "pairs": 17,
        "truncated_pairs": 14,
        "tokens_lost": 40,
        "failed_pairs": 1,
        "failed": [["train-2", "d07", "ValueError: cannot read w7"]],
        "blamed": {"document 'd07'": "ValueError: cannot read w7"},
        "seen": 17,
    }


def test_an_ensemble_is_no_teacher(collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scores ensemble"):
        score("teachers/ensemble-t2", collection=collection, candidates=["qrels:dev"], out=tmp_path / "s")


def test_estimate(recipe: str, collection: Collection, candidates: Path) -> None:
    """180 pairs of 4 + 2 words, 1.3 tokens each."""
    assert estimate_score(recipe, collection=collection, candidates=[candidates]) == {
        "queries": 30,
        "pairs": 180,
        "distinct_documents": 35,
        "shards": 10,
        "approximate_tokens": 1404,
    }


def test_a_run_without_any_score_is_an_error(recipe: str, collection: Collection, tmp_path: Path) -> None:
    only = made_run(tmp_path / "only.trec", {"train-1": ["d07"]})
    with pytest.raises(RetrievalKDError, match="none of the 1 pairs could be scored: ValueError: cannot read w7"):
        score(recipe, collection=collection, candidates=[only], out=tmp_path / "s", overrides=["raises=w7"])


def test_wrong_numbers_are_refused(recipe: str, collection: Collection, tmp_path: Path) -> None:
    for how in ({"workers": 0}, {"max_failed": -1}):
        with pytest.raises(UsageError, match="workers is at least 1 and max_failed at least 0"):
            score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "s", **how)


def test_too_many_slices_leave_nothing_behind(recipe: str, collection: Collection, tmp_path: Path) -> None:
    """What the error advises works at the same place."""
    arguments: dict[str, Any] = {"collection": collection, "candidates": ["qrels:dev"], "out": tmp_path / "s"}
    with pytest.raises(RecipeError):
        score(recipe, **arguments, shard="1/2")
    assert score(recipe, **arguments, shard="1/2", overrides=["pairs_per_shard=2"]).manifest.counts["shards"] == 1


def test_a_candidates_file_that_was_cut_off_is_gathered_again(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates], "out": tmp_path / "s"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stops_after(patch, 2)
        score(recipe, **arguments)
    (tmp_path / "s.partial" / "work" / "candidates.arrow").write_bytes(b"")
    assert score(recipe, **arguments).manifest.counts["pairs"] == 180


def test_a_bad_query_is_blamed_itself(
    recipe: str, collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both documents of train-7 fail (for the teacher reads documents only): it counts as one failure, not as two."""
    run = made_run(tmp_path / "run.trec", {"train-7": ["d07", "d17"], "train-1": ["d01", "d11"]})
    arguments: dict[str, Any] = {"collection": collection, "candidates": [run], "overrides": ["raises=w47"]}
    scores = score(recipe, **arguments, out=tmp_path / "s", max_failed=1)
    assert failed(scores) == [("train-7", "d07"), ("train-7", "d17")]
    assert "query 'train-7' cannot be scored: ValueError: cannot read w47; left out" in caplog.text


def test_an_error_before_the_first_shard_leaves_nothing_in_the_way(
    recipe: str, collection: Collection, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe is mended as the message says, and the same place is free for it."""

    def prepare(self: trivial.TrivialTeacher, _: Any) -> None:
        if self.recipe.salt == "":
            raise InputError("set salt=pepper")

    monkeypatch.setattr(trivial.TrivialTeacher, "prepare", prepare)
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates], "out": tmp_path / "s"}
    with pytest.raises(InputError, match="set salt=pepper"):
        score(recipe, **arguments)
    assert score(recipe, **arguments, overrides=["salt=pepper"]).manifest.counts["pairs"] == 180


def test_queries_without_candidates_are_said(recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A split may judge a query's documents as not relevant, all of them."""
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text('{"_id": "a", "text": "w1"}\n{"_id": "b", "text": "w2"}\n')
    (beir / "queries.jsonl").write_text('{"_id": "q1", "text": "w1"}\n{"_id": "q2", "text": "w2"}\n')
    (beir / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\nq2\tb\t0\n")
    scores = score(recipe, collection=str(beir), candidates=["qrels:train"], out=tmp_path / "s")
    assert list(by_query(scores)) == ["q1"]
    assert "qrels:train: 1 queries have no candidates: 'q2'" in caplog.text


def test_estimate_of_what_costs_money(collection: Collection, candidates: Path, tmp_path: Path) -> None:
    """1,404 tokens at 1,000 a million are 1.4."""
    recipe = tiny.write_recipe(
        tmp_path / "api.yaml",
        {
            "kind": "api",
            "base_url": "http://localhost:1/v1",
            "model": "m",
            "prompt": "graded",
            "price_per_million": {"input": 1000, "output": 0},
        },
    )
    found = estimate_score(recipe, collection=collection, candidates=[candidates])
    assert found["approximate_input_cost"] == 1.4
