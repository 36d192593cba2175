"""A language model on this machine: prompts in, the logits of a few next tokens or a greedy answer out."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError
from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.decoding import Constraint, Rule, in_float32, reading_at
from retrieval_kd.models.encoder import quiet_loading
from retrieval_kd.models.load import ModelSource, find_model

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PromptText = str | Sequence[Mapping[str, str]]
"""Raw text, or the messages of a chat (``role``, ``content``)."""


class LanguageModel:
    """A causal or an encoder-decoder language model with its tokenizer, on the GPU where there is one."""

    def __init__(self, source: ModelSource, network: Any, tokenizer: Any) -> None:
        from transformers import GenerationConfig

        self.source = source
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.encoder_decoder = bool(network.config.is_encoder_decoder)
        self._takes_positions = "position_ids" in inspect.signature(network.forward).parameters
        own = network.generation_config
        eos = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        ends = list(eos) if isinstance(eos, list) else [eos]
        pads = (tokenizer.pad_token_id, ends[0], tokenizer.unk_token_id, 0)
        self._pad: int = next(token for token in pads if token is not None)  # always behind an attention mask
        self.end: int = self._pad if ends[0] is None else ends[0]
        """The token that ends an answer."""
        self._decoder_start = own.decoder_start_token_id
        network.generation_config = GenerationConfig(  # a model's own may sample, or punish repetition
            eos_token_id=eos, pad_token_id=self._pad, decoder_start_token_id=self._decoder_start
        )

    @classmethod
    def load(
        cls, spec: str | Path | ModelSource, *, revision: str | None = None, precision: Precision = "auto"
    ) -> LanguageModel:
        """The model called ``spec`` (see `find_model`). ``auto`` is bfloat16 on a GPU that has it, else float32.

        Raises `InputError` for what is no language model, or has no fast tokenizer.
        """
        source = spec if isinstance(spec, ModelSource) else find_model(spec, revision)
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        try:
            with quiet_loading():
                config = AutoConfig.from_pretrained(source.path)
                head = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
                network, report = head.from_pretrained(
                    source.path, config=config, dtype=getattr(torch, precision), output_loading_info=True
                )
                tokenizer = AutoTokenizer.from_pretrained(source.path)
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"model '{source.name}' cannot be loaded as a language model: {reason}") from error
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"model '{source.name}' is no trained language model: its files lack {len(missing)} weights "
                f"(first: {missing[0]})"
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"model '{source.name}' has no fast tokenizer (a tokenizer.json), which counts tokens here"
            )
        return cls(source, network.to(device), tokenizer)

    def ref(self) -> InputRef:
        """The model as an artifact's input."""
        return self.source.ref()

    def save(self, folder: Path) -> None:
        """Writes the network, its tokenizer and the generation settings it came with, as transformers does."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        own = self.source.path / "generation_config.json"
        if own.is_file():
            shutil.copyfile(own, folder / own.name)

    @property
    def dtype(self) -> str:
        """The precision of the weights; the logits of `next_token_logits` are float32 in any case."""
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def usual_batch_tokens(self) -> int:
        """Padded tokens of a batch: many for a GPU; a CPU wins nothing by more, and loses by padding."""
        return 2048 if self.network.device.type == "cpu" else 16384

    def check_length(self, max_length: int, answer: int = 0) -> None:
        """Raises `InputError` when ``max_length`` and an ``answer`` are more than the model has positions for."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and max_length + answer > limit:
            beside = f" and an answer of {answer}" if answer else ""
            raise InputError(
                f"max_length {max_length}{beside} is more than the {limit} tokens model '{self.source.name}' reads"
            )

    def rendered(self, prompt: PromptText, answer_start: str = "") -> str:
        """The text that is tokenized: messages in the model's chat template, then the beginning of its answer.

        A model that can think first is told not to: its answer is read at once.
        """
        if isinstance(prompt, str):
            return prompt + answer_start
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"model '{self.source.name}' has no chat template, which a prompt with messages: needs; "
                "take a chat model, or a prompt with text:"
            )
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in prompt))
            raise InputError(
                f"the chat template of model '{self.source.name}' refuses the prompt (roles: {roles}): {error}; "
                "take a prompt without these roles"
            ) from error
        return str(text) + answer_start

    def tokenize(self, prompts: Sequence[PromptText], answer_start: str = "") -> list[list[int]]:
        """The token ids of each prompt, nothing cut.

        Raw text gets the tokenizer's special tokens (T5's ``</s>``), but for those that would stand between a causal
        model's prompt and its answer; a chat template brings its own.
        """
        tokens: list[list[int]] = [[] for _ in prompts]
        for raw in (True, False):
            of_kind = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str) == raw]
            texts = [self.rendered(prompts[i], answer_start) for i in of_kind]
            for i, ids in zip(of_kind, self._ids(texts, special=raw), strict=True):
                tokens[i] = ids[: len(ids) - self._closing] if raw else ids
        return tokens

    def ordinary(self, text: str) -> str:
        """``text`` in which nothing is a special token: each such string (``</s>``) has a space behind its first sign.

        For what others wrote, a query or a document; a prompt's own text keeps its special tokens.
        """
        if self._specials is None:
            return text
        text = self._specials.sub(r"\g<0> ", text)
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is not None:  # T5's makes ``</s>`` of full-width signs
            normal = normalizer.normalize_str(text)
            if self._specials.search(normal):
                return self._specials.sub(r"\g<0> ", normal)
        return text

    def token_ends(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text the positions [tokens] where its tokens end: ``text[:ends[k - 1]]`` is its first k tokens."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        offsets = self.tokenizer(list(texts), **options)["offset_mapping"]
        return [np.array([end for _, end in of_text], dtype=np.int64) for of_text in offsets]

    def continuation(self, before: str, text: str) -> list[int]:
        """The token ids of ``text`` where it follows ``before``, the text of a prompt.

        They may differ from those of ``text`` alone, which are given where the tokenizer joins the two. The answer
        of an encoder-decoder follows nothing.
        """
        start, whole, alone = self._ids(["" if self.encoder_decoder else before, before + text, text], special=False)
        if not self.encoder_decoder and len(whole) > len(start) and whole[: len(start)] == start:
            return whole[len(start) :]
        return alone

    def answer_token(self, before: str, answer: str, mend: str) -> int:
        """The one token of ``answer`` after ``before``. When it is more, the `InputError` ends in ``mend``."""
        ids = self.continuation(before, answer)
        pieces = " ".join(self.tokenizer.convert_ids_to_tokens(ids))
        if len(ids) != 1:
            raise InputError(
                f"'{answer}' is {len(ids)} tokens ({pieces}) of model '{self.source.name}', not one; {mend}"
            )
        if ids[0] == self.tokenizer.unk_token_id:
            raise InputError(f"'{answer}' is unknown to the tokenizer of model '{self.source.name}'; {mend}")
        return ids[0]

    def next_token_logits(
        self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int], batch_tokens: int | None = None
    ) -> np.ndarray:
        """Logits [n, len(token_ids)] float32 of the token after each prompt, or of an encoder-decoder's first token.

        Batches hold at most ``batch_tokens`` tokens (`usual_batch_tokens` when not given), padded on the tokenizer's
        side. The head reads one position a prompt, and the rows of ``token_ids`` are multiplied in float32 whatever
        the precision of the weights.
        """
        import torch

        logits = np.empty((len(prompts), len(token_ids)), dtype=np.float32)
        left = self.tokenizer.padding_side == "left"
        for batch in token_batches([len(prompt) for prompt in prompts], batch_tokens or self.usual_batch_tokens):
            inputs = self._padded([prompts[i] for i in batch], left=left)
            mask = inputs["attention_mask"]
            if self.encoder_decoder:
                inputs["decoder_input_ids"] = mask.new_full((len(batch), 1), self._decoder_start)
                last = mask.new_zeros(len(batch))
            else:
                last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
                if self._takes_positions:
                    inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
            with torch.inference_mode(), reading_at(self.network, last[:, None]), in_float32(self.network, token_ids):
                found = self.network(**inputs, use_cache=False).logits[:, 0, list(token_ids)]
            logits[batch] = found.float().cpu().numpy()
        return logits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_tokens: int | None = None,
        constraints: Sequence[Constraint] | None = None,
    ) -> list[str]:
        """The greedy answer to each prompt, without special tokens; with ``constraints`` one of each prompt's own.

        A complete constraint ends its answer. Raises `FloatingPointError` when a logit is NaN.
        """
        import torch

        answers = [""] * len(prompts)
        for batch in token_batches([len(prompt) for prompt in prompts], batch_tokens or self.usual_batch_tokens):
            inputs = self._padded([prompts[i] for i in batch], left=not self.encoder_decoder)
            chosen = None if constraints is None else [constraints[i] for i in batch]
            with torch.inference_mode(), in_float32(self.network, {t for one in chosen or () for t in one.tokens}):
                found = self.network.generate(
                    **inputs, max_new_tokens=max_new_tokens, logits_processor=[Rule(chosen, self.end)]
                )
            new = found[:, 1 if self.encoder_decoder else inputs["input_ids"].shape[1] :]
            for i, answer in zip(batch, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = answer
        return answers

    @cached_property
    def _closing(self) -> int:
        """How many tokens the tokenizer puts behind a raw text that are to be left out: a causal model's ``</s>``."""
        if self.encoder_decoder:
            return 0
        added = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return [*reversed(added), 0].index(0)

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        """The first sign of each special token in a text, overlapping ones too."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        ends: dict[str, list[str]] = {}
        for name in sorted(names):
            if len(name) > 1:
                ends.setdefault(name[0], []).append(re.escape(name[1:]))
        patterns = [f"{re.escape(sign)}(?={'|'.join(of_sign)})" for sign, of_sign in ends.items()]
        return re.compile("|".join(patterns)) if patterns else None

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _padded(self, prompts: Sequence[Sequence[int]], *, left: bool) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` [n, longest], padded on one side."""
        import torch

        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
            ids[row, place] = torch.tensor(prompt, dtype=ids.dtype)
            mask[row, place] = 1
        return {"input_ids": ids.to(self.network.device), "attention_mask": mask.to(self.network.device)}
