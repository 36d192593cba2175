"""What a training run is made from: score files, candidates, a teacher's vectors; opened and checked together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import Scores
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.losses.terms import refuse_ranks
from retrieval_kd.models.load import find_model
from retrieval_kd.students.base import StudentRecipe
from retrieval_kd.students.groups import TrainingQuery
from retrieval_kd.students.training_queries import (
    TrainingQueries,
    check_files,
    queries_without_documents,
    training_queries,
)

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.students.collate import TeacherVectors


class TrainingInputs:
    """The opened inputs of a training run, checked against what the recipe's losses need.

    Raises `UsageError` when a loss lacks what it needs, `InputError` for scores of another collection.
    """

    def __init__(
        self,
        collection: Collection,
        recipe: StudentRecipe,
        scores: Sequence[str | Path] = (),
        candidates: str | Path | None = None,
        vectors: Sequence[str | Path] = (),
    ) -> None:
        self.collection = collection
        self.recipe = recipe
        self.scores = [Scores.load(path) for path in scores]
        self.candidates = Run.load(candidates) if candidates is not None else None
        self.vectors = [Vectors.load(path) for path in vectors]
        for path, file in zip(scores, self.scores, strict=True):
            made_for = file.manifest.inputs.get("collection")
            if made_for is None:
                raise InputError(
                    f"{path}: imported without a collection, so that its ids were not checked; "
                    "import it again with: retrieval-kd scores convert … --collection C"
                )
            if made_for["fingerprint"] != collection.fingerprint:
                raise InputError(f"{path}: these scores are of another collection")
            if recipe.steps != 0:
                refuse_ranks(recipe.losses, file.score_kind, str(path))
        decoded = [str(file.path) for file in self.vectors if file.decoded]
        if decoded and not recipe.queries_alone:
            raise UsageError(f"{decoded[0]}: what an index decodes teaches queries alone: train a query-tower with it")
        if recipe.steps != 0:
            self._check_needs()

    def _check_needs(self) -> None:
        if not self.scores and self.candidates is None and not self.queries_alone:
            raise UsageError("nothing to train on: give --scores SCORES, or --candidates RUN to train on labels alone")
        for term in self.recipe.losses:
            if "scores" in term.needs and not self.scores:
                raise UsageError(f"loss '{term.kind}' needs a teacher's scores: give --scores SCORES")
            if "vectors" in term.needs and not self.vectors:
                where = " over the batch" if getattr(term, "over", None) == "batch" else ""
                raise UsageError(
                    f"loss '{term.kind}'{where} needs the teacher's vectors: "
                    "give --teacher-vectors DOCUMENTS --teacher-vectors QUERIES (see retrieval-kd encode)"
                )
            if "batch" in term.needs and self.queries_alone:
                raise UsageError(f"loss '{term.kind}' over the batch needs documents: give --scores or --candidates")
        if not self.queries_alone:
            check_files(self.recipe.groups, self.scores)

    @property
    def queries_alone(self) -> bool:
        """Whether this trains on queries without any document."""
        return self.recipe.queries_alone and not self.scores and self.candidates is None

    @property
    def refs(self) -> dict[str, InputRef]:
        """Every input by name."""
        refs = {"collection": self.collection.ref(), "base": find_model(self.recipe.base).ref()}
        refs |= {key: find_model(name).ref() for key, name in self.recipe.other_models().items()}
        for name, files in (("scores", self.scores), ("teacher_vectors", self.vectors)):
            refs |= {name if i == 0 else f"{name}_{i + 1}": file.ref() for i, file in enumerate(files)}
        if self.candidates is not None:
            refs["candidates"] = self.candidates.ref()
        return refs | self.recipe.named_inputs()

    def queries(self) -> TrainingQueries:
        """The queries to train on (before any is held out), and what was counted."""
        recipe = self.recipe
        if self.queries_alone:
            return TrainingQueries(queries_without_documents(self.collection, recipe.split), {})
        losses = [term.kind for term in recipe.losses if "scores" in term.needs]
        return training_queries(self.collection, recipe.split, recipe.groups, self.scores, self.candidates, losses)

    def teacher_vectors(self, queries: Sequence[TrainingQuery]) -> TeacherVectors | None:
        """The teacher's vectors of ``queries`` and of all documents (if any is needed); None when none were given."""
        from retrieval_kd.students.collate import TeacherVectors

        if not self.vectors:
            return None
        vectors = TeacherVectors(self.vectors, self.collection)
        if not vectors.complete(queries, documents=not self.queries_alone):
            missing = "all queries" if self.queries_alone else "the documents and all queries"
            raise InputError(
                f"the teacher vectors do not cover {missing} of split '{self.recipe.split}'; "
                "encode them (retrieval-kd encode MODEL, once as it is and once with --queries)"
            )
        return vectors
