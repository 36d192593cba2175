from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import OutputExistsError, RecipeError
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.models.load import Model
from retrieval_kd.students.development import PoolEvaluator
from retrieval_kd.students.train import estimate_train

Trained = Callable[..., Model]


def cosines(model: Path, collection: Collection) -> np.ndarray:
    """[train queries, documents]."""
    encoder = DenseEncoder.load(model)
    queries = encoder.encode_queries(list(collection.queries("train").values()))
    documents = encoder.encode_documents(list(collection.documents.iter_texts()))
    return np.asarray(tiny.unit(queries) @ tiny.unit(documents).T)


def test_embedding_regression_approaches_the_teacher(
    fit: Trained, dense: Path, teacher: Path, scores: Path, vectors: list[Path], collection: Collection
) -> None:
    """The mean squared distance of unit vectors falls to less than half."""
    model = fit(inputs={"scores": [scores], "teacher_vectors": vectors}, losses=[{"kind": "embedding"}], steps=30)
    texts = list(collection.documents.iter_texts())
    goal = tiny.unit(DenseEncoder.load(teacher).encode_documents(texts))

    def distance(path: Path) -> float:
        return float(((tiny.unit(DenseEncoder.load(path).encode_documents(texts)) - goal) ** 2).sum(axis=1).mean())

    assert distance(model.path) < distance(dense) / 2


def test_info_nce_ranks_the_positive_first(fit: Trained, candidates: Path, collection: Collection, dense: Path) -> None:
    model = fit(
        inputs={"candidates": candidates},
        groups={"documents": 4, "positive": "qrels"},
        losses=[{"kind": "info-nce"}],
        steps=40,
        batch_size=15,
        learning_rate=1e-2,
    )
    first = [float((cosines(path, collection).argmax(axis=1) == np.arange(30)).mean()) for path in (dense, model.path)]
    assert first[0] < 0.5 < 0.9 <= first[1]


@pytest.mark.parametrize(
    "loss",
    [{"kind": "margin-mse", "target": {"scale": 20}}, {"kind": "kl", "teacher_temperature": 0.05}],
    ids=["margin-mse", "kl"],
)
def test_scores_are_learned(
    loss: dict[str, Any], fit: Trained, scores: Path, teacher: Path, dense: Path, collection: Collection
) -> None:
    """The loss falls to less than half, and the teacher's order of the candidates is followed more closely."""
    model = fit(inputs={"scores": [scores]}, losses=[loss], steps=30, scale={"initial": 20, "learned": False})
    log = tiny.losses(model.path)
    assert np.mean(log[-5:]) < np.mean(log[:5]) / 2

    def agreement(path: Path) -> float:
        pairs = [(np.array([(i + j) % 40 for j in range(6)]), i) for i in range(30)]
        mine, goal = cosines(path, collection), cosines(teacher, collection)
        return float(np.mean([np.corrcoef(mine[i, rows], goal[i, rows])[0, 1] for rows, i in pairs]))

    assert agreement(model.path) > agreement(dense) + 0.2


def test_kl_over_the_batch(fit: Trained, scores: Path, vectors: list[Path]) -> None:
    loss = {"kind": "kl", "over": "batch", "teacher_temperature": 0.05}
    log = tiny.losses(fit(inputs={"scores": [scores], "teacher_vectors": vectors}, losses=[loss], steps=20).path)
    assert np.mean(log[-5:]) < np.mean(log[:5]) / 2


def test_stock_sentence_transformers_loads_it(fit: Trained, scores: Path, collection: Collection) -> None:
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "query: ", "document": "passage: "}
    model = fit(
        inputs={"scores": [scores]},
        losses=[{"kind": "kl"}],
        steps=2,
        query_length=5,
        document_length=7,
        prompts=prompts,
    )
    stock, ours = SentenceTransformer(str(model.path)), DenseEncoder.load(model.path)
    texts = list(collection.documents.iter_texts())[:5]
    np.testing.assert_array_equal(stock.encode_document(texts, show_progress_bar=False), ours.encode_documents(texts))
    np.testing.assert_array_equal(stock.encode_query(texts, show_progress_bar=False), ours.encode_queries(texts))
    assert stock.prompts["query"] == "query: " and stock[0].query_length == 5 and stock[0].document_length == 7
    settings = {key: model.settings[key] for key in ("kind", "similarity", "query_length", "document_length")}
    assert settings == {"kind": "dense", "similarity": "cosine", "query_length": 5, "document_length": 7}
    assert model.settings["trained_on"]["collection"] == collection.fingerprint
    assert model.problems() == []


def test_no_steps_is_the_start(fit: Trained, dense: Path) -> None:
    model = fit(inputs={}, losses=[{"kind": "kl"}], steps=0)
    start = tiny.weights(dense)
    assert all((value == start[name]).all() for name, value in tiny.weights(model.path).items())
    assert not (model.path / "training_log.csv").exists()


def test_layers_are_kept(fit: Trained, dense: Path) -> None:
    kept, start = tiny.weights(fit(inputs={}, losses=[{"kind": "kl"}], steps=0, layers=[1]).path), tiny.weights(dense)
    layers = {name for name in kept if "layer." in name}
    assert layers and all("layer.0." in name for name in layers)
    assert all((kept[name] == start[name.replace("layer.0.", "layer.1.")]).all() for name in kept)
    with pytest.raises(RecipeError, match="the model has layers 0 to 1"):
        fit(inputs={}, losses=[{"kind": "kl"}], steps=0, layers=[2])


def test_plain_transformer_gets_pooling(fit: Trained, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    plain = tiny.make_transformer(tmp_path / "plain")
    model = fit(inputs={}, losses=[{"kind": "kl"}], steps=0, base=str(plain), pooling="cls", similarity="dot")
    stock = SentenceTransformer(str(model.path))
    assert stock[1].pooling_mode == "cls" and stock.similarity_fn_name == "dot"
    assert model.settings["scale"] == 1.0


def test_learned_scale_is_saved(fit: Trained, scores: Path) -> None:
    """Adam changes log 2 by at most the learning rate a step: 10 steps of at most 0.005."""
    loss = {"kind": "kl", "teacher_temperature": 0.001}
    learned = fit(inputs={"scores": [scores]}, losses=[loss], scale={"initial": 2}).settings["scale"]
    assert 0.005 < abs(np.log(learned / 2)) <= 0.05
    fixed = fit(inputs={"scores": [scores]}, losses=[loss], scale={"initial": 2, "learned": False}, steps=2)
    assert fixed.settings["scale"] == 2


def test_killed_and_resumed_gives_the_same_bytes(fit: Trained, resumed_equals: Trained, scores: Path) -> None:
    """Dropout, shuffling, draws, the optimizer and the learned scale go on where the last checkpoint was."""
    values: dict[str, Any] = {
        "inputs": {"scores": [scores]},
        "losses": [{"kind": "kl", "teacher_temperature": 0.05}],
        "steps": 12,
        "development": {"against": "teacher", "documents": 20, "times": 3},
    }
    assert resumed_equals(fit, values, goes_on_from=4).settings["scale"] != 20


def test_finished_student_is_kept(fit: Trained, scores: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"out": tmp_path / "s", "inputs": {"scores": [scores]}, "losses": [{"kind": "kl"}]}
    first = fit(**values, steps=1)
    assert fit(**values, steps=1).manifest.created == first.manifest.created
    with pytest.raises(OutputExistsError, match=r"another recipe \(steps differ\)"):
        fit(**values, steps=2)


def test_log_has_each_step(fit: Trained, scores: Path) -> None:
    model = fit(
        inputs={"scores": [scores]},
        losses=[{"kind": "kl"}, {"kind": "info-nce", "weight": 0.5}],
        steps=4,
        warmup=0.5,
        learning_rate=0.002,
    )
    rows = [row for row in tiny.log_rows(model.path) if row["loss"]]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.0, 0.001, 0.002, 0.001])
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["kl"]) + float(row["info-nce"]), abs=2e-3)
    assert (model.manifest.counts["queries"], model.manifest.counts["steps"]) == (30, 4)


@pytest.fixture
def development(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The values that the development evaluation gives, one after another."""
    values: list[float] = []
    monkeypatch.setattr(PoolEvaluator, "_scores", lambda self, model: [np.zeros(len(pool)) for pool in self.pools])
    monkeypatch.setattr(PoolEvaluator, "__call__", lambda self, model, *_, **__: {"development": values.pop(0)})
    yield values


def test_best_checkpoint_is_kept(fit: Trained, scores: Path, development: list[float]) -> None:
    """Of evaluations after 2, 4 and 6 steps the second is best: the result is that of a run that is worse later."""
    values: dict[str, Any] = {
        "inputs": {"scores": [scores]},
        "losses": [{"kind": "kl", "teacher_temperature": 0.05}],
        "steps": 6,
    }
    settings = {"against": "teacher", "times": 3}
    development += [0.1, 0.9, 0.3]
    best = fit(**values, development=settings)
    development += [0.1, 0.2, 0.3]
    last = fit(**values, development=settings, seed=0, weight_decay=0.01 + 1e-9)
    assert best.manifest.details["development"] == {"measure": "nDCG@10", "best": 0.9, "all": [0.1, 0.9, 0.3]}
    assert any((value != tiny.weights(last.path)[name]).any() for name, value in tiny.weights(best.path).items())
    assert best.settings["scale"] != last.settings["scale"]
    rows = [row for row in tiny.log_rows(best.path) if row["eval_development"]]
    assert [(row["step"], float(row["eval_development"])) for row in rows] == [("2", 0.1), ("4", 0.9), ("6", 0.3)]


def test_estimate(collection: Collection, scores: Path, dense: Path, tmp_path: Path) -> None:
    """30 queries, 3 of them held out, in batches of 8 twice: ⌈54 / 8⌉ = 7 steps of 8 · (4 + 1) texts."""
    values = {"kind": "dense", "base": str(dense), "groups": {"documents": 4}, "losses": [{"kind": "kl"}]}
    recipe = tiny.write_recipe(tmp_path / "s.yaml", {**values, "batch_size": 8, "epochs": 2})
    found = estimate_train(recipe, collection=collection, scores=[scores])
    del found["recipe"]
    assert found == {"queries": 27, "steps": 7, "texts_per_step": 40, "texts": 280}
