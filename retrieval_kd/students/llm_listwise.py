"""A language model that ranks a window of passages by its first token (FIRST), fine-tuned on a teacher's orders."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.losses.terms import LossTerm, RankNet
from retrieval_kd.models.language_model import LanguageModel
from retrieval_kd.models.prompts import load_prompt, prompt_for
from retrieval_kd.models.window_prompts import WindowPrompts
from retrieval_kd.students.base import Development, Fitted, Student, StudentRecipe
from retrieval_kd.students.sampling import Groups

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Documents
    from retrieval_kd.plan import Draft
    from retrieval_kd.students.development import PoolEvaluator
    from retrieval_kd.students.groups import TrainingQuery
    from retrieval_kd.students.inputs import TrainingInputs
    from retrieval_kd.students.listwise_windows import WindowMaker

log = logging.getLogger("retrieval_kd")


class ListwiseRecipe(StudentRecipe):
    """Keys of ``kind: llm-listwise``; a window has ``groups.documents`` documents, the teacher's best among them."""

    goal = "the teacher's order (graded by the number of documents it beats)"

    kind: Literal["llm-listwise"]
    prompt: str = "first"
    """A listwise prompt of ``teachers/prompts/``, or a path: that by which the finished model is asked."""
    max_length: int = Field(default=4096, ge=16)
    """Tokens of a prompt, without its answer; passages are cut alike where they do not fit."""
    shuffle: bool = True
    """Passages are shown in random order; otherwise in that of the run given as candidates."""
    lm_weight: float = Field(default=1.0, ge=0)
    """Of the language model's loss on the whole order, written out."""
    losses: list[LossTerm] = Field(default=[RankNet(kind="ranknet", weights="rank", weight=10.0)], min_length=1)
    """On the logits of the identifiers."""

    def identity(self) -> dict[str, Any]:
        """The recipe and the content of its prompt."""
        return super().identity() | {"prompt_sha256": load_prompt(self.prompt).sha256}

    @field_validator("losses")
    @classmethod
    def _only_over_groups(cls, losses: list[LossTerm]) -> list[LossTerm]:
        for term in losses:
            if term.needs & {"batch", "vectors", "relations"}:
                raise ValueError(f"a listwise ranker cannot learn '{term.kind}' over the batch or on embeddings")
        return losses

    @field_validator("query_length", "document_length")
    @classmethod
    def _one_length(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError("a listwise ranker reads whole windows: give max_length")
        return value

    @field_validator("groups")
    @classmethod
    def _by_the_teacher(cls, groups: Groups) -> Groups:
        if groups.positive != "teacher":
            raise ValueError("a listwise ranker learns the teacher's order: leave out positive: qrels")
        if groups.reweight is not None:
            raise ValueError("reweight is not for a listwise ranker; mix: has fixed weights")
        return groups

    @field_validator("development")
    @classmethod
    def _on_windows(cls, development: Development) -> Development:
        if development.against == "qrels":
            raise ValueError("a listwise ranker is evaluated on windows of the score file: take teacher, or nothing")
        return development


class ListwiseStudent(Student):
    """FIRST (Reddy et al. 2024, arXiv 2406.15657): the language model's loss on the order and weighted RankNet.

    The result is a causal language model of transformers, which the teacher kind ``llm-listwise`` asks by the same
    prompt with ``decoding: first-token``.
    """

    Recipe = ListwiseRecipe
    recipe: ListwiseRecipe

    def __init__(self, recipe: ListwiseRecipe) -> None:
        super().__init__(recipe)
        self.prompt = prompt_for(recipe.kind, recipe.prompt, "listwise")
        self.names = self.prompt.identifiers_of(recipe.groups.documents)

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model that training starts from. Raises `InputError` for one that cannot rank by its first token.

        Frozen weights under adapters have the precision of the forward passes, weights that are trained float32.
        """
        from retrieval_kd.models.layers import keep_layers
        from retrieval_kd.students.trainer import in_bf16

        recipe = self.recipe
        model = LanguageModel.load(recipe.base, precision="bfloat16" if recipe.lora and in_bf16(recipe) else "float32")
        if model.encoder_decoder:
            raise InputError(f"base '{recipe.base}' is an encoder-decoder, whose answer cannot be begun with '['")
        if recipe.layers is not None:
            keep_layers(model.network, recipe.layers)
        return model

    @cached_property
    def prompts(self) -> WindowPrompts:
        """How windows are shown."""
        return WindowPrompts(self.language_model, self.prompt)

    @cached_property
    def identifier_tokens(self) -> list[int]:
        """The token of each identifier. Raises `InputError` where one is not a single token."""
        mend = f"take a prompt with identifiers: letters ('{self.recipe.prompt}' has {self.prompt.identifiers})"
        return self.prompts.identifier_tokens(self.names, mend)

    def fit(self, inputs: TrainingInputs, draft: Draft) -> Fitted:
        """The model after training, adapters merged; goes on from checkpoints in ``draft.work``."""
        import torch

        from retrieval_kd.losses.objective import WeightedLosses
        from retrieval_kd.models.lora import add_lora, merge_lora
        from retrieval_kd.students.development import held_out
        from retrieval_kd.students.listwise_trainer import ListwiseObjective, make_trainer
        from retrieval_kd.students.listwise_windows import with_an_order
        from retrieval_kd.students.trainer import checkpoint_activations, train_to_the_end

        recipe = self.recipe
        network = self.language_model.network
        if recipe.steps == 0:
            return Fitted(network, self.settings())
        if not recipe.shuffle and inputs.candidates is None:
            raise UsageError("shuffle: false shows passages in the order of a run: give --candidates RUN")
        self.language_model.check_length(recipe.max_length, len(self.prompts.answer(self.names)) - 1)
        queries, counts = inputs.queries()
        queries, without = with_an_order(queries)
        queries, held = held_out(recipe.development, queries, recipe.seed)
        counts |= without | self._windows(inputs, [*queries, *held]).look_through()
        steps = recipe.planned_steps(len(queries))
        if recipe.lora:
            torch.manual_seed(recipe.seed)
            add_lora(network, recipe.lora)
        if recipe.gradient_checkpointing:
            checkpoint_activations(network)
        objective = ListwiseObjective(
            network,
            WeightedLosses(recipe.losses, passes=steps * recipe.accumulate),
            [query.query_id for query in queries],
            lm_weight=recipe.lm_weight,
            at_once=recipe.texts_at_once,
            recompute=recipe.recompute,
        )
        windows = self._windows(inputs, queries, without_weights=recipe.workers > 0)
        checkpoints = draft.work / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        trainer = make_trainer(recipe, objective, windows, steps, checkpoints, self._evaluator(inputs, held))
        log.info("training on %d queries for %d steps of %d", len(queries), steps, recipe.batch_size)
        trained = train_to_the_end(trainer, objective)
        if recipe.lora:
            merge_lora(trained)
        counts = {"queries": len({query.query_id for query in queries}), "steps": steps} | counts
        return Fitted(trained, self.settings(), trainer.state.log_history, counts)

    def settings(self) -> dict[str, Any]:
        """How it is asked: the window's size, the prompt, its length."""
        return {
            "window": self.recipe.groups.documents,
            "prompt": self.recipe.prompt,
            "prompt_sha256": self.prompt.sha256,
            "max_length": self.recipe.max_length,
        }

    def pool_scores(self, model: Any, queries: Sequence[str], documents: Documents, rows: np.ndarray) -> np.ndarray:
        """Logits [queries, rows] of the identifiers, the documents being shown in this order as one window."""
        ordinary = self.language_model.ordinary
        passages = [self.prompts.passage(ordinary(text)) for text in documents.texts(rows)]
        prompts = self.prompts.fitted(
            [ordinary(query) for query in queries],
            [passages] * len(queries),
            max_length=self.recipe.max_length,
            names=[f"query '{query}'" for query in queries],
        )
        return self.language_model.next_token_logits(prompts.tokens, self.identifier_tokens[: len(rows)])

    def save(self, model: Any, folder: Path) -> None:
        """Writes a directory of transformers: weights, tokenizer, chat template."""
        self.language_model.save(folder)

    def notes(self) -> list[str]:
        """What it learnt, and how to ask it."""
        recipe = self.recipe
        prompt = f" --set prompt={recipe.prompt}" if recipe.prompt != "first" else ""
        return [
            f"It puts up to {recipe.groups.documents} passages in order by the logits of the first token of its answer "
            f"to the prompt `{recipe.prompt}` (FIRST).",
            f"It also learnt to write the order out (weight {recipe.lm_weight:g}).",
            f"`retrieval-kd score teachers/first --set model=MODEL{prompt}` ranks with it.",
        ]

    def _windows(
        self, inputs: TrainingInputs, lists: Sequence[TrainingQuery], *, without_weights: bool = False
    ) -> WindowMaker:
        """The windows of ``lists``; ``without_weights`` for worker processes, which tokenise and nothing else."""
        from retrieval_kd.students import collate
        from retrieval_kd.students.listwise_windows import WindowMaker

        recipe, prompts = self.recipe, self.prompts
        if without_weights:
            model = copy.copy(self.language_model)
            model.network = collate.without_weights(model.network)
            prompts = WindowPrompts(model, self.prompt)
        return WindowMaker(
            prompts,
            self.identifier_tokens,
            inputs.collection,
            lists,
            recipe.groups,
            recipe.max_length,
            recipe.seed,
            order=None if recipe.shuffle else inputs.candidates,
        )

    def _evaluator(self, inputs: TrainingInputs, held: Sequence[TrainingQuery]) -> PoolEvaluator | None:
        """How well held-out windows are put in order: a document's grade is how many of its window it beats."""
        from retrieval_kd.students.development import PoolEvaluator

        if not held:
            return None
        maker = self._windows(inputs, held)
        windows = [maker.window(i, 0) for i in range(len(held))]
        return PoolEvaluator(
            self,
            inputs.collection,
            [query.text for query in held],
            [window.rows[window.shown] for window in windows],
            [window.rows for window in windows],
            self.recipe.development.measure,
            [(window.scores[:, None] > window.scores).sum(axis=1) for window in windows],
        )
