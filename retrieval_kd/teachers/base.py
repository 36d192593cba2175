"""What a teacher is: recipe in, raw float32 scores out, with everything a score file must say about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.recipe import Recipe

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors


class TeacherRecipe(Recipe):
    """The keys every teacher has."""

    stage = "teachers"
    execution: ClassVar[frozenset[str]] = frozenset()
    """Keys that say how the work is done and cannot change a score: they may differ when a run goes on."""

    depth: int | None = Field(default=None, ge=1)
    """Only the first ``depth`` candidates of each run are scored, all when not given; judged documents always all."""
    pairs_per_shard: int = Field(default=8192, ge=1)

    def identity(self) -> dict[str, Any]:
        """The resolved recipe without its `execution` keys: what the score file is made from."""
        return self.model_dump(mode="json", exclude=set(self.execution))


class ModelTeacherRecipe(TeacherRecipe):
    """The keys of a teacher that is a model on this machine."""

    model: str
    revision: str | None = None


@dataclass(frozen=True)
class Candidates:
    """One query and the documents to score for it, as row numbers of the collection, best candidate first."""

    query_id: str
    text: str
    rows: np.ndarray


@dataclass(frozen=True)
class ScoringJob:
    """Everything a teacher may need before the first shard: collection, all queries (those of other slices too, so that
    what is prepared does not depend on the slice), ready vectors, a work folder."""

    collection: Collection
    candidates: Sequence[Candidates]
    vectors: Sequence[Vectors]
    work: Path


class Scored(NamedTuple):
    """What a teacher says of a shard: an array for each query, in the order of its candidates."""

    scores: list[np.ndarray]
    """float32, raw, higher is better."""
    tokens_lost: list[np.ndarray]
    """int32: how many tokens of the pair (query and document) the teacher cut off and did not read."""


class Teacher(ABC):
    """A ranker that scores candidates. One instance serves one scoring run, or one worker of it.

    The constructor and `ref` are cheap: weights are loaded when `prepare`, `score`, `score_kind` or `details` first
    needs them, so that a process that only plans or waits holds no model.
    """

    Recipe: ClassVar[type[TeacherRecipe]]
    independent: bool = True
    """A score depends on its query and document alone (a listwise teacher's depends on the other candidates too)."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.counts: Counter[str] = Counter()
        """Whatever else is to be counted (``malformed_answers``); the same shard must always count the same."""

    @property
    @abstractmethod
    def score_kind(self) -> str:
        """What a raw score is: ``logit``, ``log_odds``, ``cosine``, ``dot``, ``rank`` and so on."""

    @abstractmethod
    def ref(self) -> InputRef:
        """The model as the score file's input."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """Facts for the manifest, asked for after the last shard: model, revision, max_length, dtype, prompt, usage."""

    def prepare(self, job: ScoringJob) -> None:  # noqa: B027
        """Work to do once before the first shard (a bi-encoder encodes each text once).

        Must be resumable, and a second call (by another worker) must find the first one's files in ``job.work``.
        """

    @abstractmethod
    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """Raw scores of a shard; ``texts[i][j]`` is document j of query i.

        Batches stay inside the shard, so that the same shard gives the same scores. A shard may also be a part of
        one, down to a single pair, while a document is looked for that a teacher cannot take. Raises
        `RetrievalKDError` for what must stop the whole run (a spent budget, a missing key); any other exception is
        held against the shard's documents.
        """
