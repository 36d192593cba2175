from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.losses.objective import WeightedLosses
from retrieval_kd.students.collate import GroupCollator
from retrieval_kd.students.dense import DenseStudent
from retrieval_kd.students.groups import TrainingQuery
from retrieval_kd.students.objective import Objective
from retrieval_kd.students.sampling import Reweight
from retrieval_kd.students.visits import (
    WEIGHTS,
    Gaps,
    Reweighting,
    VisitOrder,
    measured_apart,
    next_weights,
    planned_visits,
    visit_order,
)


def lists(*numbers: int) -> list[TrainingQuery]:
    """So many lists of file 0, 1, …: each file has the queries q0, q1, …."""
    none = np.zeros(1, dtype=bool)
    return [
        TrainingQuery(f"q{i}", "text", np.zeros(1, dtype=np.int32), np.zeros(1), none, file=file)
        for file, number in enumerate(numbers)
        for i in range(number)
    ]


def recipe(**values: Any) -> DenseStudent.Recipe:
    return DenseStudent.Recipe.model_validate(
        {"kind": "dense", "base": "none", "losses": [{"kind": "kl"}], "batch_size": 4, **values}
    )


def test_the_plan_of_one_file_stays_what_it_was() -> None:
    """Made before files could be mixed: whole passes, and in the order of the plan."""
    plan = planned_visits(lists(5), 12, seed=3)
    assert plan.to_dict() == {
        "query": [4, 2, 1, 3, 0, 3, 1, 4, 0, 2, 2, 1],
        "visit": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2],
    }
    assert list(visit_order(recipe(seed=3), 3)) == list(range(12))


def test_mixed_files_have_passes_of_their_own() -> None:
    """File 0 has lists 0 to 2, file 1 lists 3 and 4; of 7 visits each has 7 rows."""
    plan = planned_visits(lists(3, 2), 7, seed=0, files=2)
    assert sorted(plan["query"][:3]) == sorted(plan["query"][3:6]) == [0, 1, 2]
    assert [sorted(plan["query"][i : i + 2]) for i in (7, 9, 11)] == [[3, 4]] * 3
    assert plan["visit"][:] == [0, 0, 0, 1, 1, 1, 2, 0, 0, 1, 1, 2, 2, 3]


def test_a_mixed_file_without_lists() -> None:
    with pytest.raises(InputError, match="no list of score file 3 is left to train on"):
        planned_visits(lists(3, 2), 7, seed=0, files=3)


def test_files_are_drawn_by_weight() -> None:
    """2 : 1 over 9000 visits: 6000 of the first file (σ = 45), each file's rows one after another."""
    order = np.array(list(visit_order(recipe(groups={"mix": [2, 1]}), 2250)))
    of_first = order < 9000
    assert abs(int(of_first.sum()) - 6000) < 200
    assert order[of_first].tolist() == list(range(int(of_first.sum())))
    assert order[~of_first].tolist() == list(range(9000, 9000 + int((~of_first).sum())))


def test_measured_weights_act_in_the_round_after_next() -> None:
    """Rounds of 50 visits; after (1, 0) for the first two, (0, 1) takes the other file alone."""
    order = VisitOrder(150, 0, (1.0, 1.0), visits_per_round=50)
    order.weights = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert list(order) == [*range(100), *range(150, 200)]
    order.weights.pop()
    begun = iter(order)
    assert [next(begun) for _ in range(100)] == list(range(100))
    with pytest.raises(IndexError):
        next(begun)


def test_weights_by_hand() -> None:
    """Losses 0 and log 3 have the softmax 1/4, 3/4; half is spread: 3/8, 5/8; half of (1/2, 1/2) stays: 7/16, 9/16."""
    found = next_weights(Reweight(smoothing=0.5, floor=0.5), [0.5, 0.5], [0.0, float(np.log(3))])
    assert found == pytest.approx([7 / 16, 9 / 16])
    assert next_weights(Reweight(smoothing=0, floor=0.2), [0.5, 0.5], [0.0, 5000.0]) == pytest.approx([0.1, 0.9])


class Fixed:
    """Gaps that are there already."""

    def measure(self) -> list[float]:
        return [0.0, float(np.log(3))]


def test_weights_are_kept_beside_checkpoints(tmp_path: Path) -> None:
    """Rounds of 2 steps: measured after 2 and 4 steps, not after 6, as no step of 8 comes after the next round."""
    settings = Reweight(every=2, smoothing=0, floor=0.5)
    order = VisitOrder(32, 0, (1.0, 1.0), visits_per_round=8)
    callback = Reweighting(settings, order, Fixed())  # type: ignore[arg-type]
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    (tmp_path / "checkpoint-5").mkdir()
    for step in range(1, 9):
        state = SimpleNamespace(global_step=step, max_steps=8, is_world_process_zero=True)
        callback.on_step_end(arguments, state, None)
        if step == 5:
            callback.on_save(arguments, state, None)
    assert order.weights == [[0.5, 0.5], [0.5, 0.5], [0.375, 0.625], [0.375, 0.625]]
    assert (tmp_path / "checkpoint-5" / WEIGHTS).is_file()
    again = VisitOrder(32, 0, (1.0, 1.0), visits_per_round=8)
    resumed = Reweighting(settings, again, Fixed())  # type: ignore[arg-type]
    resumed.on_train_begin(arguments, SimpleNamespace(global_step=5), None)
    assert again.weights == order.weights and list(again) == list(order)


def test_measured_queries_are_in_no_list_of_training() -> None:
    """A tenth of 20 and of 30 queries is measured: 2 and 3, and whoever is measured leaves both files."""
    kept, measured = measured_apart(lists(20, 30), Reweight(), seed=0)
    ids = {query.query_id for of_file in measured for query in of_file}
    assert 3 <= len(ids) <= 5 and not ids & {query.query_id for query in kept}
    assert len(kept) + sum(map(len, measured)) == 50
    assert [{query.file for query in of_file} for of_file in measured] == [{0}, {1}]
    with pytest.raises(InputError, match="score file 2 has 9 queries to train on, too few"):
        measured_apart(lists(20, 9), Reweight(), seed=0)


def test_rounds_shorter_than_the_loaders_lead() -> None:
    """Two workers load 2 · 2 batches, one more waits: 5 steps ahead."""
    groups = {"mix": [1, 1], "reweight": {"every": 5}}
    with pytest.raises(UsageError, match=r"every: 5 steps are too few: 2 workers load up to 5 .* at least 6"):
        visit_order(recipe(groups=groups, workers=2), 20)
    assert len(visit_order(recipe(groups=groups, workers=2, accumulate=4), 20)) == 80


def test_gaps_are_the_losses_that_learn_from_a_teacher(collection: Collection, dense: Path) -> None:
    """In parts of 3 and 1 lists, KL is the mean over all 4; InfoNCE is no gap; dropout is off, and on again after."""
    import torch
    from sentence_transformers import SentenceTransformer

    values = recipe(losses=[{"kind": "kl"}, {"kind": "info-nce"}], groups={"documents": 3})
    student, model = DenseStudent(values), SentenceTransformer(str(dense))
    scores = np.array([3, 2, 1], dtype=np.float32)
    queries = [
        TrainingQuery(f"q{i}", f"w{i} w{40 + i}", np.arange(i, i + 3), scores, np.zeros(3, dtype=bool))
        for i in range(4)
    ]
    objective = Objective(student, model, WeightedLosses(values.losses))
    collator = GroupCollator(student, model, collection, [], values.groups, 0)
    objective.train()
    gaps = Gaps(objective, collator, [queries, queries[:1]], at_once=3)
    found = gaps.measure()
    assert objective.training and model.training and found == gaps.measure()
    model.eval()
    inputs = replace(collator, queries=queries)([{"query": i, "visit": 0} for i in range(4)])
    features, labels = student.trainer()[0].collect_features(None, inputs)
    with torch.no_grad():
        losses = objective(features, labels)
    assert found[0] == pytest.approx(float(losses["kl"]), rel=1e-5) and found[1] != found[0]
    with pytest.raises(UsageError, match="needs a loss that learns from a teacher"):
        Gaps(Objective(student, model, WeightedLosses(values.losses[1:])), collator, [queries], at_once=3)
