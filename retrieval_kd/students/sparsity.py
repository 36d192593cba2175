"""Keeping sparse students sparse: regularisers with their schedule, counted terms, a guard against collapse."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SpladeLoss
from torch import Tensor
from transformers import TrainerCallback

from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.losses.regularisers import L1, WeightedFlops, anti_zero
from retrieval_kd.recipe import Section

if TYPE_CHECKING:
    from retrieval_kd.students.objective import Objective

log = logging.getLogger("retrieval_kd")

LEAST_TERMS = 1.0
PATIENCE = 10
"""Batches in a row that end the training: of fewer than `LEAST_TERMS` active terms a text, or of no score above 0."""


class Penalty(Section):
    """One regulariser at its full weight; ``threshold`` spares texts with at most so many active terms (FLOPS)."""

    kind: Literal["flops", "l1", "idf-flops"] = "flops"
    weight: float = Field(gt=0)
    threshold: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _threshold_of_flops(self) -> Penalty:
        if self.threshold is not None and self.kind != "flops":
            raise ValueError(f"threshold is for flops, not for {self.kind}")
        return self


class Regularisation(Section):
    """Penalties on documents and queries, from 0 to their weight over the share ``warmup`` of the steps.

    The weights go with the losses: near 0.1 beside Margin-MSE, 1e-4 to 1e-2 beside KL and InfoNCE. ``anti_zero``
    is the constant weight of a penalty on a batch whose weights sum to almost nothing.
    """

    document: Penalty
    query: Penalty | None = None
    schedule: Literal["quadratic", "linear"] = "quadratic"
    warmup: float = Field(default=0.33, gt=0, le=1)
    anti_zero: float = Field(default=0.0, ge=0)


class SparseLoss(SpladeLoss):
    """`SpladeLoss` around a student's objective: encodes as the student does and counts active terms.

    ``coefficients`` [V] are those of ``idf-flops``. Raises `RetrievalKDError` when vectors have collapsed.
    """

    document_regularizer_weight: float
    query_regularizer_weight: float | None

    def __init__(self, objective: Objective, settings: Regularisation, coefficients: Tensor | None = None) -> None:
        document, query = settings.document, settings.query
        super().__init__(
            objective.model,
            objective,
            document_regularizer_weight=document.weight,
            query_regularizer_weight=query.weight if query else 0.0,
            document_regularizer=_regulariser(objective.model, document, coefficients),
            query_regularizer=_regulariser(objective.model, query, coefficients) if query else L1(),
        )
        if query is None:
            self.query_regularizer_weight = None
        self.anti_zero = settings.anti_zero
        self.learned = ["document"] if query is None else ["query", "document"]
        self.terms = ActiveTerms()

    def forward(self, features: Any, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The objective's losses and the weighted penalties, each by its key."""
        objective: Objective = self.loss
        queries, documents = embeddings = [objective.student.embed(self.model, part) for part in features]  # type: ignore[attr-defined]
        self.terms.count(query=queries, document=documents)
        self.terms.refuse_collapse(self.learned)
        self.terms.refuse_strangers()
        losses = dict(objective.compute_loss_from_embeddings(embeddings, labels))
        penalty = self.document_regularizer.compute_loss_from_embeddings(documents)
        losses["document_regularizer"] = self.document_regularizer_weight * penalty
        if self.query_regularizer_weight is not None:
            penalty = self.query_regularizer.compute_loss_from_embeddings(queries)
            losses["query_regularizer"] = self.query_regularizer_weight * penalty
        if self.anti_zero:
            sides = {"query": queries, "document": documents}
            losses["anti_zero"] = self.anti_zero * torch.stack([anti_zero(sides[name]) for name in self.learned]).sum()
        return losses

    def callbacks(self, settings: Regularisation) -> list[TrainerCallback]:
        """The schedule of the weights, which depends on the step alone, and the columns of active terms in the log."""
        schedule = SpladeRegularizerWeightSchedulerCallback(
            self, scheduler_type=settings.schedule, warmup_ratio=settings.warmup
        )
        return [schedule, _LogTerms(self.terms)]


class ActiveTerms:
    """Mean active terms of queries and documents since they were last logged; collapsed batches in a row."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._batches = 0
        self._last: dict[str, float] = {}
        self._collapsed: dict[str, int] = {}
        self._strangers = 0

    def count(self, **vectors: Tensor) -> None:
        """Counts the nonzeros of a batch's vectors [n, V], and whether any term is in all of ``vectors``."""
        self._last = {name: float((x.detach() != 0).sum(dim=1).float().mean()) for name, x in vectors.items()}
        for name, mean in self._last.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean
            self._collapsed[name] = self._collapsed.get(name, 0) + 1 if mean < LEAST_TERMS else 0
        self._batches += 1
        used = [(x.detach() != 0).any(dim=0) for x in vectors.values()]
        self._strangers = 0 if bool(torch.stack(used).all(dim=0).any()) else self._strangers + 1

    def refuse_collapse(self, names: list[str]) -> None:
        """Raises `RetrievalKDError` when one of ``names`` had almost no terms in several batches in a row.

        Also while the penalty still grows: where nothing is active there is no gradient that could bring it back.
        """
        for name in names:
            if self._collapsed[name] >= PATIENCE:
                raise RetrievalKDError(
                    f"training collapsed: {self._last[name]:.2f} active terms a {name} on average, below "
                    f"{LEAST_TERMS:g} in {PATIENCE} batches in a row, and what is zero learns nothing more; lower "
                    f"regularisation.{name}.weight or learning_rate, or set regularisation.anti_zero"
                )

    def refuse_strangers(self) -> None:
        """Raises `RetrievalKDError` when no document had a term of a query in several batches in a row.

        All scores are then 0, and so is every gradient. Texts may still have terms, which drift.
        """
        if self._strangers >= PATIENCE:
            raise RetrievalKDError(
                f"training collapsed: in {PATIENCE} batches in a row no document had a term of a query, so that every "
                "score is 0 and nothing is learned any more; lower learning_rate, or give the losses a temperature "
                "that makes the first scores small (the mean score of a document, say)"
            )

    def taken(self) -> dict[str, float]:
        """``query_terms`` and ``document_terms`` since the last call."""
        means = {f"{name}_terms": round(total / self._batches, 2) for name, total in self._sums.items()}
        self._sums, self._batches = {}, 0
        return means


class _LogTerms(TrainerCallback):
    """Adds mean active terms to each logged step."""

    def __init__(self, terms: ActiveTerms) -> None:
        self.terms = terms

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Where a training loss is logged; the trainer has put its copy into the history by now."""
        if logs and "loss" in logs:
            state.log_history[-1].update(self.terms.taken())


def _regulariser(model: Any, penalty: Penalty, coefficients: Tensor | None) -> torch.nn.Module:
    if penalty.kind == "flops":
        return FlopsLoss(model, threshold=penalty.threshold)
    if penalty.kind == "l1":
        return L1()
    assert coefficients is not None, "idf-flops without an IDF table"
    return WeightedFlops(coefficients)
