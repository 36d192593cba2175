"""Recipes and keys of the API teacher: what is refused before any request, and that the key gets nowhere."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import date
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
        assert not list((tmp_path / "work").iterdir())
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
        ({"base_url": "http://localhost:notaport/v1"}, "base_url: the port is not a number from 1 to 65535"),
        ({"base_url": "http://localhost:99999/v1"}, "base_url: the port is not a number from 1 to 65535"),
        ({"base_url": "http://localhost:0/v1"}, "base_url: the port is not a number from 1 to 65535"),
        ({"base_url": "http://localhost/v1?key=1"}, "no user, password or query"),
        ({"base_url": "localhost:8000"}, "a URL such as"),
        ({"budget": 1}, "budget needs price_per_million"),
        ({"budget_tokens": 5, "request": {"max_tokens": None}}, "a budget needs a longest answer"),
        ({"request": {"model": "x"}}, "'model' has no place here"),
        ({"request": {"n": 5}}, "'n' has no place here"),
        ({"request": {"best_of": 5}}, "'best_of' has no place here"),
        ({"request": {"max_tokens": -1}}, r"max_tokens takes a whole number from 1 \(got -1\)"),
        ({"request": {"max_tokens": "10"}}, r"max_tokens takes a whole number from 1 \(got '10'\)"),
        ({"request": {"max_completion_tokens": True}}, "max_completion_tokens takes a whole number from 1"),
        ({"max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
        ({"request": {"seed": date(2026, 1, 1)}}, "a value that JSON does not have"),
        ({"instruction": "Judge.", "prompt": "rankgpt"}, r"prompt 'rankgpt' has no \{instruction\}"),
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


@pytest.mark.parametrize(
    "rest",
    [
        "kind: pointwise\nanswer_start: 'Relevant: '\npositive: a\nnegative: b",
        "kind: pointwise\nanswer_start: 'Grade: '\ngrades: [0, 3]",
        "kind: listwise\nanswer_start: '['",
    ],
    ids=["log-odds", "graded", "listwise"],
)
def test_chats_cannot_begin_the_answer(tmp_path: Path, rest: str) -> None:
    prompt = tmp_path / "p.yaml"
    shown = "{passages}" if "listwise" in rest else "{document}"
    prompt.write_text(f"messages:\n- {{role: user, content: '{{query}} {shown}'}}\n{rest}\n")
    recipe = {"kind": "api", "base_url": "http://localhost:1/v1", "model": "tiny", "prompt": str(prompt)}
    with pytest.raises(RecipeError, match="cannot be made to begin a chat answer"):
        ApiTeacher(validate(ApiRecipe, recipe, "test"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_url": "http://me:hush-hush@localhost/v1"}, "base_url: no user, password or query"),
        ({"base_url": "http://me:hush-hush/1@localhost/v1"}, "base_url: no user, password or query"),
        ({"base_url": "http://localhost:hush-hush/v1"}, "the port is not a number"),
        ({"key_env": "sk-hush-hush"}, "key_env takes the name of an environment variable"),
        ({"key_env": "hush-hush\n"}, "key_env takes the name of an environment variable"),
        ({"key_env": ""}, "key_env takes the name of an environment variable"),
    ],
)
def test_what_was_put_into_the_wrong_place_is_not_repeated(values: dict[str, Any], message: str) -> None:
    """Neither in the message nor in the traceback above it."""
    recipe = {"kind": "api", "base_url": "http://localhost:1/v1", "model": "tiny", "prompt": "graded", **values}
    with pytest.raises(RecipeError, match=message) as raised:
        validate(ApiRecipe, recipe, "test")
    assert "hush" not in "".join(traceback.format_exception(raised.value))


def test_a_name_that_may_be_a_key_is_not_repeated(server: FaultyServer) -> None:
    with pytest.raises(InputError, match="the environment variable that key_env names is not set") as raised:
        made(server, key_env="gsk_abc123").score(*query(1))
    assert "gsk_" not in str(raised.value)


@pytest.mark.parametrize(
    "written",
    [
        lambda key: json.dumps(key)[1:-1].replace("-", "\\u002d"),
        lambda key: "".join(f"\\u{ord(c):04X}" for c in key),
        lambda key: json.dumps(key.replace("-", "\\u002d"))[1:-1],
        lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    ],
    ids=["hyphens", "all", "twice", "slashes"],
)
def test_an_escaped_key_is_nowhere(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[str], str]
) -> None:
    """The endpoint repeats the key in every text of its answers, with escapes that JSON allows."""
    key = 'sk-very/"secret"\\0123'
    monkeypatch.setenv("TINY_KEY", key)
    it = written(key)
    top = f'{{"token": "{it}", "logprob": -0.1, "top_logprobs": [{{"token": "{it}", "logprob": -0.1}}]}}'
    choice = f'{{"message": {{"content": "{it}!"}}, "logprobs": {{"content": [{top}]}}}}'
    good = f'{{"model": "{it}", "choices": [{choice}], "usage": {{"prompt_tokens": 1, "completion_tokens": 1}}}}'
    server.behaviours = [faulty_server.status(200, good)]
    teacher = made(server, prompt="relevant-yes-no")
    with pytest.raises(AnswerError) as answer:
        teacher.score(*query(1))
    (path,) = (tmp_path / "cache").rglob("*.sqlite")
    with sqlite3.connect(path) as connection:
        ((kept,),) = connection.execute("SELECT reply FROM answers").fetchall()
    connection.close()
    assert json.loads(kept) == {
        "content": "[key]!",
        "first_token": [["[key]", -0.1]],
        "usage": [1, 1],
        "model": "[key]",
    }
    said = [str(answer.value), *teacher.details()["served_models"]]
    for broken in (faulty_server.status(400, good), faulty_server.status(401, good), faulty_server.status(200, it)):
        server.behaviours = [broken]
        with pytest.raises(Exception, match=r"answered|not a completion") as raised:
            made(server, prompt="relevant-yes-no", retries=0).score([Candidates("q2", "x", np.arange(1))], [["w1"]])
        said.append(str(raised.value))
        assert "[key]" in said[-1]
    assert not [text for text in said if re.search(r"secret|0123|u00|U00", text)]
