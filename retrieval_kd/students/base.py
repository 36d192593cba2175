"""What a student is: a recipe, a model to start from, how it encodes and scores. The driver does the rest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.losses.terms import LossTerm
from retrieval_kd.models.lora import Lora
from retrieval_kd.recipe import Recipe, Section
from retrieval_kd.students.sampling import Groups

if TYPE_CHECKING:
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor, nn

    from retrieval_kd.artifact import InputRef
    from retrieval_kd.data.collection import Documents
    from retrieval_kd.losses.objective import Outputs
    from retrieval_kd.plan import Draft
    from retrieval_kd.students.groups import TrainingQuery
    from retrieval_kd.students.inputs import TrainingInputs
    from retrieval_kd.students.objective import Objective


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
    """The keys every student has. ``batch_size`` is the queries of a step over all processes and accumulated parts."""

    stage = "students"
    queries_alone: ClassVar[bool] = False
    """Whether queries without any document can be trained on, where no loss asks for documents."""
    goal: ClassVar[str] = "the teacher's best document"
    """What a development evaluation against the teacher asks for."""
    execution: ClassVar[frozenset[str]] = frozenset({"workers"})
    """Keys that say how the work is done and cannot change the weights: they may differ when a run goes on."""

    base: str
    layers: list[int] | None = None
    query_length: int | None = Field(default=None, ge=4)
    document_length: int | None = Field(default=None, ge=4)
    lora: Lora | None = None
    split: str = "train"
    groups: Groups = Groups()
    losses: list[LossTerm] = Field(min_length=1)
    steps: int | None = Field(default=None, ge=0)
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    texts_at_once: int = Field(default=32, ge=1)
    recompute: bool = False
    gradient_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=2e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = 0
    development: Development = Development()

    def other_models(self) -> dict[str, str]:
        """Key → name of the models, beside ``base``, that the weights depend on."""
        return {}

    def identity(self) -> dict[str, Any]:
        """The resolved recipe without its `execution` keys: what the model is made from."""
        return self.model_dump(mode="json", exclude=set(self.execution))

    def named_inputs(self) -> dict[str, InputRef]:
        """Files that the recipe itself names, besides the base: they are inputs of the model."""
        return {}

    def planned_steps(self, queries: int) -> int:
        """The optimizer steps of a training run over ``queries``."""
        return self.steps if self.steps is not None else math.ceil(self.epochs * queries / self.batch_size)


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
    decoded_documents: np.ndarray | None = None
    """[U, d] what the codes of an index stand for, where a query tower learns against one."""


@dataclass
class Fitted:
    """A trained model, the logged steps, and what training counted and found out."""

    model: Any
    settings: dict[str, Any] = field(default_factory=dict)
    """Its part of ``retrieval_kd.json``."""
    history: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Student(ABC):
    """One architecture; the driver is `retrieval_kd.students.train`."""

    Recipe: ClassVar[type[StudentRecipe]]

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @abstractmethod
    def fit(self, inputs: TrainingInputs, draft: Draft) -> Fitted:
        """The model after training (untrained for ``steps: 0``); goes on from checkpoints in ``draft.work``."""

    def save(self, model: Any, folder: Path) -> None:
        """Writes the finished model to ``folder``."""
        model.save_pretrained(str(folder), create_model_card=False)

    def notes(self) -> list[str]:
        """What the model card has to say of this student besides the recipe: one sentence a line."""
        return []


class TrainerStudent(Student):
    """A student that a trainer of sentence-transformers fits: one loop for all of them, in ``trainer.py``."""

    recipe: StudentRecipe
    reranks: ClassVar[bool] = False
    """Whether it reads a query together with a document, and so ranks given candidates only."""

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
    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """The forward pass: scores of the groups, and what losses over the batch or on vectors need."""

    @abstractmethod
    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Scores [queries, documents] of a small pool, as searching would give them."""

    def pool_scores(self, model: Any, queries: Sequence[str], documents: Documents, rows: np.ndarray) -> np.ndarray:
        """`development_scores` of a pool that is given by its rows in the collection."""
        return self.development_scores(model, queries, documents.texts(rows))

    def evaluator(self, inputs: TrainingInputs, held: Sequence[TrainingQuery]) -> BaseEvaluator | None:
        """What evaluates while training, on ``held`` queries or the qrels; None where there is nothing to rank."""
        from retrieval_kd.students.development import evaluator

        return evaluator(self, self.recipe.development, inputs.collection, held, self.recipe.seed)

    def extra_parameters(self) -> dict[str, Tensor]:
        """Learned parameters that are not the model's own, by name (a cosine student's scale)."""
        return {}

    def loss(self, objective: Objective) -> nn.Module:
        """The trainer's loss module: the objective, or a wrapper of sentence-transformers around it."""
        return objective

    def callbacks(self, objective: Objective) -> list[Any]:
        """Further callbacks of the trainer."""
        return []

    def arguments(self) -> dict[str, Any]:
        """Further arguments of the trainer (learning rates by name of parameter)."""
        return {}

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """What ``retrieval_kd.json`` says of the finished model beyond the recipe."""
        return {}

    def fit(self, inputs: TrainingInputs, draft: Draft) -> Fitted:
        """The model as the recipe's losses made it."""
        from retrieval_kd.students.trainer import fit

        return fit(self, inputs, draft)
