"""The API teacher against an endpoint that fails: what is tried again, how long is waited, and what ends the run."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import faulty_server
import numpy as np
import pytest
import tiny
from faulty_server import Behaviour, FaultyServer, status
from tiny_api import KEY, assert_scores, document, made, prepared, query

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.scores import Scores
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.models.api.client import EndpointError, RefusedError
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


@pytest.mark.parametrize(
    ("faults", "charged"),
    [
        ([status(429, "slow down"), status(429)], False),
        ([status(500), status(502, "<html>"), status(503), status(408)], False),
        ([status(200, "<html>not JSON")], True),
        ([status(200, '{"choices": [{"message": {"con')], True),
        ([faulty_server.saying({"error": {"message": "overloaded"}})], True),
        ([faulty_server.saying({"choices": []}), faulty_server.saying({"choices": [{"message": None}]})], True),
        ([faulty_server.saying({"error": {"message": "cut"}, "choices": [{"message": {"content": "1"}}]})], True),
        ([faulty_server.saying({"choices": [{"error": {"code": 502}, "message": {"content": "1"}}]})], True),
        ([faulty_server.saying({"choices": [{"finish_reason": "error", "message": {"content": "1"}}]})], True),
        ([faulty_server.half], True),
        ([faulty_server.hang], True),
        ([faulty_server.drip], True),
    ],
    ids=[
        "429",
        "5xx",
        "garbage",
        "half JSON",
        "error in a 200",
        "no choices",
        "error beside a choice",
        "error in a choice",
        "ends in an error",
        "half a reply",
        "hang",
        "drip",
    ],
)
def test_it_recovers(server: FaultyServer, faults: list[Behaviour], charged: bool) -> None:
    """As many requests as faults and one more. What the endpoint refused is free; what broke may have been charged."""
    server.behaviours = list(faults)
    teacher = made(server, timeout_s=0.3)
    begin = time.monotonic()
    assert_scores(teacher.score(*query(1)), [[2]])
    assert time.monotonic() - begin < 3
    assert len(server.requests) == len(faults) + 1
    usage = teacher.details()["usage"]
    assert (usage["requests"], usage["retried"]) == (len(faults) + 1, len(faults))
    assert usage["estimated"] == (len(faults) if charged else 0)
    assert (usage["completion_tokens"], usage["unsettled_tokens"]) == (1 + 16 * usage["estimated"], 0)


@pytest.mark.parametrize(
    ("header", "at_least", "at_most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("3600", 60, 60),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True), 28, 30),
        (lambda: format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True), 0, 0),
        ("soon", 1, 2),
        (None, 1, 2),
    ],
    ids=["seconds", "at once", "too long", "date", "past date", "not a time", "nothing"],
)
def test_how_long_is_waited(server: FaultyServer, header: Any, at_least: float, at_most: float) -> None:
    """What `Retry-After` says, up to ``max_wait_s``; else 1 s and up to 1 s more, doubled each time."""
    value = header() if callable(header) else header
    server.behaviours = [status(429, "", {"Retry-After": value} if value is not None else {})]
    teacher = made(server, max_wait_s=60)
    waited: list[float] = []
    teacher.client.sleep = waited.append
    teacher.score(*query(1))
    assert len(waited) == 1
    assert at_least <= waited[0] <= at_most


def test_waits_grow(server: FaultyServer) -> None:
    """1, 2, 4, 8 s and up to 1 s more, but no more than ``max_wait_s``."""
    server.behaviours = [status(500)] * 5
    teacher = made(server, max_wait_s=6)
    waited: list[float] = []
    teacher.client.sleep = waited.append
    teacher.score(*query(1))
    assert waited[:3] == pytest.approx([1.5, 2.5, 4.5], abs=0.5)
    assert waited[3:] == [6, 6]


def test_an_endpoint_that_stays_broken(server: FaultyServer) -> None:
    """The error says what, where, for which pair and how often; what was answered before is not asked again."""
    server.behaviours = [faulty_server.good] + [status(500, "no GPU   today\n" + "x" * 900)] * 3
    with pytest.raises(EndpointError) as raised:
        made(server, retries=2).score(*query(2))
    said = str(raised.value)
    assert said.startswith(f"{server.base_url}: answered 500: no GPU today xxx")
    assert "… (query 'q1', document in row 1), after 3 attempts; finished answers are kept" in said
    assert len(said) < 700
    assert len(server.requests) == 4
    assert_scores(made(server).score(*query(2)), [[2, 2]])
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (401, "check the key in TINY_KEY"),
        (403, "check the key in TINY_KEY"),
        (404, r"check base_url \(it ends in /v1"),
        (307, "check base_url"),
    ],
)
def test_a_refusal_ends_the_run(server: FaultyServer, code: int, mend: str) -> None:
    server.behaviours = [status(code, '{"error": "no such thing"}')]
    with pytest.raises(EndpointError, match=rf"answered {code} \(query 'q1', .*no such thing.*{mend}"):
        made(server).score(*query(3))
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_refusal_of_one_request_is_held_against_its_pair(
    server: FaultyServer, collection: Collection, tmp_path: Path, code: int
) -> None:
    """It is free, it is not sent again in this process, and it is no `RetrievalKDError`, which would end the run."""
    server.behaviours = [status(code, '{"error": "too   long"}')]
    teacher = prepared(made(server), collection, tmp_path / "work")
    for _ in range(2):
        with pytest.raises(RefusedError) as raised:
            teacher.score(*query(1))
        said = (
            f"query 'q1', document 'd00': {server.base_url} answered {code}: {{\"error\": \"too long\"}}; if the text"
        )
        assert str(raised.value).startswith(said)
        assert not isinstance(raised.value, RetrievalKDError)
    assert len(server.requests) == 1
    usage = teacher.details()["usage"]
    assert (usage["requests"], usage["estimated"], usage["prompt_tokens"], usage["unsettled_tokens"]) == (1, 0, 0, 0)
    assert_scores(prepared(made(server), collection, tmp_path / "work").score(*query(1)), [[2]])


def test_a_refused_window_is_held_against_its_query(server: FaultyServer) -> None:
    server.behaviours = [status(400, "no")]
    with pytest.raises(RefusedError, match=r"query 'q1', a window of 2 passages: .* answered 400: no; "):
        made(server, prompt="rankgpt").score(*query(2))


def _scored(server: FaultyServer, collection: Collection, candidates: Path, folder: Path, **arguments: Any) -> Scores:
    values = {"kind": "api", "base_url": server.base_url, "model": "tiny", "prompt": "graded", "key_env": None}
    recipe = tiny.write_recipe(folder / "api.yaml", values | {"depth": 2, "pairs_per_shard": 20})
    return score(recipe, collection=collection, candidates=[candidates], out=folder / "scores", **arguments)


def test_the_run_goes_on_without_a_refused_pair(
    server: FaultyServer, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """30 queries of 2 documents; one document is too long in both of its pairs. Every pair is asked for once."""

    def answer(handler: faulty_server.Handler) -> None:
        too_long = document(handler.body).startswith("w5 ")
        (status(400, "context length exceeded") if too_long else faulty_server.good)(handler)

    server.behaviours = [answer] * 200
    scores = _scored(server, collection, candidates, tmp_path)
    assert (scores.manifest.counts["pairs"], scores.manifest.counts["failed_pairs"]) == (58, 2)
    failed = (scores.path / "failed.jsonl").read_text()
    assert failed.count('"doc_id": "d05"') == 2
    assert failed.count("context length exceeded") == 2
    assert len(server.requests) == 60


def test_refusals_of_everything_stop_the_run(
    server: FaultyServer, collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    server.behaviours = [status(400, "no such field: temperature")] * 200
    with pytest.raises(RetrievalKDError, match=r"no such field: temperature.*--max-failed allows 3"):
        _scored(server, collection, candidates, tmp_path, max_failed=3)
    assert len(server.requests) < 60


def test_no_key_was_given(server: FaultyServer) -> None:
    server.behaviours = [status(401)]
    with pytest.raises(EndpointError, match=r"answered 401 .*\(an empty body\); no key was sent, set key_env"):
        made(server, key_env=None).score(*query(1))


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = FaultyServer()
        server.server_close()
        server.base_url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"cannot be reached .*, after 2 attempts"):
            made(server, retries=1).score(*query(1))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_requests_in_flight_are_limited(server: FaultyServer, concurrency: int) -> None:
    server.delay = 0.03
    made(server, concurrency=concurrency).score(*query(12))
    assert server.most_in_flight == concurrency
    assert len(server.requests) == 12


def test_those_who_wait_give_up_with_the_run(server: FaultyServer) -> None:
    """One waits a minute for a busy endpoint when another is refused for good: the run ends at once."""

    def answer(handler: faulty_server.Handler) -> None:
        while len(server.requests) < 2:
            time.sleep(0.005)
        if document(handler.body) == "w0":
            status(429, "busy", {"Retry-After": "60"})(handler)
        else:
            time.sleep(0.2)
            status(401)(handler)

    server.behaviours = [answer] * 4
    begin = time.monotonic()
    with pytest.raises(EndpointError, match="answered 401"):
        made(server, concurrency=2, max_wait_s=60).score(*query(2))
    assert time.monotonic() - begin < 5


def test_what_was_in_flight_is_kept(server: FaultyServer, collection: Collection, tmp_path: Path) -> None:
    """Of four at once, one is refused while three wait for their answers: these are not asked for again."""

    def answer(handler: faulty_server.Handler) -> None:
        while len(server.requests) < 4:
            time.sleep(0.005)
        if document(handler.body) == "w0":
            status(401)(handler)
        else:
            time.sleep(0.2)
            faulty_server.good(handler)

    server.behaviours = [answer] * 4
    teacher = prepared(made(server, concurrency=4), collection, tmp_path / "work")
    with pytest.raises(EndpointError):
        teacher.score(*query(4))
    assert len(server.requests) == 4
    assert_scores(teacher.score([Candidates("q1", "what", np.arange(1, 4))], [["w1", "w2", "w3"]]), [[2, 2, 2]])
    assert len(server.requests) == 4
