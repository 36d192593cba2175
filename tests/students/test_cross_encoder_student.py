from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.errors import RecipeError
from retrieval_kd.losses.objective import WeightedLosses
from retrieval_kd.models.load import Model
from retrieval_kd.recipe import validate
from retrieval_kd.students.base import Batch
from retrieval_kd.students.cross_encoder import CrossEncoderStudent
from retrieval_kd.teachers.score import score

Trained = Callable[..., Model]

QUERIES = ["w1 w2", "w3 w44 w55 w6 w7 w8"]
DOCUMENTS = ["w1 w9", "w2 w3 w4 w5 w8 w10", "w44", "w7 w8 w6 w3 w55 w12 w13 w14"]
COLUMN = [[0, 1, 2], [3, 1, 0]]
PRESENT = [[True, True, True], [True, True, False]]
TEACHER = [[3.0, 1.0, 0.0], [2.0, 3.0, 1.0]]


def make_student(cross_encoder: Path, **values: Any) -> CrossEncoderStudent:
    defaults = {"kind": "cross-encoder", "base": str(cross_encoder), "losses": [{"kind": "kl"}], "max_length": 32}
    recipe = {**defaults, **values}
    return CrossEncoderStudent(validate(CrossEncoderStudent.Recipe, recipe, "made"))


def outputs_of(student: CrossEncoderStudent, model: Any, present: list[list[bool]]) -> Any:
    column, there = np.array(COLUMN), np.array(present)
    teacher = np.array(TEACHER, dtype=np.float32)
    batch = Batch(QUERIES, DOCUMENTS, column, there, teacher, np.zeros((2, 4), dtype=bool))
    labels = {name: torch.from_numpy(getattr(batch, name)) for name in ("column", "present", "teacher", "relevant")}
    return student.outputs(model, {}, list(student.tokenize(model, batch).values()), labels)


def test_cross_encoder_learns_from_labels(
    fit: Trained, cross_encoder: Path, collection: Collection, tmp_path: Path
) -> None:
    """Negatives are always d30 to d35, so words tell: the loss falls below half of log 4. The result can teach."""
    from sentence_transformers import CrossEncoder

    queries = list(collection.queries("train"))
    negatives = Run.from_hits(queries, [tiny.ids_of(range(30, 36))] * 30, [np.arange(6)] * 30)
    negatives.save(tmp_path / "negatives", recipe={"kind": "made"}, inputs={})
    model = fit(
        inputs={"candidates": tmp_path / "negatives"},
        kind="cross-encoder",
        base=str(cross_encoder),
        max_length=32,
        groups={"documents": 4, "positive": "qrels"},
        losses=[{"kind": "info-nce", "over": "group"}],
        steps=30,
        batch_size=10,
        learning_rate=2e-2,
    )
    log = tiny.losses(model.path)
    assert log[0] > 1 and np.mean(log[-5:]) < np.log(4) / 2
    stock = CrossEncoder(str(model.path))
    assert stock.num_labels == 1 and stock.max_seq_length == 32
    assert model.settings["max_length"] == 32
    recipe = tiny.write_recipe(model.path.parent / "ce.yaml", {"kind": "cross-encoder", "model": str(model.path)})
    out = model.path.parent / "scores"
    row = next(iter(score(recipe, collection=collection, candidates=["qrels:dev"], out=out)))
    pair = ("w0 w40", tiny.document_text(0))
    own = stock.predict([pair], activation_fn=torch.nn.Identity(), show_progress_bar=False)[0]
    assert row.scores[0] == pytest.approx(float(own), abs=1e-5)


def test_cross_encoder_keeps_layers(fit: Trained, cross_encoder: Path) -> None:
    from sentence_transformers import CrossEncoder

    values = {"kind": "cross-encoder", "base": str(cross_encoder), "losses": [{"kind": "kl"}], "layers": [1]}
    model = fit(inputs={}, steps=0, **values)
    kept, start = tiny.weights(model.path), tiny.weights(cross_encoder)
    names = [name for name in kept if "layer." in name]
    assert names and all((kept[name] == start[name.replace("layer.0.", "layer.1.")]).all() for name in names)
    assert CrossEncoder(str(model.path))[0].auto_model.config.num_hidden_layers == 1


@pytest.mark.parametrize("at_once", [2, 32])
def test_pairs_in_parts_are_scored_in_order(at_once: int, cross_encoder: Path) -> None:
    """Slot by slot what stock ``predict`` gives; the empty slot is 0."""
    student = make_student(cross_encoder, texts_at_once=at_once)
    model = student.start().eval()
    found = outputs_of(student, model, PRESENT).scores.detach().numpy()
    pairs = [(QUERIES[i], DOCUMENTS[COLUMN[i][j]]) for i in range(2) for j in range(3)]
    expected = model.predict(pairs, show_progress_bar=False).reshape(2, 3) * np.array(PRESENT)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected[0]).min() > 1e-3


def test_cross_encoder_recomputing_gives_the_same_gradients(cross_encoder: Path) -> None:
    def gradients(**values: Any) -> list[torch.Tensor]:
        student = make_student(cross_encoder, **values)
        model = student.start().eval()
        sum(WeightedLosses(student.recipe.losses)(outputs_of(student, model, PRESENT)).values()).backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    whole, again = gradients(), gradients(recompute=True, texts_at_once=2)
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in whole)
    for one, other in zip(whole, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("term", "stock", "factor"),
    [
        ({"kind": "margin-mse"}, "MarginMSELoss", 1),
        ({"kind": "listnet"}, "ListNetLoss", 1),
        ({"kind": "ranknet"}, "RankNetLoss", np.log(2)),  # which takes the logarithm to the base 2
        ({"kind": "lambda-loss", "scheme": "none", "target": "none"}, "RankNetLoss", 1),
        ({"kind": "lambda-loss", "target": "none"}, "LambdaLoss", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_cross_encoder_losses_equal_those_of_sentence_transformers(
    term: dict[str, Any], stock: str, factor: float, cross_encoder: Path
) -> None:
    """The same model on the same texts."""
    from sentence_transformers.cross_encoder import losses

    student = make_student(cross_encoder, losses=[term])
    model = student.start().eval()
    ours = WeightedLosses(student.recipe.losses)(outputs_of(student, model, [[True] * 3] * 2))[term["kind"]]
    documents = [[DOCUMENTS[j] for j in row] for row in COLUMN]
    if stock == "MarginMSELoss":
        columns = [list(column) for column in zip(*documents, strict=True)]
        theirs = losses.MarginMSELoss(model)([QUERIES, *columns], torch.tensor(TEACHER))
    else:
        theirs = getattr(losses, stock)(model)([QUERIES, documents], [torch.tensor(row) for row in TEACHER])
    assert ours.item() == pytest.approx(factor * theirs.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["margin-mse", "lambda-loss"])
def test_cross_encoder_follows_a_teacher(
    kind: str, fit: Trained, cross_encoder: Path, collection: Collection, tmp_path: Path
) -> None:
    """The loss falls to less than half, and the scores of a query's candidates go with those of a larger model."""
    from sentence_transformers import CrossEncoder

    large = tiny.make_cross_encoder(tmp_path / "large", seed=3, layers=3)
    recipe = tiny.write_recipe(tmp_path / "large.yaml", {"kind": "cross-encoder", "model": str(large)})
    candidates = tiny.make_candidates(tmp_path, collection, depth=8)
    scores = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    values: dict[str, Any] = {
        "kind": "cross-encoder",
        "base": str(cross_encoder),
        "max_length": 32,
        "losses": [{"kind": kind}],
        "inputs": {"scores": [scores.path]},
        "groups": {"documents": 8},
    }
    model = fit(**values, steps=40, batch_size=10, learning_rate=1e-2)
    log = tiny.losses(model.path)
    assert np.mean(log[-5:]) < np.mean(log[:5]) / 2
    texts = collection.queries("train")
    stock = CrossEncoder(str(model.path))
    assert isinstance(stock.activation_fn, torch.nn.Identity)
    documents = [tiny.document_text(i) for i in range(40)]
    mine = CrossEncoderStudent.development_scores(make_student(cross_encoder), stock, [texts["train-3"]], documents)
    own = stock.predict([(texts["train-3"], text) for text in documents], show_progress_bar=False)
    np.testing.assert_array_equal(mine[0], own)

    def agreement(path: Path) -> float:
        reranker = CrossEncoder(str(path))
        found = []
        for row in scores:
            pairs = [(texts[row.query_id], documents[int(doc_id[1:])]) for doc_id in row.doc_ids]
            found.append(np.corrcoef(reranker.predict(pairs, show_progress_bar=False), row.scores)[0, 1])
        return float(np.mean(found))

    assert agreement(model.path) > max(agreement(fit(**values | {"inputs": {}}, steps=0).path) + 0.2, 0.5)


def test_cross_encoder_killed_and_resumed_gives_the_same_weights(
    fit: Trained, resumed_equals: Trained, scores: Path, cross_encoder: Path
) -> None:
    values: dict[str, Any] = {
        "kind": "cross-encoder",
        "base": str(cross_encoder),
        "max_length": 32,
        "inputs": {"scores": [scores]},
        "losses": [{"kind": "lambda-loss"}],
        "steps": 6,
        "development": {"against": "teacher", "documents": 4, "times": 3},
    }
    resumed_equals(fit, values, goes_on_from=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [{"kind": "info-nce"}]}, "cannot learn 'info-nce' over the batch"),
        ({"losses": [{"kind": "embedding"}]}, "cannot learn 'embedding'"),
        ({"losses": [{"kind": "kl", "over": "batch"}]}, "cannot learn 'kl' over the batch"),
        ({"losses": [{"kind": "lambda-loss", "scheme": "ndcg"}]}, "'ndcg-loss2\\+\\+' or 'lambda-rank'"),
        ({"document_length": 64}, "give max_length"),
        ({"similarity": "dot"}, "unknown key 'similarity'"),
    ],
)
def test_cross_encoder_recipes_that_cannot_be(change: dict[str, Any], message: str, fit: Trained) -> None:
    values = {"kind": "cross-encoder", "losses": [{"kind": "kl"}], **change}
    with pytest.raises(RecipeError, match=message):
        fit(inputs={}, **values)
