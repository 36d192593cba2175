"""The verb `train`: the only training driver. A student says how it encodes and scores; this does everything else."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.artifact import InputRef, Plan, write_atomically
from retrieval_kd.errors import InputError, RetrievalKDError, UsageError
from retrieval_kd.models.load import SETTINGS, Model, find_model
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import implementation
from retrieval_kd.students.base import Student, StudentRecipe
from retrieval_kd.students.card import development_values, model_card
from retrieval_kd.students.groups import TrainingQuery, training_queries

if TYPE_CHECKING:
    from retrieval_kd.artifact import Draft
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.students.collate import TeacherVectors

log = logging.getLogger("retrieval_kd")


def train(
    recipe: str,
    *,
    collection: str | Path | Collection,
    out: str | Path,
    scores: Sequence[str | Path] = (),
    candidates: str | Path | None = None,
    teacher_vectors: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    force: bool = False,
) -> Model:
    """The model artifact of a trained student (or fine-tuned teacher).

    Groups come from ``scores`` (score files) or, for training on labels alone, from a ``candidates`` run.
    ``teacher_vectors`` (documents and training queries) allow losses on embeddings and over the whole batch.
    A killed run goes on from its last checkpoint. Raises `UsageError` when a loss lacks what it needs.
    """
    from retrieval_kd.data.sources import open_collection

    out = Path(out)
    opened = open_collection(collection)
    loaded = _student_recipe(recipe, overrides)
    inputs = _Inputs(opened, loaded, scores, candidates, teacher_vectors)
    plan = Plan("model", loaded.resolved(), inputs.refs)
    if plan.finished(out, force=force):
        return Model.load(out)
    student: Student = implementation("students", loaded.kind)(loaded)
    with plan.write(out, force=force, resumable=True) as draft:
        _train(student, opened, inputs, draft)
    return Model.load(out)


def estimate_train(
    recipe: str,
    *,
    collection: str | Path | Collection,
    scores: Sequence[str | Path] = (),
    candidates: str | Path | None = None,
    teacher_vectors: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What `train` would do: queries, steps, texts a step and in all."""
    from retrieval_kd.data.sources import open_collection

    opened = open_collection(collection)
    loaded = _student_recipe(recipe, overrides)
    inputs = _Inputs(opened, loaded, scores, candidates, teacher_vectors)
    queries = inputs.queries()
    steps = _steps(loaded, len(queries))
    texts = loaded.batch_size * (loaded.groups.documents + 1)
    return {
        "recipe": loaded.resolved(),
        "queries": len(queries),
        "steps": steps,
        "texts_per_step": texts,
        "texts": texts * steps,
    }


class _Inputs:
    """The opened inputs of a training run, checked against what the recipe's losses need."""

    def __init__(
        self,
        collection: Collection,
        recipe: StudentRecipe,
        scores: Sequence[str | Path],
        candidates: str | Path | None,
        vectors: Sequence[str | Path],
    ) -> None:
        from retrieval_kd.data.run import Run
        from retrieval_kd.data.scores import Scores
        from retrieval_kd.data.vectors import Vectors

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
        self._check_needs()

    def _check_needs(self) -> None:
        if not self.recipe.steps == 0 and not self.scores and self.candidates is None:
            raise UsageError("nothing to train on: give --scores SCORES, or --candidates RUN to train on labels alone")
        for term in self.recipe.losses:
            over_group = term.kind == "margin-mse" or (term.kind == "kl" and term.over == "group")
            if over_group and not self.scores and self.recipe.steps != 0:
                raise UsageError(f"loss '{term.kind}' needs a teacher's scores: give --scores SCORES")
            over_vectors = term.kind == "embedding" or (term.kind == "kl" and term.over == "batch")
            if over_vectors and not self.vectors and self.recipe.steps != 0:
                raise UsageError(
                    f"loss '{term.kind}'{' over the batch' if term.kind == 'kl' else ''} needs the teacher's vectors: "
                    "give --teacher-vectors DOCUMENTS --teacher-vectors QUERIES (see retrieval-kd encode)"
                )
        if self.recipe.groups.positive == "teacher" and not self.scores and self.recipe.steps != 0:
            raise UsageError("groups.positive: teacher needs --scores (on labels alone, set groups.positive=qrels)")

    @property
    def refs(self) -> dict[str, InputRef]:
        """Every input by name."""
        refs = {"collection": self.collection.ref(), "base": find_model(self.recipe.base).ref()}
        for name, files in (("scores", self.scores), ("teacher_vectors", self.vectors)):
            refs |= {name if i == 0 else f"{name}_{i + 1}": file.ref() for i, file in enumerate(files)}
        if self.candidates is not None:
            refs["candidates"] = self.candidates.ref()
        return refs

    def queries(self) -> list[TrainingQuery]:
        """The queries to train on (before any is held out)."""
        return training_queries(self.collection, self.recipe.split, self.recipe.groups, self.scores, self.candidates)

    def teacher_vectors(self, queries: Sequence[TrainingQuery]) -> TeacherVectors | None:
        """The teacher's vectors of all documents and ``queries``; None when none were given."""
        from retrieval_kd.students.collate import TeacherVectors

        if not self.vectors:
            return None
        vectors = TeacherVectors(self.vectors, self.collection)
        if not vectors.complete(queries):
            raise InputError(
                f"the teacher vectors do not cover the documents and all queries of split '{self.recipe.split}'; "
                "give both (retrieval-kd encode MODEL, once as it is and once with --queries)"
            )
        return vectors


def _student_recipe(recipe: str, overrides: Sequence[str]) -> StudentRecipe:
    loaded = load_recipe(recipe, "students", overrides)
    if not isinstance(loaded, StudentRecipe):
        raise UsageError(f"{recipe}: not a student's recipe")
    return loaded


def _steps(recipe: StudentRecipe, queries: int) -> int:
    return recipe.steps if recipe.steps is not None else math.ceil(recipe.epochs * queries / recipe.batch_size)


@dataclass(frozen=True)
class _Fitted:
    model: Any
    parameters: dict[str, float]
    history: list[dict[str, Any]]


def _train(student: Student, collection: Collection, inputs: _Inputs, draft: Draft) -> None:
    from retrieval_kd.models.encoder import quiet_loading

    recipe = inputs.recipe
    began = time.perf_counter()
    with quiet_loading():
        model = student.start()
        untrained = recipe.steps == 0
        fitted = _Fitted(model, {}, []) if untrained else _fit(student, model, collection, inputs, draft)
        fitted.model.save_pretrained(str(draft.path), create_model_card=False)
    development = development_values(fitted.history)
    if not untrained:
        _write_log(draft.path / "training_log.csv", fitted.history)
        draft.details["training_seconds"] = round(time.perf_counter() - began, 1)
    if development:
        best = {"measure": recipe.development.measure, "best": max(development), "all": development}
        draft.details["development"] = best
        log.info("development %s: %s", recipe.development.measure, " ".join(f"{value:.4f}" for value in development))
    draft.counts["parameters"] = sum(weights.numel() for weights in fitted.model.parameters())
    card = model_card(recipe, inputs.refs, development)
    write_atomically(draft.path / "README.md", card.encode())
    settings = {
        "kind": recipe.kind,
        "query_length": recipe.query_length,
        "document_length": recipe.document_length,
        **student.settings(fitted.parameters),
        "trained_on": {name: ref.fingerprint for name, ref in inputs.refs.items()},
    }
    write_atomically(draft.path / SETTINGS, json.dumps(settings, indent=2).encode())


def _fit(student: Student, model: Any, collection: Collection, inputs: _Inputs, draft: Draft) -> _Fitted:
    from transformers.trainer_utils import get_last_checkpoint

    from retrieval_kd.students.collate import GroupCollator
    from retrieval_kd.students.development import evaluator, held_out
    from retrieval_kd.students.trainer import Objective, make_trainer, planned_visits

    recipe = inputs.recipe
    queries, held = held_out(recipe.development, inputs.queries(), recipe.seed)
    steps = _steps(recipe, len(queries))
    own_pools = recipe.kind == "cross-encoder"
    dev = evaluator(student, recipe.development, collection, held, own_pools=own_pools, seed=recipe.seed)
    objective = Objective(student, model, recipe.losses)
    vectors = inputs.teacher_vectors(queries)
    if vectors is not None and any(term.kind == "embedding" for term in recipe.losses):
        vectors.check_dimension(int(model.get_embedding_dimension()))
    collator = GroupCollator(student, model, collection, queries, recipe.groups, recipe.seed, vectors)
    visits = planned_visits(len(queries), steps * recipe.batch_size, recipe.seed)
    checkpoints = draft.work / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    trainer = make_trainer(student, recipe, model, objective, collator, visits, dev, checkpoints, steps)
    last = get_last_checkpoint(str(checkpoints))
    if last:
        log.info("going on from %s", Path(last).name)
    log.info("training on %d queries for %d steps of %d", len(queries), steps, recipe.batch_size)
    result = trainer.train(resume_from_checkpoint=last)
    if not math.isfinite(result.training_loss):
        raise RetrievalKDError("training diverged (the loss is NaN or infinite); lower learning_rate or loss weights")
    draft.counts.update({"queries": len(queries), "steps": steps})
    return _Fitted(trainer.model, objective.best_parameters(trainer), trainer.state.log_history)


def _write_log(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """The loss log: one line a logged step, one column a logged quantity; no times, which differ from run to run."""
    timed = ("runtime", "per_second")
    columns = sorted({key for entry in history for key in entry if not key.endswith(timed)} - {"step"})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", *columns], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)
