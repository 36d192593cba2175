"""The API teacher in several processes: one budget for all, and an end in order for whoever is told to end."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import faulty_server
import pytest
import tiny
from faulty_server import FaultyServer
from tiny_api import KEY, assert_scores, document, made, prepared, query

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.models.api.usage import Budget, BudgetError, Ledger, Tokens
from retrieval_kd.teachers.score import score

WORST = Tokens(60, 0)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TINY_KEY", KEY)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process, alive until the test is over."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


# ---- the record of what was used


def ledger(tmp_path: Path, pid: int, patience_s: float) -> Ledger:
    """Of 100 tokens, process ``pid`` has reserved 60."""
    made = Ledger(tmp_path / "usage.sqlite", Budget(tokens=100), patience_s)
    made._connection.execute("INSERT INTO reserved VALUES (?, 60, 0)", (pid,))
    return made


def free(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "usage.sqlite") as connection:
        connection.execute("UPDATE reserved SET prompt = 0")
    connection.close()


def test_reservations_of_another_process_are_waited_for(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    waiting = ledger(tmp_path, other.pid, 30)
    timer = threading.Timer(0.3, free, (tmp_path,))
    timer.start()
    begin = time.monotonic()
    waiting.reserve(WORST, retried=False)
    assert 0.2 < time.monotonic() - begin < 3
    timer.join()
    assert waiting.usage()["unsettled_tokens"] == 60


def test_nobody_waits_for_ever(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    begin = time.monotonic()
    with pytest.raises(BudgetError, match="60 tokens of it held by requests of other processes"):
        ledger(tmp_path, other.pid, 0.3).reserve(WORST, retried=False)
    assert 0.2 < time.monotonic() - begin < 3


def test_nobody_waits_for_the_dead(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    other.kill()
    other.wait()
    begin = time.monotonic()
    with pytest.raises(BudgetError, match="60 tokens of it held"):
        ledger(tmp_path, other.pid, 60).reserve(WORST, retried=False)
    assert time.monotonic() - begin < 3


def test_who_waits_gives_up_with_the_run(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    stopping = threading.Event()
    timer = threading.Timer(0.2, stopping.set)
    timer.start()
    with pytest.raises(CancelledError):
        ledger(tmp_path, other.pid, 60).reserve(WORST, retried=False, stopping=stopping)
    timer.join()


def test_a_process_number_that_comes_again(tmp_path: Path) -> None:
    """What an earlier process of this number has reserved still counts, and settling changes nothing of it."""
    ledger(tmp_path, os.getpid(), 0)
    mine = Ledger(tmp_path / "usage.sqlite", Budget(tokens=100), 60)
    with pytest.raises(BudgetError):
        mine.reserve(WORST, retried=False)
    mine.reserve(Tokens(40, 0), retried=False)
    mine.settle(Tokens(40, 0), Tokens(10, 0), estimated=False)
    usage = mine.usage()
    assert (usage["unsettled_tokens"], usage["prompt_tokens"]) == (60, 10)


# ---- an end in order


@pytest.mark.parametrize("answer", ["2", "no grade"])
@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interruption_keeps_what_is_in_flight(
    server: FaultyServer, collection: Collection, tmp_path: Path, answer: str, sent: int, raised: type[BaseException]
) -> None:
    """Three of ten are in flight when the process is told to end: no other request is sent, no reminder either."""

    def slow(handler: faulty_server.Handler) -> None:
        if document(handler.body) == "w2":
            while len(server.requests) < 3:
                time.sleep(0.005)
            os.kill(os.getpid(), sent)
        time.sleep(0.3)
        faulty_server.good(handler)

    server.behaviours = [slow] * 10
    server.content = lambda body: answer
    teacher = prepared(made(server, concurrency=3), collection, tmp_path / "work")
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    former_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    try:
        with pytest.raises(raised):
            teacher.score(*query(10))
    finally:
        signal.signal(signal.SIGTERM, former)
        signal.signal(signal.SIGINT, former_interrupt)
    assert len(server.requests) == 3
    usage = teacher.details()["usage"]
    assert (usage["requests"], usage["prompt_tokens"], usage["unsettled_tokens"]) == (3, 30, 0)
    server.behaviours = []
    server.content = lambda body: "2"
    assert_scores(prepared(made(server), collection, tmp_path / "work").score(*query(10)), [[2] * 10])
    assert len(server.requests) == 10 + (3 if answer == "no grade" else 0)


# ---- the driver with two workers


@pytest.fixture
def scored(
    server: FaultyServer, collection: Collection, candidates: Path, tmp_path: Path
) -> Callable[..., dict[str, bytes]]:
    """Scores 30 queries of 2 documents, 3 requests at once in each process, and gives the bytes of the shards."""
    server.content = lambda body: str(len(document(body)) % 4)
    server.delay = 0.03
    values = {"kind": "api", "base_url": server.base_url, "model": "tiny", "prompt": "graded", "key_env": "TINY_KEY"}
    recipe = tiny.write_recipe(tmp_path / "api.yaml", values | {"pairs_per_shard": 8, "depth": 2, "concurrency": 3})

    def run(name: str, *overrides: str, **arguments: Any) -> dict[str, bytes]:
        out = tmp_path / name
        score(recipe, collection=collection, candidates=[candidates], out=out, overrides=list(overrides), **arguments)
        return {path.name: path.read_bytes() for path in out.glob("*.parquet")}

    return run


def test_workers_share_a_budget(
    server: FaultyServer, collection: Collection, tmp_path: Path, scored: Callable[..., dict[str, bytes]]
) -> None:
    """Each request takes 11 tokens and may take ``worst``: the budget is for 31, whoever sends them; all are kept."""
    texts = [tiny.document_text(row) for row in range(tiny.DOCUMENTS)]
    longest, text = max(collection.queries("train").values(), key=len), max(texts, key=len)
    worst = sum(
        made(server)
        .recipe.asked(made(server).prompt.pointwise(longest, text), "", answer_start="", max_tokens=16)
        .worst
    )
    with pytest.raises(RetrievalKDError, match=r"the budget is spent: 341 tokens .* used by 31 requests, and"):
        scored("scores", f"budget_tokens={30 * 11 + worst}", workers=2)
    assert len(server.requests) == 31
    resumed = scored("scores", "budget_tokens=1000000", workers=2)
    assert len(server.requests) == 60
    alone = scored("alone", f"cache={tmp_path / 'other-cache'}")
    assert len(server.requests) == 120
    assert resumed == alone and len(alone) == 8
