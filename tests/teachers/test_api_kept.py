"""What the API teacher keeps: answers that are never paid for twice, what a run has used, and its budget."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_server
import numpy as np
import pytest
import tiny
from faulty_server import FaultyServer
from tiny_api import KEY, assert_scores, document, made, prepared, query

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import ArtifactError
from retrieval_kd.models.api.cache import AnswerCache
from retrieval_kd.models.api.reply import Reply
from retrieval_kd.models.api.usage import Budget, BudgetError, Ledger, Price, Tokens
from retrieval_kd.teachers.base import Candidates
from retrieval_kd.teachers.score import score


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TINY_KEY", KEY)


def test_a_second_time_nothing_is_asked(server: FaultyServer, collection: Collection, tmp_path: Path) -> None:
    server.content = lambda body: document(body)[1:]
    first = prepared(made(server, concurrency=4), collection, tmp_path / "a").score(*query(4))
    asked = len(server.requests)
    again = prepared(made(server), collection, tmp_path / "b")
    assert [values.tobytes() for values in again.score(*query(4)).scores] == [v.tobytes() for v in first.scores]
    assert (asked, len(server.requests)) == (4, 4)
    usage = again.details()["usage"]
    assert (usage["requests"], usage["cached_answers"], usage["prompt_tokens"]) == (0, 4, 0)


def test_what_changes_an_answer_changes_its_key(server: FaultyServer) -> None:
    shard, texts = query(1)
    for changes in ({}, {"instruction": "Judge."}, {"model": "other"}, {"max_tokens": 5}, {"request": {"seed": 1}}):
        made(server, **changes).score(shard, texts)
    assert len(server.requests) == 5
    for changes in ({"timeout_s": 7}, {"concurrency": 3}, {"key_env": None}, {"budget_tokens": 10**6}):
        made(server, **changes).score(shard, texts)
        assert made(server, **changes).recipe.identity() == made(server).recipe.identity()
    assert len(server.requests) == 5


def test_a_damaged_cache_is_named(server: FaultyServer, tmp_path: Path) -> None:
    teacher = made(server, cache=str(tmp_path / "answers"))
    teacher.score(*query(1))
    (path,) = (tmp_path / "answers").glob("*.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET reply = '{'")
    connection.close()
    with pytest.raises(ArtifactError, match=r"damaged cache of answers .*; delete it"):
        made(server, cache=str(tmp_path / "answers")).score(*query(1))
    teacher.cache._connection.close()
    for part in path.parent.glob("*.sqlite*"):
        part.unlink()
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ArtifactError, match=rf"{path.name}: damaged cache of answers \(file is not a database\)"):
        made(server, cache=str(tmp_path / "answers")).score(*query(1))
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ArtifactError, match="newer than this version"):
        made(server, cache=str(tmp_path / "answers")).score(*query(1))


def _put(path: str, worker: int) -> None:
    cache = AnswerCache(Path(path))
    for i in range(50):
        cache.put(f"key-{i}", Reply(f"worker {worker}", None, (1, 1), None))


def test_processes_share_a_cache(tmp_path: Path) -> None:
    """Two processes put the same keys at the same time: all agree on the first answer."""
    path = tmp_path / "shared.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_put, args=(str(path), i)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    cache = AnswerCache(path)
    answers = [cache.get(f"key-{i}") for i in range(50)]
    assert all(answer is not None and answer.usage == (1, 1) for answer in answers)
    assert cache.put("key-0", Reply("late", None, None, None)) == answers[0]


# ---- what it costs


def test_usage_is_added_up_over_resumes(server: FaultyServer, collection: Collection, tmp_path: Path) -> None:
    """10 tokens in at 2 a million, 1 out at 10: 0.00003 a request."""
    price = {"input": 2, "output": 10}
    prepared(made(server, price_per_million=price), collection, tmp_path / "work").score(*query(2))
    teacher = prepared(made(server, price_per_million=price), collection, tmp_path / "work")
    teacher.score(*query(3))
    assert teacher.details() == {
        "model": "tiny",
        "endpoint": server.base_url,
        "served_models": ["tiny-2026"],
        "prompt": "graded",
        "prompt_sha256": teacher.prompt.sha256,
        "max_passage_words": None,
        "tokens_lost_unit": "words",
        "usage": {
            "requests": 3,
            "retried": 0,
            "cached_answers": 2,
            "estimated": 0,
            "prompt_tokens": 30,
            "completion_tokens": 3,
            "unsettled_tokens": 0,
            "cost": 0.00009,
        },
    }


def test_an_endpoint_that_counts_nothing_is_estimated_at_the_worst(server: FaultyServer, tmp_path: Path) -> None:
    """Raw text of 25 bytes: 64 + 25 + 16 tokens and the longest answer, 16."""
    (tmp_path / "p.yaml").write_text('kind: pointwise\ntext: "Grade {query} and {document}: 1-3"\ngrades: [1, 3]\n')
    server.usage = None
    teacher = made(server, prompt=str(tmp_path / "p.yaml"))
    teacher.score([Candidates("q1", "what", np.arange(1))], [["w0123"]])
    assert len(server.requests[0][1]["prompt"]) == 25
    usage = teacher.details()["usage"]
    assert (usage["estimated"], usage["prompt_tokens"], usage["completion_tokens"]) == (1, 105, 16)
    assert usage["cost"] is None


@pytest.mark.parametrize("told", [{"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": 5}, "no", None])
def test_counts_that_cannot_be_are_estimated(server: FaultyServer, told: Any) -> None:
    server.behaviours = [faulty_server.saying({"choices": [{"message": {"content": "2"}}], "usage": told})]
    teacher = made(server)
    teacher.score(*query(1))
    usage = teacher.details()["usage"]
    worst = teacher._pair(query(1)[0][0], "d", "w0").request.worst
    assert (usage["estimated"], usage["prompt_tokens"], usage["completion_tokens"]) == (1, *worst)


def test_more_than_the_worst_case_is_counted_in_full(server: FaultyServer) -> None:
    server.usage = (50_000, 9000)
    teacher = made(server, budget_tokens=10_000)
    with pytest.raises(BudgetError, match="59000 tokens of 10000 used by 1 requests"):
        teacher.score(*query(2))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_budget_is_hard(server: FaultyServer, collection: Collection, tmp_path: Path, concurrency: int) -> None:
    """Each request takes 11 tokens and may take ``worst``: after 5 x 11 the sixth no longer fits; ten in all."""
    teacher = made(server)
    (shard,), (texts,) = query(10)
    worst = sum(teacher._pair(shard, "d", "w0").request.worst)
    limit = 5 * 11 + worst - 1
    spent = prepared(made(server, budget_tokens=limit, concurrency=concurrency), collection, tmp_path / "work")
    message = (
        rf"the budget is spent: 55 tokens of {limit} used by 5 requests, and the next one may take {worst} tokens; .*"
    )
    with pytest.raises(BudgetError, match=message + "--set budget_tokens=…"):
        spent.score([shard], [texts])
    assert len(server.requests) == 5
    with pytest.raises(BudgetError):  # a resumed run has not forgotten
        prepared(made(server, budget_tokens=limit), collection, tmp_path / "work").score([shard], [texts])
    assert len(server.requests) == 5
    larger = prepared(made(server, budget_tokens=10**5), collection, tmp_path / "work")
    assert_scores(larger.score([shard], [texts]), [[2] * 10])
    assert len(server.requests) == 10
    assert len({json.dumps(body) for _, body, _ in server.requests}) == 10


def test_a_budget_in_money(server: FaultyServer, collection: Collection, tmp_path: Path) -> None:
    """An output token costs 1 and a prompt's nothing: 16 reserved for each, 1 used; 18 are enough for three."""
    values = {"price_per_million": {"input": 0, "output": 1e6}}
    teacher = prepared(made(server, budget=18, **values), collection, tmp_path / "work")
    with pytest.raises(
        BudgetError, match=r"3 of 18(\.0)? used by 3 requests, and the next one may take 16;.*--set budget="
    ):
        teacher.score(*query(5))
    assert len(server.requests) == 3


def test_processes_share_a_budget(tmp_path: Path) -> None:
    """Two ledgers of one file; what a killed process has reserved may have been charged and counts for good."""
    budget = Budget(money=1.0, price=Price(input=100, output=0))
    one, two = Ledger(tmp_path / "u.sqlite", budget), Ledger(tmp_path / "u.sqlite", budget)
    one.reserve(Tokens(6000, 1), retried=False)
    with pytest.raises(
        BudgetError, match=r"0.6 of 1.0 used by 1 requests, 6001 tokens of it held by requests of other"
    ):
        two.reserve(Tokens(5000, 1), retried=False)
    one.settle(Tokens(6000, 1), Tokens(4000, 1), estimated=False)
    two.reserve(Tokens(5000, 1), retried=False)
    assert one.usage()["unsettled_tokens"] == 5001
    assert one.usage()["cost"] == pytest.approx(0.9)
    (tmp_path / "bad.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(ArtifactError, match="damaged record of what the run has used"):
        Ledger(tmp_path / "bad.sqlite", budget)


def _score(base_url: str) -> None:
    server = FaultyServer()
    server.server_close()
    server.base_url = base_url
    made(server, concurrency=2).score(*query(40))


def test_a_killed_process_loses_only_what_was_in_flight(server: FaultyServer) -> None:
    """Forty pairs, two at a time: killed after ten or so, and only the two in flight are asked for again."""
    server.delay = 0.02
    process = multiprocessing.get_context("spawn").Process(target=_score, args=(server.base_url,))
    process.start()
    end = time.monotonic() + 60
    while len(server.requests) < 10 and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.join()
    asked = len(server.requests)
    assert 10 <= asked < 40
    server.delay = 0
    assert_scores(made(server).score(*query(40)), [[2] * 40])
    assert 40 <= len(server.requests) <= 42


def test_the_verb_goes_on_with_a_larger_budget(
    server: FaultyServer, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """30 queries of 2 documents; one pair has no grade, is asked three times and left out."""
    server.content = lambda body: "?" if "Query: w3 " in str(body) and document(body).startswith("w3 ") else "2"
    values = {"kind": "api", "base_url": server.base_url, "model": "tiny", "prompt": "graded", "key_env": "TINY_KEY"}
    recipe = tiny.write_recipe(
        tmp_path / "api.yaml", values | {"budget_tokens": 900, "pairs_per_shard": 25, "depth": 2}
    )
    with pytest.raises(BudgetError):
        score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    asked = len(server.requests)
    assert 0 < asked < 60
    overrides = ["budget_tokens=1000000", "concurrency=2"]
    scores = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores", overrides=overrides)
    assert len(server.requests) == 30 * 2 + 2
    assert (scores.manifest.counts["pairs"], scores.manifest.counts["failed_pairs"]) == (59, 1)
    usage = scores.manifest.details["usage"]
    assert (usage["requests"], usage["prompt_tokens"]) == (62, 620)
    assert scores.score_kind == "grade"
    assert KEY not in "".join(path.read_bytes().decode("latin-1") for path in scores.path.rglob("*") if path.is_file())
