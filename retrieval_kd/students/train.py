"""The verb `train`: the only training driver. A student says how it encodes and scores; this does everything else."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.atomic import unfinished, write_atomically
from retrieval_kd.errors import UsageError
from retrieval_kd.models.load import SETTINGS, Model
from retrieval_kd.plan import Draft, Plan
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import implementation
from retrieval_kd.students.base import Fitted, Student, StudentRecipe
from retrieval_kd.students.card import development_values, model_card
from retrieval_kd.students.inputs import TrainingInputs

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

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
    A killed run goes on from its last checkpoint. Under ``torchrun`` every process calls this, and a step's batch is
    divided among them. Raises `UsageError` when a loss lacks what it needs.
    """
    from retrieval_kd.data.sources import open_collection

    out = Path(out)
    opened = open_collection(collection)
    loaded = _student_recipe(recipe, overrides)
    inputs = TrainingInputs(opened, loaded, scores, candidates, teacher_vectors)
    plan = Plan("model", loaded.identity(), inputs.refs)
    student: Student = implementation("students", loaded.kind)(loaded)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _train_together(student, inputs, plan, out, force=force)
    if plan.finished(out, force=force):
        return Model.load(out)
    with plan.write(out, force=force, resumable=True) as draft:
        _finish(student, inputs, _timed_fit(student, inputs, draft), draft)
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
    from retrieval_kd.students.development import held_out
    from retrieval_kd.students.visits import measured_apart

    opened = open_collection(collection)
    loaded = _student_recipe(recipe, overrides)
    inputs = TrainingInputs(opened, loaded, scores, candidates, teacher_vectors)
    queries, _ = held_out(loaded.development, inputs.queries().queries, loaded.seed)
    if loaded.groups.reweight:
        queries, _ = measured_apart(queries, loaded.groups.reweight, loaded.seed)
    steps = loaded.planned_steps(len(queries))
    texts = loaded.batch_size * (loaded.groups.documents + 1)
    return {
        "recipe": loaded.resolved(),
        "queries": len({query.query_id for query in queries}),
        "steps": steps,
        "texts_per_step": texts,
        "texts": texts * steps,
    }


def _student_recipe(recipe: str, overrides: Sequence[str]) -> StudentRecipe:
    loaded = load_recipe(recipe, "students", overrides)
    if not isinstance(loaded, StudentRecipe):
        raise UsageError(f"{recipe}: not a student's recipe")
    return loaded


def _train_together(student: Student, inputs: TrainingInputs, plan: Plan, out: Path, *, force: bool) -> Model:
    """`train` as one of several processes: the first writes the model, the others compute beside it."""
    import torch
    from accelerate import PartialState

    together = PartialState(cpu=not torch.cuda.is_available())
    decided: list[bool] = [together.is_main_process and plan.finished(out, force=force)]
    torch.distributed.broadcast_object_list(decided)
    if decided[0]:
        return Model.load(out)
    if together.is_main_process:
        with plan.write(out, force=force, resumable=True) as draft:
            draft.work.mkdir(exist_ok=True)
            together.wait_for_everyone()
            _finish(student, inputs, _timed_fit(student, inputs, draft), draft)
        together.wait_for_everyone()
    else:
        together.wait_for_everyone()
        student.fit(inputs, Draft(unfinished(out), resumed=False))
        together.wait_for_everyone()
    return Model.load(out)


def _timed_fit(student: Student, inputs: TrainingInputs, draft: Draft) -> Fitted:
    began = time.perf_counter()
    fitted = student.fit(inputs, draft)
    if inputs.recipe.steps != 0:
        draft.details["training_seconds"] = round(time.perf_counter() - began, 1)
    return fitted


def _finish(student: Student, inputs: TrainingInputs, fitted: Fitted, draft: Draft) -> None:
    """Writes the model, its settings, loss curves and card."""
    from retrieval_kd.models.encoder import quiet_loading
    from retrieval_kd.students.curves import draw_curves, write_log

    recipe = inputs.recipe
    with quiet_loading():
        student.save(fitted.model, draft.path)
    development = development_values(fitted.history)
    if fitted.history:
        write_log(draft.path / "training_log.csv", fitted.history)
        draw_curves(draft.path / "training.png", fitted.history, recipe.development.measure)
    if development:
        draft.details["development"] = {
            "measure": recipe.development.measure,
            "best": max(development),
            "all": development,
        }
        log.info("development %s: %s", recipe.development.measure, " ".join(f"{value:.4f}" for value in development))
    draft.counts.update(fitted.counts)
    draft.counts["parameters"] = sum(weights.numel() for weights in fitted.model.parameters())
    card = model_card(recipe, inputs, development, student.notes())
    write_atomically(draft.path / "README.md", card.encode())
    settings = {
        "kind": recipe.kind,
        "query_length": recipe.query_length,
        "document_length": recipe.document_length,
        **fitted.settings,
        "trained_on": {name: ref.fingerprint for name, ref in inputs.refs.items()},
    }
    write_atomically(draft.path / SETTINGS, json.dumps(settings, indent=2).encode())
