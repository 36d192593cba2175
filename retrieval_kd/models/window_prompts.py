"""Windows of passages as prompts for a language model: what it is trained on is byte for byte what ranks later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from retrieval_kd.models.language_model import LanguageModel
from retrieval_kd.models.prompt_fitting import Fitted, fit_prompts
from retrieval_kd.models.prompts import Prompt


class WindowPrompts:
    """How a listwise prompt shows windows of passages to one model, and what the model's answers begin with."""

    def __init__(self, model: LanguageModel, prompt: Prompt, *, bracket: bool = True) -> None:
        """With ``bracket`` every answer is made to begin with ``[``; else as the prompt says."""
        self.model = model
        self.prompt = prompt
        start = prompt.answer_start
        self.answer_start = start + "[" if bracket and not start.endswith("[") else start

    def passage(self, text: str) -> str:
        """An `ordinary` text as a window shows it where there is room: cut to the words that the prompt allows."""
        return " ".join(text.split()[: self.prompt.passage_words])

    def tokens_of_words_lost(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [n]: the tokens that each text loses as a `passage`."""
        lost = np.zeros(len(texts), dtype=np.int32)
        long = [i for i, text in enumerate(texts) if len(text.split()) > (self.prompt.passage_words or np.inf)]
        whole = self.model.token_ends([" ".join(texts[i].split()) for i in long])
        kept = self.model.token_ends([self.passage(texts[i]) for i in long])
        lost[long] = [len(before) - len(after) for before, after in zip(whole, kept, strict=True)]
        return lost

    def fitted(
        self, queries: Sequence[str], passages: Sequence[Sequence[str]], *, max_length: int, names: Sequence[str]
    ) -> Fitted:
        """The prompt of each query and its window in at most ``max_length`` tokens (see `fit_prompts`)."""
        return fit_prompts(
            self.model,
            lambda i, shown: self.prompt.listwise(queries[i], shown),
            passages,
            max_length=max_length,
            answer_start=self.answer_start,
            names=names,
        )

    def lengths_without_texts(self, queries: Sequence[str], sizes: Sequence[int]) -> list[int]:
        """The tokens of each query's prompt with a window of so many empty passages."""
        prompts = [self.prompt.listwise(query, [""] * size) for query, size in zip(queries, sizes, strict=True)]
        return [len(ids) for ids in self.model.tokenize(prompts, self.answer_start)]

    @cached_property
    def before(self) -> str:
        """The text of some prompt, behind which identifiers are tokenized."""
        return self.model.rendered(self.prompt.listwise("", ["", ""]), self.answer_start)

    def identifier_tokens(self, names: Sequence[str], mend: str) -> list[int]:
        """The one token of each identifier at the beginning of an answer. Else the `InputError` ends in ``mend``."""
        return [self.model.answer_token(self.before, name, mend) for name in names]

    def answer(self, names: Sequence[str]) -> list[int]:
        """The tokens of an answer that gives this order, its end included; identifiers must be one token each.

        The first is the identifier's own, whatever the tokenizer would join it with: its logits rank a window.
        """
        first, rest = names[0], "".join(f"] > [{name}" for name in names[1:]) + "]"
        token = self.model.continuation(self.before, first)
        return [*token, *self.model.continuation(self.before + first, rest), self.model.end]
