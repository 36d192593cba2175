"""Queries by a local endpoint: what is asked, kept, counted, refused and paid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_server
import pytest
import tiny_queries
from faulty_server import FaultyServer
from tiny_queries import made_from, noted

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.models.api.client import EndpointError
from retrieval_kd.models.api.usage import BudgetError
from retrieval_kd.queries.api import ApiQueries
from retrieval_kd.verify import check

ROWS = {"d1": ("w1", "w2 w3"), "d2": ("", "w5 w6"), "d3": ("", ""), "d4": ("w9", "")}
KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return tiny_queries.make_documents(tmp_path_factory.mktemp("documents"), ROWS)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server.running() as running:
        running.content = lambda body: "1. what is {0}\n2. why {0}\n3. more".format(document(body).split()[0])
        yield running


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TINY_KEY", KEY)


def document(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"]).removeprefix("2 queries: ")


def make(source: Collection, out: Path, server: FaultyServer, **keys: Any) -> Collection:
    values = {"prompt": "{number} queries: {document}", "per_document": 2, "key_env": "TINY_KEY", "max_wait_s": 0.01}
    endpoint = {"base_url": server.base_url, "model": "tiny", "concurrency": 1}
    return tiny_queries.make(source, out, "api", **{**values, **endpoint, **keys})


def test_each_document_is_asked_about_once(source: Collection, server: FaultyServer, tmp_path: Path) -> None:
    made = make(source, tmp_path / "made", server, max_passage_words=2)
    assert made_from(made) == {
        "what is w1": ["d1"],
        "why w1": ["d1"],
        "what is w5": ["d2"],
        "why w5": ["d2"],
        "what is w9": ["d4"],
        "why w9": ["d4"],
    }
    assert [document(body) for _, body, _ in server.requests] == ["w1 w2", "w5 w6", "w9"]
    path, body, headers = server.requests[0]
    assert (path, body["temperature"], body["max_tokens"]) == ("/v1/chat/completions", 0, 96)
    assert headers["Authorization"] == f"Bearer {KEY}"
    names = ("documents_without_query", "truncated_documents", "words_lost", "malformed_answers", "refused_documents")
    assert noted(made, *names) == (1, 1, 1, 0, 0)
    details = made.manifest.details["synthetic"]["made"]
    assert details["usage"] | {"requests": 3, "prompt_tokens": 30, "completion_tokens": 3} == details["usage"]
    assert details["served_models"] == ["tiny-2026"]
    assert {origin.model for origin in made.origins} == {f"tiny@{server.base_url}"}
    assert check(made.path) == []
    assert not any(KEY.encode() in path.read_bytes() for path in made.path.rglob("*") if path.is_file())


def test_a_second_time_nothing_is_asked(source: Collection, server: FaultyServer, tmp_path: Path) -> None:
    first = make(source, tmp_path / "first", server)
    again = make(source, tmp_path / "again", server, timeout_s=7, concurrency=3)
    assert len(server.requests) == 3
    assert again.fingerprint == first.fingerprint
    assert again.manifest.details["synthetic"]["made"]["usage"]["cached_answers"] == 3


def test_answers_without_a_query_are_asked_again(source: Collection, server: FaultyServer, tmp_path: Path) -> None:
    """d2 never has one: asked three times in all. d4 has one the second time."""
    said = {"w1": ["one"], "w5": ["", "Sure:", "\n"], "w9": ["", "two"]}
    server.content = lambda body: said[document(body).split()[0]].pop(0)
    made = make(source, tmp_path / "made", server)
    assert made_from(made) == {"one": ["d1"], "two": ["d4"]}
    assert noted(made, "malformed_answers", "documents_without_query") == (4, 2)
    assert server.requests[2][1]["messages"][1:] == [
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Answer with 2 search queries, one a line, and nothing else."},
    ]


def test_a_refused_document_is_left_out(source: Collection, server: FaultyServer, tmp_path: Path) -> None:
    """Other documents of its chunk have their queries; nothing is asked twice."""
    server.behaviours = [faulty_server.good, faulty_server.status(400, "too long")]
    made = make(source, tmp_path / "made", server, per_document=2)
    assert set(made_from(made)) == {"what is w1", "why w1", "what is w9", "why w9"}
    assert noted(made, "refused_documents", "documents_without_query") == (1, 2)
    assert [document(body) for _, body, _ in server.requests] == ["w1 w2 w3", "w5 w6", "w9"]


def test_an_endpoint_that_refuses_all(server: FaultyServer, tmp_path: Path) -> None:
    many = tiny_queries.make_documents(
        tmp_path, {"d1": ("", "w1"), "d4": ("", "w4")} | {f"e{i}": ("", f"w{i + 5}") for i in range(8)}
    )
    server.behaviours = [faulty_server.status(422, "no")] * 10
    with pytest.raises(EndpointError, match=r"none of 10 requests was taken; the last: document 'e7': .* 422: no"):
        make(many, tmp_path / "made", server)


def test_an_interrupted_run_goes_on(
    source: Collection, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk's file is read, not made again; what was used before the error still counts."""
    monkeypatch.setattr(ApiQueries, "chunk", 1)
    server.behaviours = [faulty_server.good, faulty_server.status(401, "no")]
    with pytest.raises(EndpointError, match=r"answered 401 \(document 'd2'\).*check the key in TINY_KEY"):
        make(source, tmp_path / "made", server)
    made = make(source, tmp_path / "made", server)
    assert [document(body) for _, body, _ in server.requests] == ["w1 w2 w3", "w5 w6", "w5 w6", "w9"]
    usage = made.manifest.details["synthetic"]["made"]["usage"]
    assert (usage["requests"], usage["prompt_tokens"], usage["cached_answers"]) == (4, 30, 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert make(source, tmp_path / "whole", server).manifest.files == made.manifest.files


def test_a_budget_ends_the_run_and_a_larger_one_goes_on(
    source: Collection, server: FaultyServer, tmp_path: Path
) -> None:
    """195 tokens at worst fit, the 11 that were used and 192 for the next do not."""
    with pytest.raises(BudgetError, match="the budget is spent"):
        make(source, tmp_path / "made", server, budget_tokens=200)
    asked = len(server.requests)
    assert asked == 1
    made = make(source, tmp_path / "made", server, budget_tokens=2000)
    assert len(server.requests) == 3
    assert noted(made, "synthetic_queries") == (6,)


def test_a_missing_key(
    source: Collection, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left behind: another recipe may take the place."""
    monkeypatch.delenv("TINY_KEY")
    with pytest.raises(InputError, match="environment variable TINY_KEY is not set"):
        make(source, tmp_path / "made", server)
    assert make(source, tmp_path / "made", server, key_env=None, per_document=1).splits == ["test", "train", "made"]


def test_a_key_in_the_recipe_is_refused_and_not_repeated(
    source: Collection, server: FaultyServer, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="key_env takes the name of an environment variable") as caught:
        make(source, tmp_path / "made", server, key_env=KEY)
    assert KEY not in str(caught.value)
