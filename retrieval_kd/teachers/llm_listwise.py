"""A language model as listwise teacher: it puts windows of passages in order, and the final rank is the score.

``permutation`` writes the whole order, ``[2] > [1] > …`` (RankGPT, Sun et al. 2023, arXiv 2304.09542; RankZephyr,
arXiv 2312.02724). ``first-token`` reads it off the logits of the first identifier (FIRST, Reddy et al. 2024, arXiv
2406.15657): one forward pass a window. Scores of different windows cannot be compared, so that only ranks are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.errors import InputError
from retrieval_kd.models.decoding import NOT_FINITE
from retrieval_kd.models.language_model import LanguageModel
from retrieval_kd.models.window_prompts import WindowPrompts
from retrieval_kd.teachers.base import Candidates, Scored, ScoringJob
from retrieval_kd.teachers.llm import LLMRecipe, LLMTeacher, refuse_long_queries
from retrieval_kd.teachers.prompted import prompt_of
from retrieval_kd.teachers.windows import Window, WindowKeys, parse_permutation, rank_scores


class LLMListwiseTeacher(LLMTeacher):
    """Scores by minus the rank that a language model gives, or minus the mean of its ranks over shuffles."""

    independent = False

    class Recipe(LLMRecipe, WindowKeys):
        """Keys of ``kind: llm-listwise``."""

        kind: Literal["llm-listwise"]
        decoding: Literal["permutation", "first-token"] = "permutation"
        constrained: bool = True
        """Permutation: only tokens of a valid answer are written. Otherwise answers are free, and repaired."""
        max_length: int = Field(default=4096, ge=16)
        """Tokens of a prompt and its answer; passages are cut alike where they do not fit."""
        pairs_per_shard: int = Field(default=2000, ge=1)

        @model_validator(mode="after")
        def _free_answers_are_permutations(self) -> Self:
            if self.decoding == "first-token" and not self.constrained:
                raise ValueError("constrained: false goes with decoding: permutation only")
            return self

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.prompt = prompt_of(recipe, "listwise")
        self._names = self.prompt.identifiers_of(recipe.window)

    @property
    def score_kind(self) -> str:
        """``rank``: minus a rank."""
        return "rank"

    def refuse(self, model: LanguageModel) -> None:
        """Raises `InputError` for an encoder-decoder whose answer would have to begin with given text."""
        if model.encoder_decoder and (self.recipe.decoding == "first-token" or self.prompt.answer_start):
            raise InputError(
                f"model '{self.source.name}' is an encoder-decoder, whose answer cannot be begun with '['; "
                "use decoding: permutation and a prompt without answer_start:"
            )

    def details(self) -> dict[str, Any]:
        """What the model is, and how windows were put in order."""
        return {**super().details(), "decoding": self.recipe.decoding}

    def prepare(self, job: ScoringJob) -> None:
        """Raises `InputError` for queries that leave no room for passages."""
        refuse_long_queries(job, self._excess)

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """Minus ranks. The windows of all lists that can be put in order at the same time are batched together.

        What a passage loses to its number of words counts, and then what it loses in the window that cuts it most.
        """
        queries = [self.model.ordinary(query.text) for query in shard]
        texts = [[self.model.ordinary(text) for text in of_query] for of_query in texts]
        passages = [[self._prompts.passage(text) for text in of_query] for of_query in texts]
        by_words = [self._prompts.tokens_of_words_lost(of_query) for of_query in texts]
        by_windows = [np.zeros(len(of_query), dtype=np.int32) for of_query in texts]
        counts: Counter[str] = Counter()

        def order_windows(windows: list[Window]) -> list[list[int]]:
            fitted = self._prompts.fitted(
                [queries[window.list] for window in windows],
                [[passages[window.list][member] for member in window.members] for window in windows],
                max_length=self._prompt_length,
                names=[f"query '{shard[window.list].query_id}'" for window in windows],
            )
            for window, lost in zip(windows, fitted.tokens_lost, strict=True):
                of_list = by_windows[window.list]
                of_list[window.members] = np.maximum(of_list[window.members], lost)
            counts["windows"] += len(windows)
            sizes = [len(window.members) for window in windows]
            if self.recipe.decoding == "first-token":
                return self._by_logits(fitted.tokens, sizes)
            orders, malformed = self._by_answers(fitted.tokens, sizes)
            counts["malformed_answers"] += malformed
            return orders

        scores = rank_scores(shard, self.recipe, order_windows, show_single=True)
        self.counts.update(counts)
        return Scored(scores, [words + windows for words, windows in zip(by_words, by_windows, strict=True)])

    def _excess(self, queries: Sequence[Candidates]) -> list[int]:
        """By how many tokens each query's largest window is too long without the texts of its passages."""
        texts = [self.model.ordinary(query.text) for query in queries]
        sizes = [min(self.recipe.window, len(query.rows)) for query in queries]
        return [length - self._prompt_length for length in self._prompts.lengths_without_texts(texts, sizes)]

    def _by_logits(self, prompts: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]]:
        logits = self.model.next_token_logits(prompts, self._identifier_tokens, self.recipe.batch_tokens)
        if not np.isfinite(logits).all():
            raise FloatingPointError(NOT_FINITE)
        return [np.argsort(-row[:size], kind="stable").tolist() for row, size in zip(logits, sizes, strict=True)]

    def _by_answers(self, prompts: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[list[list[int]], int]:
        """The orders, and how many of them had to be repaired."""
        rules = [PermutationRule(self._first[:size], self._later[:size]) for size in sizes]
        answers = self.model.generate(
            prompts,
            max_new_tokens=self._answer_tokens,
            batch_tokens=self.recipe.batch_tokens,
            constraints=rules if self.recipe.constrained else None,
        )
        if self.recipe.constrained:
            return [rule.order for rule in rules], 0
        parsed = [
            parse_permutation(self._prompts.answer_start + answer, self._names[:size])
            for answer, size in zip(answers, sizes, strict=True)
        ]
        return [order for order, _ in parsed], sum(repaired for _, repaired in parsed)

    @cached_property
    def _prompts(self) -> WindowPrompts:
        """Answers begin with ``[``, but for free answers and for an encoder-decoder."""
        return WindowPrompts(
            self.model, self.prompt, bracket=self.recipe.constrained and not self.model.encoder_decoder
        )

    @cached_property
    def _identifier_tokens(self) -> list[int]:
        mend = "take a prompt with identifiers: letters and at most 26 passages, or decoding: permutation"
        return self._prompts.identifier_tokens(self._names, mend)

    @cached_property
    def _first(self) -> list[list[int]]:
        """The tokens of each identifier at the beginning of an answer."""
        return [self.model.continuation(self._prompts.before, self._beginning(name)) for name in self._names]

    @cached_property
    def _later(self) -> list[list[int]]:
        """The tokens of each identifier further on, with those that separate it from the one before."""
        before = self._prompts.before + self._beginning(self._names[0])
        tokens = [self.model.continuation(before, f" > [{name}]") for name in self._names]
        if len({tuple(of_name) for of_name in tokens}) < len(tokens):
            raise InputError(f"identifiers look the same to the tokenizer of model '{self.source.name}'; use letters")
        return tokens

    def _beginning(self, name: str) -> str:
        return f"{name}]" if self._prompts.answer_start.endswith("[") else f"[{name}]"

    @cached_property
    def _answer_tokens(self) -> int:
        """The most tokens of an answer, its end included."""
        return max(len(tokens) for tokens in self._first) + sum(len(tokens) for tokens in self._later) + 1

    @cached_property
    def _prompt_length(self) -> int:
        """The tokens that are left for a prompt."""
        if self.recipe.decoding == "first-token":
            return self.recipe.max_length
        left = self.recipe.max_length - self._answer_tokens
        if left < 1:
            raise InputError(
                f"max_length {self.recipe.max_length} leaves no room for a prompt: an answer that lists "
                f"{self.recipe.window} passages is {self._answer_tokens} tokens; raise max_length or lower window"
            )
        return left


class PermutationRule:
    """Which tokens may follow in an answer that lists every passage of a window once; the order it gives."""

    def __init__(self, first: Sequence[Sequence[int]], later: Sequence[Sequence[int]]) -> None:
        """Tokens of each passage's identifier when it comes ``first``, and when it comes ``later``."""
        self.tokens = [token for names in (first, later) for name in names for token in name]
        self.order: list[int] = []
        self._later = later
        self._open = dict(enumerate(first))
        """Passages that the answer may be naming → tokens of their identifier that are still to come."""

    def allowed(self) -> list[int]:
        """The tokens that may come next; none when every passage is listed."""
        return sorted({tokens[0] for tokens in self._open.values()})

    def advance(self, token: int) -> None:
        """Takes note of the token that came; the last passage that is left needs none."""
        self._open = {passage: tokens[1:] for passage, tokens in self._open.items() if tokens[0] == token}
        named = [passage for passage, tokens in self._open.items() if not tokens]
        if named:
            self.order.append(named[0])
            left = [passage for passage in range(len(self._later)) if passage not in self.order]
            if len(left) == 1:
                self.order += left
                left = []
            self._open = {passage: self._later[passage] for passage in left}
