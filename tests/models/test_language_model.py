from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_language_models as lm

from retrieval_kd.errors import InputError
from retrieval_kd.models.decoding import Rule
from retrieval_kd.models.language_model import LanguageModel

TEXTS = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w10", "w11 w12 w13 w14", "query : w1 w2 w3 w1 [ A ]"]
MESSAGES = [{"role": "system", "content": "rank"}, {"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
def causal(shared: Path) -> Path:
    return lm.make_causal(shared / "causal")


@pytest.fixture(scope="module")
def model(causal: Path) -> LanguageModel:
    return LanguageModel.load(causal)


@pytest.fixture(scope="module")
def t5(shared: Path) -> Path:
    return lm.make_encoder_decoder(shared / "t5")


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [True, False])
def test_next_token_logits_are_those_of_one_by_one(architecture: str, side: str, pad: bool, tmp_path: Path) -> None:
    """In one padded batch, GPT-2 with absolute positions too, and with no pad token at all."""
    path = lm.make_causal(tmp_path, lm.word_tokenizer(pad=pad, side=side), architecture=architecture)
    network, _ = lm.plain(path)
    model = LanguageModel.load(path)
    prompts = model.tokenize(TEXTS)
    assert sorted(map(len, prompts)) == [2, 3, 5, 8, 10]
    wanted = [40, 3, 77]
    together = model.next_token_logits(prompts, wanted, batch_tokens=1000)
    apart = model.next_token_logits(prompts, wanted, batch_tokens=1)
    expected = np.stack([lm.next_logits(network, ids)[wanted].numpy() for ids in prompts])
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, expected, atol=1e-4)
    np.testing.assert_allclose(apart, expected, atol=1e-4)


def test_first_decoder_step_of_an_encoder_decoder(t5: Path) -> None:
    network, _ = lm.plain(t5)
    model = LanguageModel.load(t5)
    prompts = model.tokenize(TEXTS)
    found = model.next_token_logits(prompts, [50, 51], batch_tokens=1000)
    expected = np.stack([lm.next_logits(network, ids)[[50, 51]].numpy() for ids in prompts])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_head_reads_one_position_a_prompt(model: LanguageModel) -> None:
    seen: list[Any] = []
    handle = model.network.lm_head.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    model.next_token_logits(model.tokenize(TEXTS), [5], batch_tokens=1000)
    handle.remove()
    assert seen == [(5, 1, len(lm.VOCABULARY) + 1)]


def test_bfloat16_weights_give_float32_logits(causal: Path) -> None:
    """The product of the last hidden state and the head's rows, not rounded to bfloat16 again."""
    import torch

    model = LanguageModel.load(causal, precision="bfloat16")
    (prompt,) = model.tokenize(["w1 w2 w3"])
    wanted = list(range(20, 60))
    found = model.next_token_logits([prompt], wanted, batch_tokens=100)[0]
    with torch.inference_mode():
        hidden = model.network.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1].float()
        expected = model.network.lm_head.weight[wanted].float() @ hidden
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(found - torch.tensor(found).bfloat16().float().numpy()).max() > 1e-3
    assert (model.dtype, found.dtype) == ("bfloat16", np.float32)


def test_special_tokens(model: LanguageModel, t5: Path) -> None:
    """``<s>`` once, from the tokenizer or from the chat template; ``</s>`` behind the text of a T5."""
    assert model.rendered(MESSAGES, "[") == "<s><|system|>rank<|end|><|user|>w1 w2<|end|><|assistant|>["
    chat, raw = model.tokenize([MESSAGES, "w1 w2"], "[")
    words = model.tokenizer.convert_ids_to_tokens
    assert words(chat) == [
        "<s>",
        "<|system|>",
        "rank",
        "<|end|>",
        "<|user|>",
        "w1",
        "w2",
        "<|end|>",
        "<|assistant|>",
        "[",
    ]
    assert words(raw) == ["<s>", "w1", "w2", "["]
    reader = LanguageModel.load(t5)
    assert reader.tokenizer.convert_ids_to_tokens(reader.tokenize(["w1 w2"])[0]) == ["w1", "w2", "</s>"]


def test_nothing_stands_between_a_prompt_and_its_answer(t5: Path, tmp_path: Path) -> None:
    """``</s>`` that a tokenizer adds is an encoder's; a causal model would be asked what follows its own end."""
    model = LanguageModel.load(lm.make_causal(tmp_path, lm.word_tokenizer(ends=True)))
    words = model.tokenizer.convert_ids_to_tokens
    assert model.tokenizer("w1")["input_ids"] == model.tokenizer.convert_tokens_to_ids(["w1", "</s>"])
    assert [words(ids) for ids in model.tokenize(["w1 w2", "w3 </s>"], "[")] == [["w1", "w2", "["], ["w3", "</s>", "["]]
    assert words(LanguageModel.load(t5).tokenize(["w1 </s>"])[0]) == ["w1", "</s>", "</s>"]


def test_special_tokens_in_a_text_of_others(model: LanguageModel, tmp_path: Path) -> None:
    assert model.ordinary("w1</s> <s <|end|>w2<|user|>") == "w1< /s> <s < |end|>w2< |user|>"
    bytes_model = LanguageModel.load(lm.make_causal(tmp_path, lm.byte_tokenizer()))
    for one in (model, bytes_model):
        special = set(one.tokenizer.all_special_ids) - {one.tokenizer.unk_token_id}
        for text in ("<|end|>", "<|e<|end|>nd|>", "<s></s>", "a</s><|user|>", "<|user|>\n" * 3):
            assert special & set(one.tokenize(["w1 " + text])[0][1:]), text
            assert not special & set(one.tokenize(["w1 " + one.ordinary(text)])[0][1:]), text


def test_special_tokens_that_a_normalizer_makes(causal: Path) -> None:
    """A unigram model as T5's finds ``</s>`` in its vocabulary after full-width signs became plain ones."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((sign, -5.0) for sign in "</s> ")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    loaded = LanguageModel.load(causal)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    model = LanguageModel(loaded.source, loaded.network, made)
    wide = "\uff1c/s\uff1e"
    assert made.convert_ids_to_tokens(model.tokenize([wide])[0]) == ["</s>"]
    assert "".join(made.convert_ids_to_tokens(model.tokenize([model.ordinary(wide)])[0])) == "< /s>"
    assert model.ordinary("\uff1cs") == "\uff1cs"


def test_special_tokens_that_overlap(causal: Path) -> None:
    tokenizer = lm.word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a><", "><b>"]})
    loaded = LanguageModel.load(causal)
    assert LanguageModel(loaded.source, loaded.network, tokenizer).ordinary("<a><b>") == "< a> <b>"


def test_chat_templates_that_cannot_be_used(t5: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no chat template, .* take a chat model, or a prompt with text:"):
        LanguageModel.load(t5).tokenize([MESSAGES])
    model = LanguageModel.load(lm.make_causal(tmp_path, lm.word_tokenizer(chat=lm.NO_SYSTEM)))
    with pytest.raises(InputError, match=r"refuses the prompt \(roles: system, user\): no system role"):
        model.tokenize([MESSAGES])


def test_token_ends(model: LanguageModel) -> None:
    assert [ends.tolist() for ends in model.token_ends(["w1 w22", "", "12"])] == [[2, 6], [], [1, 2]]
    assert model.token_ends([]) == []


def test_answer_token(model: LanguageModel) -> None:
    words = model.tokenizer.convert_tokens_to_ids
    assert model.answer_token("rank [", "A", "…") == words("A")
    with pytest.raises(InputError, match=r"'12' is 2 tokens \(1 2\) of model '.*', not one; use letters"):
        model.answer_token("rank [", "12", "use letters")
    with pytest.raises(InputError, match=r"'maybe' is unknown to the tokenizer"):
        model.answer_token("", "maybe", "take another")


def test_continuation_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    """`` > [2]`` is tokenized as inside the whole answer; what is joined with the text before falls back."""
    tokenizer = lm.byte_tokenizer()
    model = LanguageModel.load(lm.make_causal(tmp_path, tokenizer))
    pieces = [model.continuation("<|assistant|>[", "1]"), model.continuation("<|assistant|>[1]", " > [12]")]
    whole = tokenizer("[1] > [12]", add_special_tokens=False)["input_ids"]
    assert [token for piece in pieces for token in piece] == whole[1:]
    assert len(tokenizer("w1", add_special_tokens=False)["input_ids"]) == 2
    joined = tokenizer("1", add_special_tokens=False)["input_ids"]
    assert model.continuation("w", "1") == joined


@pytest.mark.parametrize("name", ["causal", "t5"])
def test_greedy_answers_are_those_of_one_by_one(name: str, request: pytest.FixtureRequest) -> None:
    """Batched with padding; an encoder-decoder gets its mask too. The model's own sampling is not used."""
    path: Path = request.getfixturevalue(name)
    network, tokenizer = lm.plain(path)
    model = LanguageModel.load(path)
    prompts = model.tokenize(TEXTS)
    found = model.generate(prompts, max_new_tokens=12, batch_tokens=1000)
    expected = [lm.greedy(network, ids, 12) for ids in prompts]
    assert found == [tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]
    assert len(set(found)) > 1


def test_a_models_own_generation_settings_are_not_used(causal: Path, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    network, tokenizer = lm.plain(causal)
    network.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=[2, 3]
    )
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = LanguageModel.load(tmp_path)
    expected = LanguageModel.load(causal)
    prompts = model.tokenize(TEXTS)
    answers = [one.generate(prompts, max_new_tokens=8, batch_tokens=1000) for one in (model, expected)]
    assert answers[0] == answers[1]


class Only:
    """Allows ``yes`` or ``no``, then ``[``."""

    def __init__(self, model: LanguageModel) -> None:
        first, second, third = model.tokenizer.convert_tokens_to_ids(["yes", "no", "["])
        self.tokens = [first, second, third]
        self.answer: list[int] = []

    def allowed(self) -> list[int]:
        return [self.tokens[:2], self.tokens[2:], []][min(2, len(self.answer))]

    def advance(self, token: int) -> None:
        self.answer.append(token)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_constrained_answers(precision: Any, causal: Path) -> None:
    model = LanguageModel.load(causal, precision=precision)
    prompts = model.tokenize(TEXTS)
    found = model.generate(prompts, max_new_tokens=9, batch_tokens=1000, constraints=[Only(model) for _ in prompts])
    yes_no = model.next_token_logits(prompts, Only(model).tokens[:2], 1000)
    assert found == [f"{'yes' if row[0] > row[1] else 'no'} [" for row in yes_no]


def test_nan(tmp_path: Path) -> None:
    """NaN logits come out as NaN; an answer made from them would mean nothing."""
    model = LanguageModel.load(lm.spoil(lm.make_causal(tmp_path), "w7"))
    prompts = model.tokenize(TEXTS[:2])
    assert np.isnan(model.next_token_logits(prompts, [5, 6], 100)).tolist() == [[False] * 2, [True] * 2]
    with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
        model.generate(prompts, max_new_tokens=2, batch_tokens=100)


def test_logits_that_are_no_numbers() -> None:
    """Minus infinity is an answer (a token nobody uses), plus infinity and NaN are none."""
    import torch

    usual = torch.tensor([[0.0, -torch.inf]])
    assert Rule(None, 0)(None, usual) is usual
    for value in (torch.inf, torch.nan):
        with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
            Rule(None, 0)(None, torch.tensor([[0.0, value]]))


def test_models_that_cannot_be_used(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no trained language model: its files lack \d+ weights"):
        LanguageModel.load(tiny.make_transformer(tmp_path / "bert"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(InputError, match="cannot be loaded as a language model"):
        LanguageModel.load(tmp_path / "other")
    model.check_length(512)
    with pytest.raises(InputError, match=r"max_length 513 is more than the 512 tokens"):
        model.check_length(513)
