"""Queries written by tiny random models: what they are shown and say, what is cut, and runs that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_language_models as tiny_lm
import tiny_queries
from tiny_queries import made_from, make, noted

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.queries.base import Made
from retrieval_kd.queries.llm import LLMQueries, LLMQueriesRecipe
from retrieval_kd.queries.make import estimate_queries
from retrieval_kd.queries.seq2seq import Seq2SeqQueries
from retrieval_kd.recipe import validate
from retrieval_kd.verify import check

ROWS = {
    "d1": ("w1 w2", "w3 w4"),
    "d2": ("", "w5 w6 w7"),
    "d3": ("", ""),
    "d4": ("w9", "w10 w11 w12 w13 w14 w15 w16 w17"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return tiny_queries.make_documents(tmp_path_factory.mktemp("documents"), ROWS)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.make_encoder_decoder(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.make_causal(tmp_path_factory.mktemp("models") / "causal")


def greedy(model: Path, text: str, steps: int, *, special: bool = True) -> str:
    """What the model says by plain forward passes, one token after another."""
    network, tokenizer = tiny_lm.plain(model)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return str(tokenizer.decode(tiny_lm.greedy(network, ids, steps), skip_special_tokens=True))


# ---- encoder-decoders


def test_sampling_from_one_token_is_greedy(source: Collection, t5: Path, tmp_path: Path) -> None:
    """d4 and its end are 10 tokens, cut to 8: its last two words go. d3 is empty. A special token stays text."""
    keys = {"model": str(t5), "per_document": 2, "top_k": 1, "query_length": 5, "document_length": 8}
    made = make(source, tmp_path / "made", "seq2seq", **keys)
    shown = {"d1": "w1 w2 w3 w4", "d2": "w5 w6 w7", "d4": "w9 w10 w11 w12 w13 w14 w15"}
    expected: dict[str, list[str]] = {}
    for doc_id, text in shown.items():
        expected.setdefault(" ".join(greedy(t5, text, 5).split()), []).append(doc_id)
    assert made_from(made) == expected
    assert noted(made, "documents_without_query", "truncated_documents", "tokens_lost") == (1, 1, 2)
    assert noted(made, "duplicates") == (6 - len(expected),)
    assert {(origin.model, origin.prompt_sha256) for origin in made.origins} == {(str(t5), None)}
    assert made.manifest.inputs["model"]["absolute"] == str(t5)
    assert check(made.path) == []


def test_a_prefix_is_shown(source: Collection, t5: Path, tmp_path: Path) -> None:
    keys = {"model": str(t5), "per_document": 1, "top_k": 1, "query_length": 4, "prefix": "query : "}
    made = make(source, tmp_path / "made", "seq2seq", **keys)
    assert made_from(made)[" ".join(greedy(t5, "query : w5 w6 w7", 4).split())] == ["d2"]


def test_samples_depend_on_the_seed_alone(source: Collection, t5: Path, tmp_path: Path) -> None:
    import torch

    found = {}
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        torch.manual_seed(len(found))  # what others drew before does not matter
        before = torch.random.get_rng_state()
        keys = {"model": str(t5), "per_document": 4, "query_length": 6, "temperature": 9.0, "seed": seed}
        found[name] = made_from(make(source, tmp_path / name, "seq2seq", **keys))
        assert torch.equal(before, torch.random.get_rng_state())
    assert found["one"] == found["same"] != found["other"]
    assert len([text for text, documents in found["one"].items() if "d1" in documents]) > 1


@pytest.mark.parametrize("kind", ["seq2seq", "llm"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    kind: str, source: Collection, t5: Path, causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two documents a chunk: the first is kept, the second was being made."""
    maker: Any = {"seq2seq": Seq2SeqQueries, "llm": LLMQueries}[kind]
    keys: dict[str, Any] = {"model": str(t5), "document_length": 8, "query_length": 4}
    if kind == "llm":
        prompt = {"prompt": "{document}", "per_document": 1}
        keys = {"model": str(causal), "document_length": 8, "answer_length": 4, **prompt}
    monkeypatch.setattr(maker, "chunk", 2)
    whole = make(source, tmp_path / "whole", kind, **keys)
    asked: list[list[int]] = []
    original = maker.from_documents

    def breaking(self: Any, rows: list[int], documents: Any) -> Made:
        asked.append(list(rows))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(self, rows, documents)

    monkeypatch.setattr(maker, "from_documents", breaking)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "again", kind, **keys)
    assert not (tmp_path / "again").exists()
    again = make(source, tmp_path / "again", kind, **keys)
    assert asked == [[0, 1], [2, 3], [2, 3]]
    assert again.manifest.files == whole.manifest.files
    assert again.fingerprint == whole.fingerprint
    assert again.manifest.counts == whole.manifest.counts
    assert noted(again, "truncated_documents") == (1,)


def test_a_causal_model_is_no_seq2seq(source: Collection, causal: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no encoder-decoder; ask it by a prompt with kind: llm"):
        make(source, tmp_path / "made", "seq2seq", model=str(causal))


def test_what_a_model_would_read_and_write(source: Collection) -> None:
    """16 words in four documents, 1.3 tokens each; three queries of at most 64 tokens for each document."""
    found = estimate_queries("queries/doc2query", collection=source)
    assert found["approximate_tokens"] == int(1.3 * 16)
    assert found["written_tokens_at_most"] == 4 * 3 * 64


# ---- models that are asked


def test_a_chat_model_is_asked(source: Collection, causal: Path, tmp_path: Path) -> None:
    """One turn by its template; d4 has 9 tokens and is shown with 8 of them."""
    keys = {"model": str(causal), "prompt": "query {document} .", "per_document": 1}
    made = make(source, tmp_path / "made", "llm", **keys, document_length=8, answer_length=6)
    recipe = validate(LLMQueriesRecipe, {"kind": "llm", **keys}, "test")
    shown = {"d1": "w1 w2 w3 w4", "d2": "w5 w6 w7", "d4": "w9 w10 w11 w12 w13 w14 w15 w16"}
    expected: dict[str, list[str]] = {}
    for doc_id, text in shown.items():
        chat = f"<s><|user|>query {text} .<|end|><|assistant|>"
        for query in recipe.read(greedy(causal, chat, 6, special=False)):
            expected.setdefault(" ".join(query.split()), []).append(doc_id)
    assert made_from(made) == expected
    assert expected
    assert noted(made, "truncated_documents", "tokens_lost", "documents_without_query") == (1, 1, 1)
    assert {origin.prompt_sha256 for origin in made.origins} == {recipe.prompt_sha256}
    assert check(made.path) == []


def test_a_raw_text_goes_on(source: Collection, causal: Path, tmp_path: Path) -> None:
    keys = {"prompt": "{document} query :", "per_document": 1, "chat": False, "answer_length": 6}
    made = make(source, tmp_path / "made", "llm", model=str(causal), **keys)
    recipe = validate(LLMQueriesRecipe, {"kind": "llm", "model": "x", **keys}, "test")
    (query,) = recipe.read(greedy(causal, "w5 w6 w7 query :", 6))
    assert made_from(made)[" ".join(query.split())] == ["d2"]


def test_a_prompt_that_is_too_long(source: Collection, causal: Path, tmp_path: Path) -> None:
    """The model reads 512 tokens, the answer alone may have 510."""
    with pytest.raises(InputError, match="more than the 512 tokens"):
        make(
            source, tmp_path / "made", "llm", model=str(causal), prompt="{document}", per_document=1, answer_length=510
        )


@pytest.mark.parametrize(
    ("answer", "queries"),
    [
        ("one two\nthree", ["one two", "three"]),
        ('Here are three queries:\n\n1. one two\n2) "three"\n(3) four?\n4. five', ["one two", "three", "four?"]),
        ("- one\n* 'two'\n• “three”", ["one", "two", "three"]),
        ("3.5 volts\n2 apples\n1.\n", ["3.5 volts", "2 apples", "1."]),
        ("<think>what? why?</think>one", ["one"]),
        ("<think>what? why?", []),
        ("\n  \n", []),
    ],
)
def test_queries_of_an_answer(answer: str, queries: list[str]) -> None:
    values = {"kind": "llm", "model": "x", "prompt": "{number} {document}"}
    assert validate(LLMQueriesRecipe, values, "test").read(answer) == queries


def test_prompts_are_filled_in_one_pass() -> None:
    values = {"kind": "llm", "model": "x", "prompt": "{number} for {document}!"}
    recipe = validate(LLMQueriesRecipe, values, "test")
    assert recipe.rendered("a {number} \\1 {x}") == [{"role": "user", "content": "3 for a {number} \\1 {x}!"}]
    raw = validate(LLMQueriesRecipe, {**values, "chat": False}, "test")
    assert raw.rendered("it") == "3 for it!"
    assert recipe.prompt_sha256 != raw.prompt_sha256


@pytest.mark.parametrize(
    ("prompt", "number", "message"),
    [
        ("no place", 1, r"the placeholder \{document\} is missing"),
        ("{document} {documnt}", 1, r"\{documnt\} would be sent as it is \(did you mean 'document'"),
        ("{document}", 2, r"per_document above 1 needs the placeholder \{number\}"),
    ],
)
def test_prompts_that_cannot_be(prompt: str, number: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(LLMQueriesRecipe, {"kind": "llm", "model": "x", "prompt": prompt, "per_document": number}, "test")
