"""The API teacher against real servers: `transformers serve`, and one that gives the logits of a model in torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chat
from tiny_api import assert_scores

from retrieval_kd.data.collection import Collection
from retrieval_kd.models.api.client import EndpointError
from retrieval_kd.recipe import validate
from retrieval_kd.teachers.api.answers import AnswerError
from retrieval_kd.teachers.api.recipe import ApiRecipe
from retrieval_kd.teachers.api.teacher import ApiTeacher
from retrieval_kd.teachers.base import Candidates, ScoringJob

FOLLOWS = {"good": "3", "fair": "2", "bad": "0", "odd": "hmm", "else.": "1"} | {
    "cats": "[2]",
    "[2]": "[3]",
    "[3]": "[1]",
    "dogs": "hmm",
}
"""What the model of `transformers serve` says after a prompt's last word; ``else.`` ends the reminders."""
WORDS = ["yes", "Yes", "no", "query", "document", "cats", "dogs", "red", "green", "blue", "other"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def parrot(shared: Path) -> Path:
    return tiny_chat.make_parrot(shared / "parrot", FOLLOWS)


@pytest.fixture(scope="module")
def served(shared: Path, parrot: Path) -> Iterator[str]:
    with tiny_chat.transformers_serve(parrot, shared / "serve.log") as base_url:
        yield base_url


@pytest.fixture(scope="module")
def random_model(shared: Path) -> Path:
    return tiny_chat.make_random(shared / "random", WORDS)


@pytest.fixture(scope="module")
def logits_served(random_model: Path) -> Iterator[str]:
    with tiny_chat.serving(random_model) as base_url:
        yield base_url


def made(base_url: str, model: Path, prompt: Path, text: str, **values: Any) -> ApiTeacher:
    """The teacher with a prompt of its own."""
    prompt.write_text(text)
    recipe = {"kind": "api", "base_url": base_url, "model": str(model), "prompt": str(prompt), "key_env": None}
    return ApiTeacher(validate(ApiRecipe, recipe | values, "test"))


def test_grades_of_transformers_serve(served: str, parrot: Path, collection: Collection, tmp_path: Path) -> None:
    """The model's answer follows from a document's last word; ``odd`` needs the reminder, whose last word says 1.

    A prompt has 4 words, the second one of ``odd`` 4 + 1 + 12; an answer has one word and the end.
    """
    text = "kind: pointwise\nmessages:\n- {role: user, content: 'query {query} document {document}'}\ngrades: [0, 3]\n"
    teacher = made(served, parrot, tmp_path / "p.yaml", text)
    (tmp_path / "work").mkdir()
    teacher.prepare(ScoringJob(collection, [], [], tmp_path / "work"))
    shard = [Candidates("q1", "cats", np.arange(3)), Candidates("q2", "dogs", np.arange(2))]
    texts = [["good", "bad", "odd"], ["fair", "good"]]
    assert_scores(teacher.score(shard, texts), [[3, 0, 1], [2, 3]])
    assert teacher.counts["malformed_answers"] == 1
    usage = teacher.details()["usage"]
    assert (usage["requests"], usage["prompt_tokens"], usage["completion_tokens"]) == (6, 5 * 4 + 17, 6 * 2)
    assert teacher.details()["served_models"] == [f"{parrot}@main"]
    assert_scores(teacher.score(shard, texts), [[3, 0, 1], [2, 3]])
    assert teacher.details()["usage"]["requests"] == 6
    with pytest.raises(AnswerError, match=r"query 'q1', document 'd07': no grade from 5 to 9 in the answer '1'"):
        never = made(served, parrot, tmp_path / "n.yaml", text.replace("[0, 3]", "[5, 9]"))
        never.prepare(ScoringJob(collection, [], [], tmp_path / "work"))
        never.score([Candidates("q1", "cats", np.array([7]))], [["good"]])


def test_completions_of_transformers_serve(served: str, parrot: Path, tmp_path: Path) -> None:
    text = 'kind: pointwise\ntext: "query {query} document {document}"\ngrades: [0, 3]\n'
    teacher = made(served, parrot, tmp_path / "p.yaml", text)
    assert_scores(teacher.score([Candidates("q1", "cats", np.arange(2))], [["good", "odd"]]), [[3, 1]])
    assert teacher.counts["malformed_answers"] == 1


def test_orders_of_transformers_serve(served: str, parrot: Path, tmp_path: Path) -> None:
    """After ``cats`` the model always says [2] [3] [1]; after ``dogs`` it makes no sense, with a reminder neither.

    Five documents in windows of three: 2 3 4 become 3 4 2, then 0 1 3 become 1 3 0; in the end 1 3 0 4 2.
    """
    text = (
        "kind: listwise\npassage: '[ {identifier} ] {document}'\n"
        "messages:\n- {role: user, content: '{passages} {query}'}\n"
    )
    teacher = made(served, parrot, tmp_path / "p.yaml", text, window=3, stride=2, malformed_attempts=1)
    shard = [Candidates("q1", "cats", np.arange(5)), Candidates("q2", "dogs", np.arange(2))]
    texts = [["good"] * 5, ["bad"] * 2]
    assert_scores(teacher.score(shard, texts), [[-3, -1, -5, -2, -4], [-1, -2]])
    assert teacher.counts == {"windows": 3, "malformed_answers": 2, "windows_in_present_order": 1}


def test_an_endpoint_without_log_probabilities(served: str, parrot: Path, tmp_path: Path) -> None:
    text = "kind: pointwise\nmessages:\n- {role: user, content: '{query} {document}'}\npositive: '3'\nnegative: '0'\n"
    teacher = made(served, parrot, tmp_path / "p.yaml", text)
    for _ in range(2):  # the answer is not kept: a newer server may do better
        with pytest.raises(EndpointError, match="gives no log-probabilities"):
            teacher.score([Candidates("q1", "cats", np.arange(1))], [["good"]])


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_log_odds_equal_the_models_logits(logits_served: str, random_model: Path, tmp_path: Path, chat: bool) -> None:
    """All 13 tokens: the difference of the model's own logits. The best 4: the bound stands for what is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rendered = "query {query} document {document}"
    ask = f"messages:\n- {{role: user, content: '{rendered}'}}" if chat else f"text: '{rendered}'"
    text = f"kind: pointwise\n{ask}\npositive: 'yes'\nnegative: 'no'\n"
    teacher = made(logits_served, random_model, tmp_path / "p.yaml", text, top_logprobs=13)
    few = made(logits_served, random_model, tmp_path / "p.yaml", text, top_logprobs=4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_model), AutoTokenizer.from_pretrained(random_model)
    documents = [f"{first} {last}" for first in ("red", "cats") for last in WORDS]
    candidates = [Candidates("q1", "cats", np.arange(len(documents)))]
    yes, capital, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Yes", "no"))
    (found,), _ = teacher.score(candidates, [documents])
    bounded = 0
    for i, document in enumerate(documents):
        logits = tiny_chat.next_logits(model, tokenizer, rendered.format(query="cats", document=document))
        expected = logits[[yes, capital]].logsumexp(0) - logits[no]
        assert found[i] == pytest.approx(float(expected), abs=1e-4)
        best = logits.topk(4).indices.tolist()
        positive, negative = [j for j in best if j in (yes, capital)], [j for j in best if j == no]
        if not positive and not negative:
            continue
        bounded += not (positive and negative)
        most = min(logits[best[3]], logits[[j for j in range(13) if j not in best]].logsumexp(0)).reshape(1)
        of_positive, of_negative = (logits[of] if of else most for of in (positive, negative))
        bound = of_positive.logsumexp(0) - of_negative.logsumexp(0)
        ((value,), _) = few.score([Candidates("q1", "cats", np.array([i]))], [[document]])
        assert value[0] == pytest.approx(float(bound), abs=1e-4)
    assert teacher.counts["bounded_log_odds"] == 0
    assert few.counts["bounded_log_odds"] == bounded > 0
