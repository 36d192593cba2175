"""What both students with networks of the package's own promise: they follow a teacher, resume, and can score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_rerankers
import torch

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.scores import Scores
from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.losses.objective import WeightedLosses
from retrieval_kd.models.load import Model
from retrieval_kd.recipe import validate
from retrieval_kd.registry import implementation
from retrieval_kd.students.base import Batch
from retrieval_kd.teachers.score import score

Trained = Callable[..., Model]

KINDS: dict[str, dict[str, Any]] = {
    "tk": {"heads": 2, "feed_forward": 20, "learning_rate": 3e-3, "kernel_learning_rate": 3e-2},
    "prettr": {"layers_apart": 1, "learning_rate": 1e-2},
}
QUERIES = ["w1 w2", "w3 w44 w55 w6 w7 w8"]
DOCUMENTS = ["w1 w9", "w2 w3 w4 w5 w8 w10", "w44", "w7 w8 w6 w3 w55 w12 w13 w14"]
COLUMN, PRESENT = np.array([[0, 1, 2], [3, 1, 0]]), np.array([[True, True, True], [True, True, False]])
TEACHER = np.array([[3.0, 1.0, 0.0], [2.0, 3.0, 1.0]], dtype=np.float32)


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return tiny_rerankers.make_base(shared / "reranker-base")


@pytest.fixture(scope="module")
def by_words(shared: Path, collection: Collection) -> Path:
    """BM25's scores of 8 documents a query: which words occur in both."""
    candidates = tiny.make_candidates(shared, collection, depth=8)
    return score("teachers/bm25", collection=collection, candidates=[candidates], out=shared / "by-words").path


def recipe(kind: str, base: Path, **changes: Any) -> dict[str, Any]:
    values = {"kind": kind, "base": str(base), **tiny_rerankers.LENGTHS, "losses": [{"kind": "margin-mse"}]}
    return {**values, "groups": {"documents": 8}, "batch_size": 10, **KINDS[kind], **changes}


def make_student(kind: str, base: Path, **changes: Any) -> Any:
    student = implementation("students", kind)
    return student(validate(student.Recipe, recipe(kind, base, **changes), "made"))


def outputs_of(student: Any, model: Any) -> Any:
    batch = Batch(QUERIES, DOCUMENTS, COLUMN, PRESENT, TEACHER, np.zeros((2, 4), dtype=bool))
    labels = {name: torch.from_numpy(getattr(batch, name)) for name in ("column", "present", "teacher", "relevant")}
    return student.outputs(model, {}, list(student.tokenize(model, batch).values()), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_a_teacher_of_words_and_can_score(
    kind: str, fit: Trained, base: Path, by_words: Path, collection: Collection
) -> None:
    """The loss falls to less than half and its scores go with BM25's. The saved model scores as a teacher."""
    from sentence_transformers import CrossEncoder

    values = recipe(kind, base, steps=90, development={"against": "teacher", "documents": 8, "times": 2})
    model = fit(inputs={"scores": [by_words]}, **values)
    log = tiny.losses(model.path)
    assert np.mean(log[-5:]) < np.mean(log[:5]) / 2
    stock = CrossEncoder(str(model.path), trust_remote_code=True)
    texts = collection.queries("train")
    documents = [tiny.document_text(i) for i in range(40)]
    found = make_student(kind, base).development_scores(stock, [texts["train-3"], texts["train-4"]], documents)
    own = stock.predict([(texts["train-3"], text) for text in documents])
    np.testing.assert_allclose(found[0], own, atol=1e-5)
    pairs = {
        row.query_id: [(texts[row.query_id], documents[int(i[1:])]) for i in row.doc_ids]
        for row in Scores.load(by_words)
    }
    agreement = [np.corrcoef(stock.predict(pairs[row.query_id]), row.scores)[0, 1] for row in Scores.load(by_words)]
    assert np.mean(agreement) > 0.8
    name = tiny.write_recipe(model.path.parent / "ce.yaml", {"kind": "cross-encoder", "model": str(model.path)})
    row = next(iter(score(name, collection=collection, candidates=["qrels:dev"], out=model.path.parent / "scores")))
    assert row.scores[0] == pytest.approx(float(stock.predict([("w0 w40", documents[0])])[0]), abs=1e-5)
    card = (model.path / "README.md").read_text()
    assert "trust_remote_code=True" in card and "pipeline_tag: text-ranking" in card
    assert {key: model.settings[key] for key in tiny_rerankers.LENGTHS} == tiny_rerankers.LENGTHS
    assert model.manifest.details["development"]["best"] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_in_parts_are_scored_in_order(kind: str, base: Path) -> None:
    """Slot by slot what ``predict`` gives; the empty slot is 0."""
    student = make_student(kind, base, texts_at_once=2)
    model = student.start().eval()
    found = outputs_of(student, model).scores.detach().numpy()
    pairs = [(QUERIES[i], DOCUMENTS[COLUMN[i, j]]) for i in range(2) for j in range(3)]
    expected = model.predict(pairs).reshape(2, 3) * PRESENT
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected[PRESENT]).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_gives_the_same_gradients(kind: str, base: Path) -> None:
    def gradients(**values: Any) -> dict[str, torch.Tensor]:
        student = make_student(kind, base, **values)
        model = student.start().train()
        sum(WeightedLosses(student.recipe.losses)(outputs_of(student, model)).values()).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    whole, again = gradients(), gradients(recompute=True, texts_at_once=2)
    for name, gradient in whole.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in whole.values())


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_gives_the_same_weights(
    kind: str, fit: Trained, resumed_equals: Trained, base: Path, by_words: Path
) -> None:
    development = {"against": "teacher", "documents": 4, "times": 3}
    values = {"inputs": {"scores": [by_words]}, **recipe(kind, base, steps=6, development=development)}
    resumed_equals(fit, values, goes_on_from=2)


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_that_cannot_be(kind: str, base: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"losses": [{"kind": "embedding"}]}, "cannot learn 'embedding'"),
        ({"losses": [{"kind": "info-nce"}]}, "cannot learn 'info-nce' over the batch"),
        ({"query_length": None}, "query_length"),
        ({"lora": {}}, "trained as a whole"),
        ({"max_length": 64}, "unknown key 'max_length'"),
    ]
    for change, message in changes:
        with pytest.raises(RecipeError, match=message):
            make_student(kind, base, **change)


def test_onnx_backends_are_refused(fit: Trained, base: Path, collection: Collection, tmp_path: Path) -> None:
    model = fit(inputs={}, **recipe("tk", base, steps=0))
    values = {"kind": "cross-encoder", "model": str(model.path), "backend": "onnx"}
    with pytest.raises(InputError, match="cannot be exported"):
        score(
            tiny.write_recipe(tmp_path / "onnx.yaml", values),
            collection=collection,
            candidates=["qrels:dev"],
            out=tmp_path / "scores",
        )
