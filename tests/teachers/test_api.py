"""The API teacher against a local endpoint: what answers mean, what is asked, kept, counted and paid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_server
import numpy as np
import pytest
from faulty_server import FaultyServer
from tiny_api import KEY, assert_scores, document, made, prepared, query, reply

from retrieval_kd.data.collection import Collection
from retrieval_kd.models.api.client import EndpointError
from retrieval_kd.models.api.reply import read_reply
from retrieval_kd.teachers.api.answers import AnswerError, grade, log_odds, order
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


# ---- what an answer says


def test_log_odds_by_hand() -> None:
    """log(0.4 + 0.1) - log(0.2): case, spaces and a vocabulary's space marks do not matter, other words do."""
    tokens = [("yes", 0.4), (" Yes", 0.1), ("▁no", 0.2), ("yesterday", 0.25)]
    first = [(token, math.log(p)) for token, p in tokens]
    found = log_odds(reply("", *first), "Yes", "no")
    assert found is not None
    assert found.value == pytest.approx(math.log(0.5) - math.log(0.2), abs=1e-9)
    assert not found.bounded


def test_log_odds_when_one_side_is_missing() -> None:
    """The lowest returned log-probability, -4, stands for what is missing; OpenAI's -9999 is not a value."""
    first = [("yes", -0.1), ("maybe", -4.0), ("no", -9999.0)]
    assert log_odds(reply("", *first), "yes", "no") == (pytest.approx(3.9), True)
    assert log_odds(reply("", *first), "no", "yes") == (pytest.approx(-3.9), True)
    assert log_odds(reply("", ("maybe", -0.1)), "yes", "no") is None
    assert log_odds(reply("", ("no", -math.inf)), "yes", "no") is None


@pytest.mark.parametrize("missing", [(), (("No", -9999.0),), (("No", -math.inf),)], ids=["nothing", "-9999", "-inf"])
def test_log_odds_when_the_returned_leave_little(missing: tuple[tuple[str, float], ...]) -> None:
    """No token can have more than what the returned ones leave: 1 - exp(-0.0001) = 0.0001, a log of -9.2104.

    A probability of 1, which a rounded log-probability of 0 means, leaves 2^-24: -16.6355.
    """
    assert log_odds(reply("", ("Yes", -0.0001), *missing), "Yes", "No") == (pytest.approx(9.2102, abs=1e-4), True)
    assert log_odds(reply("", ("Yes", -0.0001), *missing), "No", "Yes") == (pytest.approx(-9.2102, abs=1e-4), True)
    assert log_odds(reply("", ("Yes", 0.0), *missing), "Yes", "No") == (pytest.approx(16.6355, abs=1e-4), True)
    assert log_odds(reply("", ("Yes", 0.0), ("Oh", -20.0), *missing), "Yes", "No") == (pytest.approx(20.0), True)


def test_what_was_written_is_no_bound() -> None:
    """``Yes`` has 0.5, ``Well`` 0.3; a word of 0.00005 was written all the same. ``No`` may have 0.2."""
    top = [{"token": "Yes", "logprob": math.log(0.5)}, {"token": "Well", "logprob": math.log(0.3)}]
    first = {"token": "Rare", "logprob": -10.0, "top_logprobs": top}
    read = read_reply({"choices": [{"message": {"content": "Rare"}, "logprobs": {"content": [first]}}]})
    assert log_odds(read, "Yes", "No") == (pytest.approx(math.log(0.5 / 0.2)), True)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("2", 2),
        ("Grade: 3.", 3),
        ("**1**", 1),
        ("__0__", 0),
        ("2/3", 2),
        ("3 / 3", 3),
        ("Grade: 2 out of 3", 2),
        ("2. Yes, a 2", 2),
        ("<think>It might be a 1</think> 3", 3),
        ("It might be a 1, or 2.</think>3", 3),
        ("<think>1</think> <think>2</think> 3", 3),
        ("<think>It might be a 1", None),
        ("3 <think>or 1", 3),
        ("On a scale from 0 to 3, I would give it a 2", None),
        ("Grade (0-3): 2", None),
        ("Between 2 and 3", None),
        ("10, no: 2", None),
        ("2/10", None),
        ("2/3.5", None),
        ("2.5", None),
        ("2,5", None),
        (".5", None),
        ("-1", None),
        ("4", None),
        ("p2p", None),
        ("2nd", None),
        ("none", None),
        ("", None),
    ],
)
def test_grades(answer: str, value: int | None) -> None:
    found = grade(reply(answer), 0, 3)
    assert (found and found.value) == value


def test_orders() -> None:
    names = ["1", "2", "3"]
    assert order(reply("[2] > [3] > [1]"), names) == ([1, 2, 0], False)
    assert order(reply("[3] > [3] > [9]"), names) == ([2, 0, 1], True)
    assert order(reply("2] > [3] > [1]"), names, "[") == ([1, 2, 0], False)
    assert order(reply("Is it [1] > [2] > [3]?</think>[2] > [3] > [1]"), names) == ([1, 2, 0], False)
    assert order(reply("I cannot say. [9]"), names) is None


# ---- what is asked


def test_a_chat_is_asked_for_grades(server: FaultyServer, collection: Collection, tmp_path: Path) -> None:
    server.content = lambda body: {"w0": "0", "w1": "3"}[document(body)]
    teacher = prepared(made(server), collection, tmp_path / "work")
    scored = teacher.score(*query())
    assert_scores(scored, [[0, 3]])
    assert [lost.tolist() for lost in scored.tokens_lost] == [[0, 0]]
    assert scored.tokens_lost[0].dtype == np.int32
    assert (teacher.score_kind, teacher.independent) == ("grade", True)
    path, body, headers = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert {key: body[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 16,
    }
    assert sorted(body) == ["max_tokens", "messages", "model", "temperature"]


def test_a_raw_text_is_completed(server: FaultyServer, tmp_path: Path) -> None:
    """Raw text goes to /completions, with the start of the answer; the older form of log-probabilities is read."""
    first = {"tokens": [" true"], "token_logprobs": [-0.5], "top_logprobs": [{" true": -0.5, " false": -1.5}]}
    answer = {"choices": [{"text": " true", "logprobs": first}]}
    server.behaviours = [faulty_server.saying(answer)] * 2
    teacher = made(server, prompt="monot5", top_logprobs=5)
    assert_scores(teacher.score(*query()), [[1.0, 1.0]])
    assert teacher.score_kind == "log_odds"
    path, body, _ = server.requests[0]
    assert path == "/v1/completions"
    assert body["prompt"] == "Query: what Document: w0 Relevant:"
    assert (body["logprobs"], body["max_tokens"]) == (5, 1)
    (tmp_path / "begun.yaml").write_text(
        'kind: listwise\ntext: "{passages} {query}:"\nanswer_start: " ["\npassage: "[{identifier}] {document}"\n'
    )
    server.content = lambda body: "2] > [1]"
    assert_scores(made(server, prompt=str(tmp_path / "begun.yaml")).score(*query()), [[-2, -1]])
    assert server.requests[-1][1]["prompt"] == "[1] w0\n[2] w1 what: ["


def test_fields_of_the_request(server: FaultyServer) -> None:
    """A model that wants another name for the longest answer, and no temperature."""
    fields = {"temperature": None, "max_tokens": None, "max_completion_tokens": 500, "reasoning_effort": "low"}
    made(server, request=fields).score(*query(1))
    body = server.requests[0][1]
    assert sorted(body) == ["max_completion_tokens", "messages", "model", "reasoning_effort"]


def test_long_documents_are_cut_and_counted(server: FaultyServer) -> None:
    shard = [Candidates("q1", "what", np.arange(2))]
    scored = made(server, max_passage_words=3).score(shard, [["a b c d e", "a  b c"]])
    assert scored.tokens_lost[0].tolist() == [2, 0]
    assert [document(body) for _, body, _ in server.requests] == ["a b c", "a  b c"]


def test_equal_texts_are_asked_once(server: FaultyServer) -> None:
    shard = [Candidates("q1", "what", np.arange(3))]
    assert_scores(made(server, concurrency=3).score(shard, [["same", "other", "same"]]), [[2, 2, 2]])
    assert len(server.requests) == 2


def test_log_odds_that_are_bounds_are_counted(server: FaultyServer) -> None:
    def tokens(*first: tuple[str, float]) -> faulty_server.Behaviour:
        top = [{"token": token, "logprob": value} for token, value in first]
        choice = {"message": {"content": first[0][0]}, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
        return faulty_server.saying({"choices": [choice]})

    server.behaviours = [tokens(("Yes", -0.25), ("No", -1.5)), tokens(("Yes", -0.25), ("Well", -3.0))]
    teacher = made(server, prompt="relevant-yes-no")
    assert_scores(teacher.score(*query()), [[1.25, 2.75]])
    assert teacher.counts == {"bounded_log_odds": 1, "malformed_answers": 0}
    body = server.requests[0][1]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    server.behaviours = [tokens(("Well", -0.1), ("Maybe", -2.0))]
    with pytest.raises(AnswerError, match=r"query 'q2', document in row 0: no 'Yes' or 'No' among .* 'Well'"):
        made(server, prompt="relevant-yes-no").score([Candidates("q2", "else", np.arange(1))], [["w5"]])


# ---- malformed answers


def test_malformed_grades_are_asked_again(server: FaultyServer) -> None:
    """The second request has the first answer and a reminder; a second run counts the same without a request."""
    server.content = lambda body: "well…" if len(body["messages"]) == 1 else "1"
    teacher = made(server)
    assert_scores(teacher.score(*query(1)), [[1]])
    assert teacher.counts["malformed_answers"] == 1
    assert [turn["content"] for turn in server.requests[1][1]["messages"][1:]] == [
        "well…",
        "Answer with one whole number from 0 to 3 and nothing else.",
    ]
    again = made(server)
    assert_scores(again.score(*query(1)), [[1]])
    assert again.counts == teacher.counts
    assert len(server.requests) == 2


def test_a_pair_without_a_grade_is_named(server: FaultyServer, collection: Collection, tmp_path: Path) -> None:
    """All other pairs are asked first; the parts of the shard then need no request."""
    server.content = lambda body: "no idea " * 50 if document(body) == "w1" else "3"
    teacher = prepared(made(server, malformed_attempts=1), collection, tmp_path / "work")
    shard, texts = query(3)
    with pytest.raises(AnswerError) as raised:
        teacher.score(shard, texts)
    said = ("no idea " * 50)[:200]
    assert str(raised.value) == f"query 'q1', document 'd01': no grade from 0 to 3 in the answer {said!r}"
    assert len(server.requests) == 2 + 2
    for row in (0, 2):
        assert_scores(teacher.score([Candidates("q1", "what", np.array([row]))], [[f"w{row}"]]), [[3]])
    with pytest.raises(AnswerError):
        teacher.score([Candidates("q1", "what", np.array([1]))], [["w1"]])
    assert len(server.requests) == 4
    assert not teacher.counts["malformed_answers"]  # of pairs that have a score


# ---- lists


def listwise(server: FaultyServer, tmp_path: Path, **values: Any) -> ApiTeacher:
    (tmp_path / "list.yaml").write_text(
        "kind: listwise\npassage: '[{identifier}] {document}'\n"
        "messages:\n- {role: user, content: '{query}: {passages}'}\n"
    )
    return made(server, prompt=str(tmp_path / "list.yaml"), window=3, stride=2, **values)


def test_a_ranker_by_number_sorts_the_top(server: FaultyServer, tmp_path: Path) -> None:
    """Five documents, best w4, w3, …: windows (3rd to 5th) and (1st to 3rd), worked out by hand.

    [w0 w1 | w2 w3 w4] gives w4 w3 w2; then [w0 w1 w4] gives w4 w1 w0; the list is w4 w1 w0 w3 w2.
    """

    def sort(body: dict[str, Any]) -> str:
        passages = body["messages"][0]["content"].removeprefix("what: ").split("\n")
        return " > ".join(passage.split()[0] for passage in sorted(passages, key=lambda p: p[4:], reverse=True))

    server.content = sort
    teacher = listwise(server, tmp_path)
    assert_scores(teacher.score(*query(5)), [[-3, -2, -5, -4, -1]])
    assert (teacher.score_kind, teacher.independent) == ("rank", False)
    assert teacher.counts == {"windows": 2, "malformed_answers": 0}
    assert [body["max_tokens"] for _, body, _ in server.requests] == [32, 32]
    assert server.requests[1][1]["messages"][0]["content"] == "what: [1] w0\n[2] w1\n[3] w4"


def test_windows_without_an_order_stay_as_they_are(server: FaultyServer, tmp_path: Path) -> None:
    """Two malformed answers for each of two windows; a repaired answer is malformed too."""
    server.content = lambda body: "I cannot"
    teacher = listwise(server, tmp_path, malformed_attempts=1)
    assert_scores(teacher.score(*query(5)), [[-1, -2, -3, -4, -5]])
    assert teacher.counts == {"windows": 2, "malformed_answers": 4, "windows_in_present_order": 2}
    assert "[2] > [1]" in server.requests[1][1]["messages"][-1]["content"]
    server.content = lambda body: "[3]"
    teacher = listwise(server, tmp_path)
    assert_scores(teacher.score([Candidates("q2", "else", np.arange(3))], [["w0", "w1", "w2"]]), [[-2, -3, -1]])
    assert teacher.counts == {"windows": 1, "malformed_answers": 1}


def test_a_model_that_orders_nothing_stops_the_run(server: FaultyServer, tmp_path: Path) -> None:
    """Ten lists at once, and no answer names a passage: the candidates' order is not the model's."""
    server.content = lambda body: "2"
    lists = [Candidates(f"q{i}", f"what {i}", np.arange(2)) for i in range(10)]
    texts = [["w0", "w1"]] * 10
    with pytest.raises(EndpointError, match=r"none of 10 answers names a passage \(such as '2'\)"):
        listwise(server, tmp_path, malformed_attempts=0).score(lists, texts)
    teacher = listwise(server, tmp_path, malformed_attempts=0)
    teacher.score(lists[:9], texts[:9])
    assert teacher.counts["windows_in_present_order"] == 9
