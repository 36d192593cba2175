"""Tiny random language models with tiny tokenizers: causal (Qwen3, GPT-2) and encoder-decoder (T5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import tiny

from retrieval_kd.models.language_model import LanguageModel

CHAT = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = [
    *SPECIAL,
    *"[]>.:<",
    *"0123456789",
    *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *("yes", "no", "true", "false", "query", "rank", "Relevant", "Instruct"),
    *tiny.WORDS,
]


def word_tokenizer(*, pad: bool = True, chat: str | None = CHAT, side: str = "left", ends: bool = False) -> Any:
    """One token a word, a sign or a digit (``12`` is two, ``w12`` one).

    Raw text begins with ``<s>``, or ``ends`` with ``</s>``.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*VOCABULARY, "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[A-Za-z]\w*|\d|[^\w\s]"), behavior="isolated"),
        ]
    )
    template, name = ("$A </s>", "</s>") if ends else ("<s> $A", "<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(name, vocabulary[name])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        additional_special_tokens=SPECIAL[3:],
        padding_side=side,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = chat
    return made


def byte_tokenizer() -> Any:
    """A byte-level BPE that was trained on a few answers, as those of large models: ``] >`` and `` [`` have tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answers = [f"[{i}] > [{i + 1}] > [{i + 2}]" for i in range(1, 30)]
    tokenizer.train_from_iterator([*answers, *(f"{word} w1 w2 café" for word in tiny.WORDS)], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[3:]
    )
    made.chat_template = CHAT
    return made


def make_causal(folder: Path, tokenizer: Any = None, *, architecture: str = "qwen3", length: int = 512) -> Path:
    """A directory with a random causal model of 16 dimensions that reads ``length`` tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    tokenizer = tokenizer or word_tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    if architecture == "gpt2":
        network: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=length,
                n_embd=16,
                n_layer=2,
                n_head=2,
                initializer_range=0.5,
                **ends,
            )
        )
    else:
        network = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=length,
                initializer_range=0.5,
                **ends,
            )
        )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_encoder_decoder(folder: Path) -> Path:
    """A directory with a random T5 of 16 dimensions."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = word_tokenizer(ends=True, chat=None)
    torch.manual_seed(0)
    network = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=2,
            decoder_start_token_id=tokenizer.pad_token_id,
            initializer_factor=3.0,
        )
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spoil(folder: Path, word: str) -> Path:
    """The model with NaN in the input embedding of ``word`` (of a causal model with untied embeddings)."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][VOCABULARY.index(word)] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def asked(model: LanguageModel) -> Iterator[list[list[int]]]:
    """Inside, the prompts whose next token ``model`` is asked for are added to a list."""
    prompts: list[list[int]] = []
    answer = model.next_token_logits

    def noting(given: Sequence[Sequence[int]], *arguments: Any) -> Any:
        prompts.extend(list(ids) for ids in given)
        return answer(given, *arguments)

    with mock.patch.object(model, "next_token_logits", noting):
        yield prompts


def special_tokens(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """The special tokens among ``ids``, but for unknown words."""
    special = set(model.tokenizer.all_special_ids) - {model.tokenizer.unk_token_id}
    return list(model.tokenizer.convert_ids_to_tokens([token for token in ids if token in special]))


def plain(folder: Path) -> tuple[Any, Any]:
    """The network, float32 and in evaluation mode, and the tokenizer, without this package."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    network = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder)
    return network.float().eval(), AutoTokenizer.from_pretrained(folder)


def next_logits(network: Any, ids: list[int], answer: list[int] | None = None) -> Any:
    """Logits [vocabulary] after one prompt and the beginning of an answer, by one plain forward pass."""
    import torch

    answer = answer or []
    with torch.inference_mode():
        if network.config.is_encoder_decoder:
            start = torch.tensor([[network.config.decoder_start_token_id, *answer]])
            return network(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0, -1]
        return network(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1]


def greedy(network: Any, ids: list[int], steps: int, end: int = 2) -> list[int]:
    """The greedy answer of one prompt, step by step, without its end."""
    answer: list[int] = []
    while len(answer) < steps:
        token = int(next_logits(network, ids, answer).argmax())
        if token == end:
            break
        answer.append(token)
    return answer
