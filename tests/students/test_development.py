from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError
from retrieval_kd.students.base import Development
from retrieval_kd.students.dense import DenseStudent
from retrieval_kd.students.development import PoolEvaluator, evaluator, held_out
from retrieval_kd.students.groups import TrainingQuery


class Planned(DenseStudent):
    """Scores a document by its number: the later the better."""

    def __init__(self) -> None:
        values = {"kind": "dense", "base": "none", "losses": [{"kind": "kl"}]}
        super().__init__(DenseStudent.Recipe.model_validate(values))

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        numbers = [float(text.split()[0][1:]) for text in documents]
        return np.tile(np.array(numbers, dtype=np.float32), (len(queries), 1))


def queries(number: int) -> list[TrainingQuery]:
    """Query i has the candidates i, i+1, i+2."""
    none = np.zeros(3, dtype=bool)
    return [
        TrainingQuery(f"q{i}", f"w{i}", np.arange(i, i + 3), np.array([3, 2, 1], dtype=np.float32), none)
        for i in range(number)
    ]


def test_measure_by_hand(collection: Collection) -> None:
    """Ranked 7, 5, 3: relevant 5 is second and 3 third: reciprocal ranks 1/2 and 1/3."""
    pool = np.array([3, 5, 7])
    relevant = [np.array([5]), np.array([3])]
    evaluation = PoolEvaluator(Planned(), collection, ["a", "b"], [pool, pool], relevant, "RR@10")
    assert evaluation(None)["development"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_own_pools(collection: Collection) -> None:
    """Each ranks its own: in 3, 5 the relevant 5 is first; in 3, 9 the relevant 3 is second."""
    pools, relevant = [np.array([3, 5]), np.array([3, 9])], [np.array([5]), np.array([3])]
    evaluation = PoolEvaluator(Planned(), collection, ["a", "b"], pools, relevant, "RR@10")
    assert evaluation(None)["development"] == pytest.approx((1 + 1 / 2) / 2)


def test_a_tenth_is_held_out_against_the_teacher(caplog: pytest.LogCaptureFixture) -> None:
    every = queries(30)
    kept, held = held_out(Development(against="teacher"), every, seed=0)
    assert len(held) == 3 and sorted([*kept, *held], key=every.index) == every
    assert held_out(Development(against="teacher"), every, seed=0)[1] == held
    assert len(held_out(Development(against="teacher", queries=2), every, seed=0)[1]) == 2
    assert held_out(Development(against="qrels"), every, seed=0) == (every, [])
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        assert held_out(Development(against="teacher"), every[:9], seed=0) == (every[:9], [])
    assert "9 training queries are too few" in caplog.text


def test_against_the_teacher(collection: Collection) -> None:
    """Held are queries 2 and 3: relevant are 2 and 3, the pool holds 2 to 5; ranked 5, 4, 3, 2."""
    settings = Development(against="teacher", measure="RR@10")
    found = evaluator(Planned(), settings, collection, queries(4)[2:], seed=0)
    assert found is not None and [pool.tolist() for pool in found.pools] == [[2, 3, 4, 5]] * 2
    assert found(None)["development"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    reranker = Planned()
    reranker.reranks = True  # type: ignore[misc]
    own = evaluator(reranker, settings, collection, queries(4)[2:], seed=0)
    assert own is not None and [pool.tolist() for pool in own.pools] == [[2, 3, 4], [3, 4, 5]]
    assert own(None)["development"] == pytest.approx(1 / 3)


def test_against_labels(collection: Collection) -> None:
    """All 40 documents: dev-i's relevant d0i has rank 40 − i."""
    settings = Development(against="qrels", split="dev", measure="RR")
    found = evaluator(Planned(), settings, collection, [], seed=0)
    assert found is not None and found.pools[0].tolist() == list(range(40))
    assert found.texts == [f"w{i} w{40 + i}" for i in range(6)]
    assert found(None)["development"] == pytest.approx(np.mean([1 / (40 - i) for i in range(6)]))
    small = evaluator(Planned(), settings.model_copy(update={"documents": 10}), collection, [], 0)
    assert small is not None and len(small.pools[0]) == 10 and set(range(6)) <= set(small.pools[0].tolist())


def test_nothing_to_evaluate_on(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluator(Planned(), Development(against="nothing"), collection, [], 0) is None
    assert evaluator(Planned(), Development(against="teacher"), collection, [], 0) is None
    with pytest.raises(InputError, match="no split 'development'"):
        evaluator(Planned(), Development(against="qrels", split="development"), collection, [], 0)
    irrelevant = {f"dev-{i}": {"d00": 0} for i in range(tiny.QUERIES["dev"])}
    monkeypatch.setattr(Collection, "qrels", lambda self, split: irrelevant)
    with pytest.raises(InputError, match="no query of split 'dev' has a relevant document"):
        evaluator(Planned(), Development(against="qrels", split="dev"), collection, [], 0)
