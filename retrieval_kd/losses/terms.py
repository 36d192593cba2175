"""The items of a recipe's ``losses:`` list: which loss, with which weight and settings (no tensors here)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from retrieval_kd.recipe import Section

Over = Literal["group", "batch"]


class MarginMSE(Section):
    """Margin-MSE over the group's scores; ``teacher_scale`` multiplies the teacher (its margins are not scale-free)."""

    kind: Literal["margin-mse"]
    weight: float = Field(default=1.0, gt=0)
    pairs: Literal["positive", "all"] = "positive"
    teacher_scale: float = Field(default=1.0, gt=0)


class KL(Section):
    """KL divergence from the teacher over the group, or over all documents of the batch (needs teacher vectors)."""

    kind: Literal["kl"]
    weight: float = Field(default=1.0, gt=0)
    over: Over = "group"
    student_temperature: float = Field(default=1.0, gt=0)
    teacher_temperature: float = Field(default=1.0, gt=0)


class InfoNCE(Section):
    """InfoNCE on the positive, over the group or over all documents of the batch (known positives are masked)."""

    kind: Literal["info-nce"]
    weight: float = Field(default=1.0, gt=0)
    over: Over = "batch"
    temperature: float = Field(default=1.0, gt=0)


class Embedding(Section):
    """Embedding regression: the student's vectors of queries and documents against the teacher's."""

    kind: Literal["embedding"]
    weight: float = Field(default=1.0, gt=0)
    distance: Literal["mse", "cosine"] = "mse"


LossTerm = Annotated[MarginMSE | KL | InfoNCE | Embedding, Field(discriminator="kind")]
