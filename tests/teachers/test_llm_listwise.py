from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_language_models as lm

from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.recipe import validate
from retrieval_kd.teachers.base import Candidates
from retrieval_kd.teachers.llm_listwise import LLMListwiseTeacher, PermutationRule
from retrieval_kd.teachers.windows import parse_permutation

TEXT = "query : {query}\n{passages}\nrank"
SHARD = [
    Candidates("q1", "w1 w2", np.arange(4)),
    Candidates("q2", "w3", np.arange(3)),
    Candidates("q3", "w4", np.arange(1)),
]
TEXTS = [["w5 w6", "w7", "w8 w9 w10", "w11"], ["w12", "", "w13 w14"], ["w15"]]


@pytest.fixture(scope="module")
def causal(shared: Path) -> Path:
    return lm.make_causal(shared / "listwise")


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    return tiny.write_recipe(tmp_path / "numbers.yaml", {"kind": "listwise", "text": TEXT})


@pytest.fixture
def letters(tmp_path: Path) -> str:
    return tiny.write_recipe(
        tmp_path / "letters.yaml", {"kind": "listwise", "text": TEXT, "identifiers": "letters", "answer_start": "["}
    )


def teacher(model: Path, prompt: str, **values: Any) -> LLMListwiseTeacher:
    raw = {"kind": "llm-listwise", "model": str(model), "prompt": prompt, "window": 9, "max_length": 400, "stride": 4}
    return LLMListwiseTeacher(validate(LLMListwiseTeacher.Recipe, {**raw, **values}, "recipe"))


class Ranker:
    """The same teacher written plainly: one window at a time, one forward pass a token, no padding, no cache."""

    def __init__(self, model: Path, identifiers: str) -> None:
        self.network, self.tokenizer = lm.plain(model)
        self.names = list("ABCDEFGHI") if identifiers == "letters" else [str(i) for i in range(1, 30)]

    def ids(self, query: str, passages: Sequence[str], start: str = "[") -> list[int]:
        lines = "\n".join(f"[{name}] {text}" for name, text in zip(self.names, passages, strict=False))
        text = TEXT.replace("{query}", query).replace("{passages}", lines) + start
        return list(self.tokenizer(text)["input_ids"])

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def first_token(self, query: str, passages: Sequence[str]) -> list[int]:
        logits = lm.next_logits(self.network, self.ids(query, passages))
        of_passages = [float(logits[self.tokens(name)[0]]) for name in self.names[: len(passages)]]
        return sorted(range(len(passages)), key=lambda i: -of_passages[i])

    def permutation(self, query: str, passages: Sequence[str], start: str = "[") -> list[int]:
        """Greedy: at each step the likeliest token that some valid answer goes on with."""
        ids = self.ids(query, passages, start)
        answer: list[int] = []
        order: list[int] = []
        while len(order) < len(passages):
            separator = " > [" if order else "" if start else "["
            left = {i: self.tokens(f"{separator}{self.names[i]}]") for i in range(len(passages)) if i not in order}
            depth = 0
            while True:
                allowed = sorted({tokens[depth] for tokens in left.values()})
                logits = lm.next_logits(self.network, ids, answer)
                token = max(allowed, key=lambda token: float(logits[token]))
                answer.append(token)
                left = {i: tokens for i, tokens in left.items() if tokens[depth] == token}
                depth += 1
                (i, tokens), *others = left.items()
                if not others and depth == len(tokens):
                    order.append(i)
                    break
        return order


def ranks(order: Sequence[int]) -> list[float]:
    """Minus the 1-based place of each passage."""
    return [-(order.index(i) + 1.0) for i in range(len(order))]


@pytest.mark.parametrize("decoding", ["permutation", "first-token"])
@pytest.mark.parametrize("identifiers", ["numbers", "letters"])
def test_ranks_are_those_of_a_plain_ranker(
    decoding: str, identifiers: str, causal: Path, request: pytest.FixtureRequest
) -> None:
    """Lists of 4, 3 and 1 together; a list of one is read too, for the model may not be able to."""
    made = teacher(causal, request.getfixturevalue(identifiers), decoding=decoding)
    scores, lost = made.score(SHARD, TEXTS)
    ranker = Ranker(causal, identifiers)
    rank = ranker.permutation if decoding == "permutation" else ranker.first_token
    expected = [rank(query.text, texts) for query, texts in zip(SHARD, TEXTS, strict=True)]
    assert [of_query.tolist() for of_query in scores] == [ranks(order) for order in expected]
    assert [order for order in expected if order != sorted(order)]
    assert [of_query.tolist() for of_query in lost] == [[0] * 4, [0] * 3, [0]]
    assert scores[0].dtype == np.float32 and lost[0].dtype == np.int32
    assert +made.counts == {"windows": 3}
    assert (made.score_kind, made.independent) == ("rank", False)


def test_identifiers_of_two_tokens(causal: Path, numbers: str) -> None:
    """12 passages: ``1`` may be followed by ``]``, or by ``0``, ``1`` or ``2``. First-token decoding refuses them."""
    query = Candidates("q", "w1", np.arange(12))
    texts = [" ".join(tiny.WORDS[i : i + 2]) for i in range(20, 32)]
    scores, _ = teacher(causal, numbers, window=12).score([query], [texts])
    assert scores[0].tolist() == ranks(Ranker(causal, "numbers").permutation("w1", texts))
    with pytest.raises(InputError, match=r"'10' is 2 tokens \(1 0\) .*, not one; take a prompt with identifiers: lett"):
        teacher(causal, numbers, window=12, decoding="first-token").score([query], [texts])


def test_the_rule_allows_what_some_permutation_goes_on_with() -> None:
    """Passages 7, 8 and 78 (as digits; 9 closes, 5 separates), along every beginning of all six answers."""
    first = [[7, 9], [8, 9], [7, 8, 9]]
    later = [[5, *tokens] for tokens in first]
    answers = {
        order: [token for place, i in enumerate(order) for token in (later if place else first)[i]]
        for order in itertools.permutations(range(3))
    }
    for order, answer in answers.items():
        rule = PermutationRule(first, later)
        for step, token in enumerate(answer):
            if len(rule.order) == 3:  # the last one is certain before it is written
                break
            assert rule.allowed() == sorted({a[step] for a in answers.values() if a[:step] == answer[:step]})
            rule.advance(token)
        assert tuple(rule.order) == order and rule.allowed() == []
        rule.advance(0)
        assert tuple(rule.order) == order


def test_a_list_longer_than_the_window(causal: Path, letters: str) -> None:
    """11 passages, windows of 4, stride 2, from the end; written out as a loop."""
    texts = [" ".join(tiny.WORDS[i : i + 1 + i % 3]) for i in range(30, 41)]
    ranker = Ranker(causal, "letters")
    order = list(range(11))
    end, windows = 11, 0
    while True:
        start = max(0, end - 4)
        shown = order[start:end]
        order[start:end] = [shown[i] for i in ranker.first_token("w1", [texts[i] for i in shown])]
        windows += 1
        if start == 0:
            break
        end -= 2
    made = teacher(causal, letters, decoding="first-token", window=4, stride=2)
    scores, _ = made.score([Candidates("q", "w1", np.arange(11))], [texts])
    assert scores[0].tolist() == ranks(order)
    assert made.counts["windows"] == windows == 5


def test_passages_are_cut_alike(causal: Path, letters: str) -> None:
    """``<s> query : w1 [A] … [B] … [C] … rank [`` is 15 tokens and the passages 10 + 2 + 6: at 27 each keeps 5."""
    texts = [" ".join(tiny.WORDS[:10]), "w20 w21", " ".join(tiny.WORDS[30:36])]
    made = teacher(causal, letters, decoding="first-token", max_length=27)
    scores, lost = made.score([Candidates("q", "w1", np.arange(3))], [texts])
    assert lost[0].tolist() == [5, 0, 1]
    cut = [" ".join(text.split()[:5]) for text in texts]
    assert scores[0].tolist() == ranks(Ranker(causal, "letters").first_token("w1", cut))


def test_an_answer_needs_room(causal: Path, letters: str) -> None:
    """Windows of 3: ``A]``, twice `` > [A]`` and the end are 11 tokens, so that 38 leave the same 27 for the prompt."""
    texts = [" ".join(tiny.WORDS[:10]), "w20 w21", " ".join(tiny.WORDS[30:36])]
    query = Candidates("q", "w1", np.arange(3))
    made = teacher(causal, letters, window=3, stride=1, max_length=38 + 4)
    assert made.score([query], [texts]).tokens_lost[0].tolist() == [5, 0, 1]
    with pytest.raises(InputError, match=r"max_length 16 leaves no room .* lists 9 passages is 39 tokens"):
        teacher(causal, letters, max_length=16).score([query], [texts])


def test_a_passage_of_two_windows_counts_its_loss_once(causal: Path, letters: str) -> None:
    """Windows of 2 over 3 passages of 10 words: 12 tokens and 7 for each passage make 26."""
    texts = [" ".join(tiny.WORDS[i : i + 10]) for i in (0, 10, 20)]
    made = teacher(causal, letters, decoding="first-token", window=2, stride=1, max_length=26)
    _, lost = made.score([Candidates("q", "w1", np.arange(3))], [texts])
    assert made.counts["windows"] == 2
    assert lost[0].tolist() == [3, 3, 3]


def test_words_beyond_the_prompts_limit_count_too(causal: Path, tmp_path: Path) -> None:
    """Of 10, 2 and 6 words 4 are kept, then 3 to fit into the 24 tokens of the prompt: 15 + 3 + 2 + 3 = 23."""
    values = {"kind": "listwise", "text": TEXT, "identifiers": "letters", "passage_words": 4}
    prompt = tiny.write_recipe(tmp_path / "words.yaml", values)
    texts = [" ".join(tiny.WORDS[:10]), "w20  w21\n", "\n".join(tiny.WORDS[30:36])]
    query = Candidates("q", "w1", np.arange(3))
    made = teacher(causal, prompt, decoding="first-token")
    scores, lost = made.score([query], [texts])
    assert lost[0].tolist() == [6, 0, 2]
    cut = [" ".join(text.split()[:4]) for text in texts]
    assert scores[0].tolist() == ranks(Ranker(causal, "letters").first_token("w1", cut))
    made = teacher(causal, prompt, decoding="first-token", max_length=24)
    assert made.score([query], [texts]).tokens_lost[0].tolist() == [7, 0, 3]


def test_a_query_that_leaves_no_room(causal: Path, letters: str) -> None:
    query = Candidates("long-one", " ".join(tiny.WORDS[:20]), np.arange(2))
    with pytest.raises(InputError, match=r"query 'long-one': the prompt without its documents is 31 tokens, 1 more"):
        teacher(causal, letters, decoding="first-token", max_length=30).score([query], [["w1", "w2"]])


def test_free_answers_are_repaired_and_counted(causal: Path, numbers: str) -> None:
    made = teacher(causal, numbers, constrained=False)
    scores, _ = made.score(SHARD, TEXTS)
    ranker = Ranker(causal, "numbers")
    malformed = 0
    for query, texts, found in zip(SHARD, TEXTS, scores, strict=True):
        answer = lm.greedy(ranker.network, ranker.ids(query.text, texts, start=""), steps=made._answer_tokens)
        order, repaired = parse_permutation(ranker.tokenizer.decode(answer), ranker.names[: len(texts)])
        assert found.tolist() == ranks(order)
        malformed += repaired
    assert made.counts["malformed_answers"] == malformed == 3


def test_an_encoder_decoder_writes_permutations(numbers: str, letters: str, tmp_path: Path) -> None:
    model = lm.make_encoder_decoder(tmp_path / "t5")
    scores, _ = teacher(model, numbers).score(SHARD, TEXTS)
    ranker = Ranker(model, "numbers")
    expected = [ranker.permutation(query.text, texts, start="") for query, texts in zip(SHARD, TEXTS, strict=True)]
    assert [of_query.tolist() for of_query in scores] == [ranks(order) for order in expected]
    with pytest.raises(InputError, match="an encoder-decoder, whose answer cannot be begun"):
        teacher(model, letters).details()


def test_shuffles(causal: Path, letters: str) -> None:
    """Mean ranks of three orders are thirds; the same shard has the same bytes, alone or beside other queries."""
    first, second = (
        teacher(causal, letters, decoding="first-token", shuffles=3, seed=1).score(SHARD, TEXTS) for _ in range(2)
    )
    assert [a.tobytes() for a in first.scores] == [a.tobytes() for a in second.scores]
    for of_query in first.scores:
        np.testing.assert_allclose(of_query * 3, np.round(of_query * 3), atol=1e-5)
        assert of_query.sum() == pytest.approx(-len(of_query) * (len(of_query) + 1) / 2)
    alone = teacher(causal, letters, decoding="first-token", shuffles=3, seed=1).score(SHARD[1:2], TEXTS[1:2])
    assert alone.scores[0].tolist() == first.scores[1].tolist()


@pytest.mark.parametrize("decoding", ["permutation", "first-token"])
def test_nan_is_no_order(decoding: str, letters: str, tmp_path: Path) -> None:
    model = lm.spoil(lm.make_causal(tmp_path / "model"), "w7")
    with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
        teacher(model, letters, decoding=decoding).score(SHARD, TEXTS)


@pytest.mark.parametrize(
    ("name", "decoding"),
    [("first", "first-token"), ("first", "permutation"), ("rankzephyr", "permutation"), ("rankgpt", "permutation")],
)
def test_shipped_prompts_work(name: str, decoding: str, tmp_path: Path) -> None:
    """With a byte-level tokenizer, as large models have, and its chat template."""
    model = lm.make_causal(tmp_path / "model", lm.byte_tokenizer(), length=2048)
    made = teacher(model, name, decoding=decoding, max_length=2048, window=5, stride=2)
    scores, lost = made.score([Candidates("q", "w1", np.arange(3))], [["w5 [2] w6", "café w7", "w8 w9 w10"]])
    assert sorted(scores[0].tolist()) == [-3, -2, -1] and lost[0].tolist() == [0, 0, 0]


def test_details(causal: Path, letters: str) -> None:
    made = teacher(causal, letters, decoding="first-token")
    assert made.ref().fingerprint == made.source.fingerprint and "model" not in vars(made)
    assert made.details() == {
        "model": str(causal),
        "revision": None,
        "max_length": 400,
        "dtype": "float32",
        "prompt": letters,
        "prompt_sha256": made.prompt.sha256,
        "decoding": "first-token",
    }


def test_what_does_not_go_together(causal: Path, letters: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="27 passages in a window, but there are 26 letters"):
        teacher(causal, letters, window=27)
    with pytest.raises(RecipeError, match="prompt 'monot5' is pointwise; kind llm-listwise needs a listwise prompt"):
        teacher(causal, "monot5")
    with pytest.raises(RecipeError, match="constrained: false goes with decoding: permutation only"):
        teacher(causal, letters, decoding="first-token", constrained=False)
    with pytest.raises(RecipeError, match="stride 9 must be smaller than window 9"):
        teacher(causal, letters, stride=9)
    silent = lm.make_causal(tmp_path / "silent", lm.word_tokenizer(chat=None))
    with pytest.raises(InputError, match="has no chat template, which a prompt with messages: needs"):
        teacher(silent, "first").score(SHARD, TEXTS)
