"""Recipes and keys of the API teacher: what is refused before any request, and that the key gets nowhere."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_server
import numpy as np
import pytest
from faulty_server import FaultyServer
from tiny_api import KEY, assert_scores, made, prepared, query

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, MissingExtraError, RecipeError
from retrieval_kd.recipe import load_recipe, validate
from retrieval_kd.teachers.api.answers import AnswerError
from retrieval_kd.teachers.api.recipe import ApiRecipe
from retrieval_kd.teachers.api.teacher import ApiTeacher
from retrieval_kd.teachers.base import Candidates


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TINY_KEY", KEY)


def test_a_missing_key_is_named_before_any_request(
    server: FaultyServer, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = made(server, key_env="NOBODY_SET_THIS")
    assert teacher.ref().name == f"tiny@{server.base_url}"
    for value in (None, " "):
        if value:
            monkeypatch.setenv("NOBODY_SET_THIS", value)
        with pytest.raises(InputError, match="the environment variable NOBODY_SET_THIS is not set"):
            prepared(teacher, collection, tmp_path / "work")
        with pytest.raises(InputError, match="NOBODY_SET_THIS"):
            teacher.score(*query(1))
    monkeypatch.setenv("NOBODY_SET_THIS", "sk-one\ntwo")
    with pytest.raises(InputError, match="characters that no key has") as raised:
        teacher.score(*query(1))
    assert "sk-one" not in str(raised.value)
    assert server.requests == []
    made(server, key_env=None).score(*query(1))
    assert "Authorization" not in server.requests[0][2]


def test_the_key_is_nowhere(
    server: FaultyServer, collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in a file, a log, a message or an answer, even when the endpoint repeats it in its own."""
    caplog.set_level(logging.DEBUG)
    server.behaviours = [faulty_server.status(500, f"bad key {KEY}"), faulty_server.echo]
    teacher = prepared(made(server), collection, tmp_path / "work")
    with pytest.raises(Exception, match=r"answered 401 .*\[key\].*check the key in TINY_KEY") as raised:
        teacher.score(*query(1))
    server.content = lambda body: f"Your key is {KEY}" if len(body["messages"]) == 1 else "2"
    assert_scores(teacher.score(*query(1)), [[2]])
    server.content = lambda body: f"{KEY} is all I know"
    with pytest.raises(AnswerError) as answer:
        teacher.score([Candidates("q2", "else", np.arange(1))], [["w7"]])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"usage.sqlite"}
    texts = [path.read_bytes().decode("latin-1") for path in written]
    said = [str(raised.value), repr(raised.value.__context__), str(answer.value), caplog.text]
    said += [json.dumps(teacher.details()), json.dumps(teacher.recipe.resolved()), repr(teacher.ref())]
    assert not [text for text in texts + said if KEY in text]
    assert "attempt 2 follows" in caplog.text


@pytest.mark.parametrize("package", ["httpx2", "tenacity"])
def test_a_missing_package_is_named(server: FaultyServer, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'; install it with: pip install 'retrieval-kd\[api\]'"):
        made(server).score(*query(1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_url": "http://me:secret@localhost/v1"}, "no user, password or query"),
        ({"base_url": "http://localhost/v1?key=1"}, "no user, password or query"),
        ({"base_url": "localhost:8000"}, "a URL such as"),
        ({"budget": 1}, "budget needs price_per_million"),
        ({"budget_tokens": 5, "request": {"max_tokens": None}}, "a budget needs a longest answer"),
        ({"request": {"model": "x"}}, "'model' has no place here"),
        ({"window": 5, "stride": 7}, "stride 7 must be smaller"),
        ({"concurency": 5}, r"unknown key 'concurency' \(did you mean 'concurrency'\?\)"),
        ({"window": 5, "stride": 2}, "window: the prompt 'graded' is pointwise"),
        ({"prompt": "first", "window": 27}, "window: 27 passages, but the prompt 'first' has 26 identifiers"),
        ({"prompt": "gradd"}, r"prompt 'gradd': no such file.*did you mean 'graded'"),
    ],
)
def test_recipes_that_cannot_be_right(values: dict[str, Any], message: str) -> None:
    recipe = {"kind": "api", "base_url": "http://localhost:1/v1", "model": "tiny", "prompt": "graded", **values}
    with pytest.raises(RecipeError, match=message):
        ApiTeacher(validate(ApiRecipe, recipe, "test"))


@pytest.mark.parametrize(
    ("name", "score_kind"), [("api-pointwise", "log_odds"), ("api-graded", "grade"), ("api-listwise", "rank")]
)
def test_the_shipped_recipes(name: str, score_kind: str) -> None:
    recipe = load_recipe(name, "teachers")
    assert isinstance(recipe, ApiRecipe)
    teacher = ApiTeacher(recipe)
    assert teacher.score_kind == score_kind
    assert set(recipe.execution) < set(ApiRecipe.model_fields)


def test_chats_cannot_begin_the_answer(tmp_path: Path) -> None:
    prompt = tmp_path / "p.yaml"
    prompt.write_text(
        "kind: pointwise\nmessages:\n- {role: user, content: '{query} {document}'}\nanswer_start: 'Relevant: '\n"
        "positive: a\nnegative: b\n"
    )
    recipe = {"kind": "api", "base_url": "http://localhost:1/v1", "model": "tiny", "prompt": str(prompt)}
    with pytest.raises(RecipeError, match="cannot be made to begin a chat answer"):
        ApiTeacher(validate(ApiRecipe, recipe, "test"))
