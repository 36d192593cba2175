"""The order in which queries are visited, fixed by the seed: a run that goes on visits what it would have visited.

Where score files are mixed, a visit's file is drawn by weights, which may follow the student (`Reweighting`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import Sampler
from transformers import TrainerCallback

from retrieval_kd.errors import InputError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

    from retrieval_kd.students.base import StudentRecipe
    from retrieval_kd.students.collate import GroupCollator
    from retrieval_kd.students.groups import TrainingQuery
    from retrieval_kd.students.objective import Objective
    from retrieval_kd.students.sampling import Reweight

log = logging.getLogger("retrieval_kd")

WEIGHTS = "mixing_weights.json"


def planned_visits(queries: Sequence[TrainingQuery], visits: int, seed: int, files: int = 1) -> Dataset:
    """Rows ``{query, visit}``, for each of ``files`` that are mixed as many as there are ``visits``.

    A file's rows are whole shuffled passes over its lists, one after another: ``query`` is the number of a list,
    ``visit`` how often it was visited before. Raises `InputError` for a file without any list.
    """
    from datasets import Dataset

    file_of = np.array([query.file for query in queries])
    order, repetition = [], []
    for file in range(files):
        of_file = np.flatnonzero(file_of == file)
        if not len(of_file):
            raise InputError(
                f"groups.mix: no list of score file {file + 1} is left to train on; leave it and its weight out"
            )
        passes = -(-visits // len(of_file))
        shuffled = [np.random.default_rng((seed, 0, n, file)).permutation(of_file) for n in range(passes)]
        order.append(np.concatenate(shuffled)[:visits].astype(np.int32))
        repetition.append((np.arange(visits) // len(of_file)).astype(np.int32))
    return Dataset.from_dict({"query": np.concatenate(order), "visit": np.concatenate(repetition)})


class VisitOrder(Sampler[int]):
    """The rows of `planned_visits` in the order of training: each visit takes the next row of a file drawn by weights.

    ``weights`` holds, for each round of ``visits_per_round``, the weights of the files: a function of the seed and of
    what was measured. The weights measured at the end of a round are those of the round after next, because what
    loads the batches is ahead of the training.
    """

    def __init__(self, visits: int, seed: int, mix: Sequence[float] = (1.0,), *, visits_per_round: int = 0) -> None:
        self.visits = visits
        self.seed = seed
        self.visits_per_round = visits_per_round or visits
        self.weights = [[weight / sum(mix) for weight in mix]] * 2

    def __len__(self) -> int:
        return self.visits

    def __iter__(self) -> Iterator[int]:
        taken = [0] * len(self.weights[0])
        for number, start in enumerate(range(0, self.visits, self.visits_per_round)):
            rng = np.random.default_rng((self.seed, 3, number))
            size = min(self.visits_per_round, self.visits - start)
            for file in rng.choice(len(taken), size=size, p=self.weights[number]).tolist():
                yield file * self.visits + taken[file]
                taken[file] += 1

    def batches(self, dataset: Any, **arguments: Any) -> Any:
        """The batch sampler of a trainer that keeps this order."""
        from sentence_transformers.base.sampler import DefaultBatchSampler

        return DefaultBatchSampler(self, **arguments)


def visit_order(recipe: StudentRecipe, steps: int) -> VisitOrder:
    """The order that the recipe asks for. Raises `UsageError` when its rounds are too short to be measured in time."""
    groups, reweight = recipe.groups, recipe.groups.reweight
    if reweight is None:
        return VisitOrder(steps * recipe.batch_size, recipe.seed, groups.mix or (1.0,))
    ahead = -(-(2 * recipe.workers + 1) // recipe.accumulate)
    if reweight.every <= ahead:
        raise UsageError(
            f"groups.reweight.every: {reweight.every} steps are too few: {recipe.workers} workers load up to {ahead} "
            f"steps ahead; give at least {ahead + 1}"
        )
    per_round = reweight.every * recipe.batch_size
    return VisitOrder(steps * recipe.batch_size, recipe.seed, groups.mix or (1.0,), visits_per_round=per_round)


def measured_apart(
    queries: Sequence[TrainingQuery], reweight: Reweight, seed: int
) -> tuple[list[TrainingQuery], list[list[TrainingQuery]]]:
    """``queries`` without those that mixing weights are measured on, and the lists of these by file.

    Raises `InputError` when a file has too few queries to spare a tenth.
    """
    files = sorted({query.file for query in queries})
    chosen: set[str] = set()
    for file in files:
        ids = list(dict.fromkeys(query.query_id for query in queries if query.file == file))
        number = min(reweight.queries, len(ids) // 10)
        if number == 0:
            raise InputError(
                f"groups.reweight: score file {file + 1} has {len(ids)} queries to train on, too few to measure on a "
                "tenth of them; leave reweight out"
            )
        rng = np.random.default_rng((seed, 4, file))
        chosen.update(ids[i] for i in rng.choice(len(ids), size=number, replace=False))
    kept = [query for query in queries if query.query_id not in chosen]
    lists = [[query for query in queries if query.file == file and query.query_id in chosen] for file in files]
    return kept, lists


def next_weights(reweight: Reweight, last: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Mixing weights [D] after the losses ``gaps`` [D] were measured: they sum to 1."""
    exponentials = np.exp(np.array(gaps) - max(gaps))
    shares = (1 - reweight.floor) * exponentials / exponentials.sum() + reweight.floor / len(gaps)
    weights = reweight.smoothing * np.array(last) + (1 - reweight.smoothing) * shares
    return [float(weight) for weight in weights / weights.sum()]


class Gaps:
    """The student's distance from its teachers: the mean of the losses that learn from them, on lists of each file."""

    def __init__(
        self, objective: Objective, collator: GroupCollator, lists: Sequence[Sequence[TrainingQuery]], at_once: int
    ) -> None:
        terms = objective.losses.terms
        self.keys = [key for key, term in terms.items() if term.needs & {"scores", "vectors"}]
        if not self.keys:
            raise UsageError("groups.reweight needs a loss that learns from a teacher (kl, margin-mse)")
        self.objective = objective
        self.collators = [replace(collator, queries=of_file) for of_file in lists]
        self.at_once = at_once

    def measure(self) -> list[float]:
        """One number a file; the same in all processes. Leaves no trace in the training."""
        training = self.objective.training
        self.objective.eval()
        with torch.no_grad():
            gaps = [self._of_file(collator) for collator in self.collators]
        self.objective.train(training)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(gaps)
        return gaps

    def _of_file(self, collator: GroupCollator) -> float:
        device = next(self.objective.model.parameters()).device
        trainer, _ = self.objective.student.trainer()
        rows = [{"query": i, "visit": 0} for i in range(len(collator.queries))]
        total = 0.0
        for start in range(0, len(rows), self.at_once):
            part = rows[start : start + self.at_once]
            features, labels = trainer.collect_features(None, send_to_device(collator(part), device))
            losses = self.objective(features, labels)
            total += len(part) * sum(float(losses[key]) for key in self.keys)
        return total / len(rows)


class Reweighting(TrainerCallback):
    """Measures the gaps after each round and adds the weights of the round after next; keeps them in checkpoints."""

    def __init__(self, reweight: Reweight, order: VisitOrder, gaps: Gaps) -> None:
        self.reweight = reweight
        self.order = order
        self.gaps = gaps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes over the weights of the checkpoint that training goes on from."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WEIGHTS
        if state.global_step:
            self.order.weights = json.loads(path.read_text())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measures at the end of a round, where a round after the next is to come."""
        every = self.reweight.every
        if state.global_step % every or state.global_step + every >= state.max_steps:
            return
        gaps = self.gaps.measure()
        self.order.weights.append(next_weights(self.reweight, self.order.weights[-1], gaps))
        told = ", ".join(
            f"{weight:.3f} (loss {gap:.4f})" for weight, gap in zip(self.order.weights[-1], gaps, strict=True)
        )
        log.info("mixing weights from step %d: %s", state.global_step + every, told)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes all weights beside the checkpoint."""
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WEIGHTS
            path.write_text(json.dumps(self.order.weights))
