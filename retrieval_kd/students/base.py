"""What a student is: a recipe, a model to start from, how it encodes and scores. The driver does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.losses.terms import LossTerm
from retrieval_kd.recipe import Recipe, Section

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor

    from retrieval_kd.losses.objective import Outputs


class Groups(Section):
    """How a group of documents is drawn for a query each time it is visited.

    ``positive`` fills slot 0: a relevant document by the qrels, or the teacher's best. The rest are drawn from the
    query's candidates: at ``random``, the ``hardest`` (best scored), or ``spread`` over the teacher's ranking (one
    from each of equally large parts). By qrels, other relevant documents are never drawn.
    """

    documents: int = Field(default=8, ge=2)
    positive: Literal["qrels", "teacher"] = "teacher"
    negatives: Literal["random", "hardest", "spread"] = "random"


class Development(Section):
    """Periodic evaluation during training, which also chooses the best checkpoint.

    ``against: qrels`` takes queries of ``split``; ``against: teacher`` takes no label: it holds training queries out
    and asks for the teacher's best document.
    """

    against: Literal["qrels", "teacher", "nothing"] = "teacher"
    split: str = "dev"
    queries: int = Field(default=200, ge=1)
    documents: int = Field(default=1000, ge=1)
    times: int = Field(default=3, ge=1)
    measure: str = "nDCG@10"


class StudentRecipe(Recipe):
    """The keys every student has."""

    stage = "students"

    base: str
    layers: list[int] | None = None
    query_length: int | None = Field(default=None, ge=4)
    document_length: int | None = Field(default=None, ge=4)
    split: str = "train"
    groups: Groups = Groups()
    losses: list[LossTerm] = Field(min_length=1)
    steps: int | None = Field(default=None, ge=0)
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = 0
    development: Development = Development()


@dataclass(frozen=True)
class Batch:
    """B drawn groups as texts and numbers; documents that occur twice are there once (U distinct).

    ``column`` [B, N] is each slot's document among the U (0 where ``present`` is False), ``teacher`` [B, N] its score
    (NaN unknown), ``relevant`` [B, U] the documents known to be relevant, ``teacher_vectors`` [B+U, d] or None.
    """

    queries: list[str]
    documents: list[str]
    column: np.ndarray
    present: np.ndarray
    teacher: np.ndarray
    relevant: np.ndarray
    teacher_queries: np.ndarray | None = None
    teacher_documents: np.ndarray | None = None


class Student(ABC):
    """One architecture. It never brings a loop of its own."""

    Recipe: ClassVar[type[StudentRecipe]]

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @abstractmethod
    def start(self) -> BaseModel:
        """The sentence-transformers model that training starts from."""

    @abstractmethod
    def trainer(self) -> tuple[type[Any], type[Any]]:
        """The sentence-transformers trainer and its arguments' class."""

    @abstractmethod
    def tokenize(self, model: BaseModel, batch: Batch) -> dict[str, Any]:
        """The batch's texts as model inputs, in the layout the trainer's ``collect_features`` expects."""

    @abstractmethod
    def extra_parameters(self) -> dict[str, Tensor]:
        """Learned parameters that are not the model's own, by name (a cosine student's scale)."""

    @abstractmethod
    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """The forward pass: scores of the groups, and what losses over the batch or on vectors need."""

    @abstractmethod
    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Scores [queries, documents] of a small pool, as searching would give them."""

    @abstractmethod
    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """What ``retrieval_kd.json`` says of the finished model beyond the recipe."""
