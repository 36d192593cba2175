"""What a teacher is: recipe in, raw float32 scores out, with everything a score file must say about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.models.encoder import Truncation
from retrieval_kd.recipe import Recipe

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors


class TeacherRecipe(Recipe):
    """The keys every teacher has."""

    stage = "teachers"

    model: str
    revision: str | None = None
    depth: int | None = Field(default=None, ge=1)
    """Only the first ``depth`` candidates of each run are scored, all when not given; judged documents always all."""
    pairs_per_shard: int = Field(default=8192, ge=1)


@dataclass(frozen=True)
class Candidates:
    """One query and the documents to score for it, as row numbers of the collection."""

    query_id: str
    text: str
    rows: np.ndarray


@dataclass(frozen=True)
class ScoringJob:
    """Everything a teacher may need before the first shard: collection, all queries, ready vectors, a work folder."""

    collection: Collection
    candidates: Sequence[Candidates]
    vectors: Sequence[Vectors]
    work: Path


class Teacher(ABC):
    """A ranker that scores candidates. One instance serves one scoring run."""

    Recipe: ClassVar[type[TeacherRecipe]]

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.truncation = Truncation()

    @property
    @abstractmethod
    def score_kind(self) -> str:
        """What a raw score is: ``logit``, ``cosine`` or ``dot``."""

    @abstractmethod
    def ref(self) -> InputRef:
        """The model as the score file's input."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """Facts for the manifest: model, revision, max_length, dtype, similarity."""

    def prepare(self, job: ScoringJob) -> None:  # noqa: B027
        """Work to do once before the first shard (a bi-encoder encodes each text once). Must be resumable."""

    @abstractmethod
    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Raw float32 scores, one array for each query of the shard. ``texts[i][j]`` is document j of query i.

        Called for whole shards only, so that the same shard gives the same scores; counts truncation on the way.
        """
