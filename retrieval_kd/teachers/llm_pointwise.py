"""A language model as pointwise teacher: how much likelier its yes than its no, as log-odds.

monoT5 (Nogueira et al. 2020, arXiv 2003.06713) and Qwen3-Reranker (arXiv 2506.05176) are asked so; the log-odds are
kept and not the probability, which saturates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field

from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.models.language_model import LanguageModel, PromptText
from retrieval_kd.models.prompt_fitting import fit_prompts
from retrieval_kd.teachers.base import Candidates, Scored, ScoringJob
from retrieval_kd.teachers.llm import LLMRecipe, LLMTeacher, refuse_long_queries
from retrieval_kd.teachers.prompted import prompt_of


class LLMPointwiseTeacher(LLMTeacher):
    """Scores by logit(positive) − logit(negative) of the first token of the answer."""

    class Recipe(LLMRecipe):
        """Keys of ``kind: llm-pointwise``."""

        kind: Literal["llm-pointwise"]
        pairs_per_shard: int = Field(default=1024, ge=1)

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.prompt = prompt_of(recipe, "pointwise")
        if self.prompt.grades is not None:
            raise RecipeError(
                f"prompt '{recipe.prompt}' asks for a grade, which kind llm-pointwise does not read; "
                "take one with positive: and negative:, or kind: api"
            )

    @property
    def score_kind(self) -> str:
        """``log_odds``."""
        return "log_odds"

    def refuse(self, model: LanguageModel) -> None:
        """Raises `InputError` for an encoder-decoder whose answer would have to begin with given text."""
        if model.encoder_decoder and self.prompt.answer_start:
            raise InputError(f"model '{self.source.name}' is an encoder-decoder: answer_start: cannot begin its answer")

    def prepare(self, job: ScoringJob) -> None:
        """Raises `InputError` for queries that leave no room for a document."""
        refuse_long_queries(job, self._excess)

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """Log-odds, NaN where the model gives NaN; prompts of similar length share a batch."""
        names = [f"query '{query.query_id}'" for query, of_query in zip(shard, texts, strict=True) for _ in of_query]
        queries = [query for query, of_query in zip(self._queries(shard), texts, strict=True) for _ in of_query]
        fitted = fit_prompts(
            self.model,
            lambda i, documents: self._rendered(queries[i], documents[0]),
            [[self.model.ordinary(text)] for of_query in texts for text in of_query],
            max_length=self.recipe.max_length,
            answer_start=self.prompt.answer_start,
            names=names,
        )
        logits = self.model.next_token_logits(fitted.tokens, self._answers, self.recipe.batch_tokens)
        bounds = np.cumsum([len(of_query) for of_query in texts])[:-1]
        log_odds = logits[:, 0] - logits[:, 1]
        return Scored(np.split(log_odds, bounds), np.split(np.concatenate(fitted.tokens_lost), bounds))

    def _queries(self, shard: Sequence[Candidates]) -> list[str]:
        return [self.model.ordinary(query.text) for query in shard]

    def _excess(self, queries: Sequence[Candidates]) -> list[int]:
        """By how many tokens each query's prompt without a document is too long."""
        prompts = [self._rendered(query, "") for query in self._queries(queries)]
        return [len(ids) - self.recipe.max_length for ids in self.model.tokenize(prompts, self.prompt.answer_start)]

    def _rendered(self, query: str, document: str) -> PromptText:
        return self.prompt.pointwise(query, document, self.recipe.instruction)

    @cached_property
    def _answers(self) -> list[int]:
        """The tokens of the positive and the negative answer where they follow the prompt."""
        before = self.model.rendered(self._rendered("", ""), self.prompt.answer_start)
        mend = "take answers of one token in the prompt"
        positive, negative = (
            self.model.answer_token(before, str(answer), mend)
            for answer in (self.prompt.positive, self.prompt.negative)
        )
        if positive == negative:
            raise InputError(
                f"'{self.prompt.positive}' and '{self.prompt.negative}' are the same token of model "
                f"'{self.source.name}'; {mend}"
            )
        return [positive, negative]
