"""SPLADE students: what they learn, their penalties and schedule, the head they start with, the echo model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
import tiny_sparse

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import RecipeError, RetrievalKDError
from retrieval_kd.models.load import Model
from retrieval_kd.models.sparse_encoder import SparseEncoder
from retrieval_kd.recipe import validate
from retrieval_kd.students.sparsity import PATIENCE, SparseLoss
from retrieval_kd.students.splade import SpladeStudent

Trained = Callable[..., Model]
PENALTIES = {"document": {"weight": 1e-3}, "query": {"kind": "l1", "weight": 1e-3}}
LOSS = {"kind": "kl", "teacher_temperature": 0.05}


@pytest.fixture(scope="module")
def masked(shared: Path) -> Path:
    return tiny_encoders.make_masked_model(shared / "splade-base")


@pytest.fixture
def train_splade(fit: Trained, masked: Path, scores: Path) -> Trained:
    def run(**values: Any) -> Model:
        recipe = {"kind": "splade", "base": str(masked), "regularisation": PENALTIES, "losses": [LOSS]}
        return fit(**{"inputs": {"scores": [scores]}, **recipe, **values})

    return run


@pytest.fixture
def weights_of_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, float | None]]]:
    """Document's and query's penalty weights in each forward pass."""
    seen: list[tuple[float, float | None]] = []
    forward = SparseLoss.forward

    def remember(self: SparseLoss, *arguments: Any) -> Any:
        seen.append((self.document_regularizer_weight, self.query_regularizer_weight))
        return forward(self, *arguments)

    monkeypatch.setattr(SparseLoss, "forward", remember)
    yield seen


def stock(path: Path, **options: Any) -> Any:
    from sentence_transformers import SparseEncoder as Stock

    return Stock(str(path), **options)


def similarities(model: Any, queries: list[str], documents: list[str]) -> np.ndarray:
    """As stock sentence-transformers has them."""
    dense = {"convert_to_sparse_tensor": False}
    return np.asarray(model.similarity(model.encode_query(queries, **dense), model.encode_document(documents, **dense)))


def texts_of(collection: Collection) -> tuple[list[str], list[str]]:
    return list(collection.queries("train").values())[:5], list(collection.documents.iter_texts())[:7]


def student(**values: Any) -> SpladeStudent:
    recipe = {"kind": "splade", "base": "none", "regularisation": PENALTIES, "losses": [LOSS], **values}
    return SpladeStudent(validate(SpladeStudent.Recipe, recipe, "made"))


def test_scores_are_learned_and_vectors_become_sparse(train_splade: Trained) -> None:
    """KL falls to less than half, and a strong penalty leaves documents less than half of their terms."""
    strong = {"document": {"weight": 0.03}, "query": {"kind": "l1", "weight": 0.01}, "warmup": 0.1}
    model = train_splade(steps=40, regularisation=strong)
    rows = tiny.log_rows(model.path)[:-1]
    kl = [float(row["kl"]) for row in rows]
    assert np.mean(kl[-5:]) < np.mean(kl[:5]) / 2
    documents = [float(row["document_terms"]) for row in rows]
    assert documents[-1] < documents[0] / 2
    assert all(0 < float(row["query_terms"]) <= 68 for row in rows)
    for row in rows[1:]:
        parts = [float(row[key]) for key in ("kl", "document_regularizer", "query_regularizer")]
        assert float(row["loss"]) == pytest.approx(sum(parts), abs=2e-3)


def test_stock_sentence_transformers_gives_the_same_scores(train_splade: Trained, collection: Collection) -> None:
    """With prompts and lengths; ours, stock's and those by hand from the network alone."""
    prompts = {"query": "query: ", "document": "passage: "}
    model = train_splade(steps=3, query_length=5, document_length=6, prompts=prompts)
    loaded = stock(model.path)
    assert loaded.prompts["query"] == "query: " and loaded.similarity_fn_name == "dot"
    assert (loaded[0].query_length, loaded[0].document_length) == (5, 6)
    queries, documents = texts_of(collection)
    expected = similarities(loaded, queries, documents)
    found = student().development_scores(loaded, queries, documents)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    query, passage, colon, w0, w40 = 65, 66, 67, 5, 45
    one = tiny_sparse.heads_of(loaded[0].auto_model, [2, query, colon, w0, 3]).max(axis=0)
    other = tiny_sparse.heads_of(loaded[0].auto_model, [2, passage, colon, w0, w40, 3]).max(axis=0)
    assert found[0, 0] == pytest.approx(float(one @ other), rel=1e-5)
    settings = {key: model.settings[key] for key in ("kind", "similarity", "head")}
    assert settings == {"kind": "splade", "similarity": "dot", "head": "the base's own"}


def test_pruning_is_written_and_done_by_the_encoder(train_splade: Trained, collection: Collection) -> None:
    """Of a document the 5 heaviest terms above 0.2, of a query the 3 heaviest."""
    pruning = {"document": {"top_terms": 5, "threshold": 0.2}, "query": {"top_terms": 3}}
    model = train_splade(steps=2, pruning=pruning)
    assert model.settings["pruning"] == {
        "document": {"top_terms": 5, "threshold": 0.2},
        "query": {"top_terms": 3, "threshold": 0.0},
    }
    queries, documents = texts_of(collection)
    loaded = stock(model.path)
    whole = loaded.encode_document(documents, convert_to_sparse_tensor=False).numpy()
    q = loaded.encode_query(queries, convert_to_sparse_tensor=False).numpy()
    kept = np.where(whole >= np.maximum(np.sort(whole, axis=1)[:, -5:-4], 0.2), whole, 0)
    q = np.where(q >= np.sort(q, axis=1)[:, -3:-2], q, 0)
    found = student(pruning=pruning).development_scores(loaded, queries, documents)
    np.testing.assert_allclose(found, q @ kept.T, rtol=1e-5, atol=1e-6)
    ours = SparseEncoder.load(model.path).encode(documents, "document")
    np.testing.assert_array_equal(ours.lengths, (kept > 0).sum(axis=1))
    np.testing.assert_allclose(ours.weights, kept[kept > 0], rtol=1e-5)


def objective_of(base: Path, **values: Any) -> tuple[SparseLoss, list[dict[str, Any]], dict[str, Any]]:
    """A loss over 2 queries and 5 documents of different lengths, its features and labels."""
    import torch

    from retrieval_kd.losses.objective import WeightedLosses
    from retrieval_kd.students.base import Batch
    from retrieval_kd.students.objective import Objective

    of = student(base=str(base), **values)
    model = of.start().eval()
    column = np.array([[0, 1, 2], [2, 3, 4]])
    texts = [tiny.document_text(3), "w1", "w2 w3 w4 w5 w6 w7", "w9 w41", "w7 w8 w9"]
    batch = Batch(["w3 w43", "w9"], texts, column, np.ones((2, 3), bool), np.zeros((2, 3)), np.zeros((2, 5), bool))
    features = of.tokenize(model, batch)
    parts = [
        {key.removeprefix(f"{task}_"): value for key, value in features.items() if key.startswith(f"{task}_")}
        for task in ("query", "document")
    ]
    labels = {
        "query": torch.arange(2),
        "column": torch.from_numpy(column),
        "present": torch.ones(2, 3, dtype=torch.bool),
        "teacher": torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]),
        "relevant": torch.zeros(2, 5, dtype=torch.bool),
    }
    loss = of.loss(Objective(of, model, WeightedLosses(of.recipe.losses)))
    assert isinstance(loss, SparseLoss)
    return loss, parts, labels


def test_losses_are_those_of_splade_loss(masked: Path) -> None:
    """In parts of 2 texts as sentence-transformers' own in one; every term of it, penalties by hand too."""
    from sentence_transformers.sparse_encoder.losses import SpladeLoss

    penalties = {"document": {"weight": 0.3}, "query": {"kind": "l1", "weight": 0.7}}
    loss, features, labels = objective_of(masked, regularisation=penalties, texts_at_once=2)
    mine = loss(features, labels)
    expected = SpladeLoss.forward(loss, features, labels)
    names = ["kl", "document_regularizer_loss", "query_regularizer_loss"]
    found = [mine["kl"], mine["document_regularizer"], mine["query_regularizer"]]
    assert [v.item() for v in found] == pytest.approx([expected[name].item() for name in names], rel=1e-5)
    documents = loss.model(dict(features[1]))["sentence_embedding"]
    assert mine["document_regularizer"].item() == pytest.approx(0.3 * float(documents.detach().mean(0).square().sum()))
    assert loss.terms.taken()["document_terms"] == pytest.approx(float((documents > 0).sum(1).float().mean()), abs=0.01)


def test_recomputed_activations_give_the_same_gradients(masked: Path) -> None:
    import torch

    gradients = []
    for recompute in (False, True):
        loss, features, labels = objective_of(masked, recompute=recompute, texts_at_once=2)
        loss.model.train()
        torch.manual_seed(0)  # for dropout
        torch.stack(list(loss(features, labels).values())).sum().backward()
        gradients.append({name: p.grad for name, p in loss.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_anti_zero_of_both_sides(masked: Path) -> None:
    loss, features, labels = objective_of(masked, regularisation={**PENALTIES, "anti_zero": 5})
    found = loss(features, labels)["anti_zero"].item()
    sums = [float(loss.model(dict(part))["sentence_embedding"].detach().sum()) for part in features]
    assert found == pytest.approx(5 / sums[0] ** 2 + 5 / sums[1] ** 2, rel=1e-4)


def test_idf_flops_by_the_collections_idf(masked: Path, collection: Collection) -> None:
    """w50 to w52 are in most documents, each w0 to w39 in one: ln(40.5 / 1.5 + ...) by the formula."""
    of = student(base=str(masked), regularisation={**PENALTIES, "document": {"kind": "idf-flops", "weight": 1}})
    of.documents = collection.documents
    coefficients = of._coefficients(of.start()).numpy()
    df = sum("w3" in tiny.document_text(row).split() for row in range(40))
    assert df == 1 and coefficients[5 + 3] == pytest.approx(1 / np.log(1 + 39.5 / 1.5) ** 2, rel=1e-5)
    df = sum("w51" in tiny.document_text(row).split() for row in range(40))
    assert coefficients[5 + 51] == pytest.approx(1 / np.log(1 + (40.5 - df) / (df + 0.5)) ** 2, rel=1e-5)
    assert coefficients[0] == coefficients.max() and len(coefficients) == 68


@pytest.mark.parametrize(("schedule", "power"), [("quadratic", 2), ("linear", 1)])
def test_penalties_grow_to_their_weight(
    schedule: str, power: int, train_splade: Trained, weights_of_steps: list[tuple[float, float | None]]
) -> None:
    """Warm-up over 3 of 5 steps."""
    train_splade(regularisation={**PENALTIES, "schedule": schedule, "warmup": 0.6}, steps=5, batch_size=2)
    expected = [1e-3 * min(1, step / 3) ** power for step in range(5)]
    assert [document for document, _ in weights_of_steps] == pytest.approx(expected)
    assert [query for _, query in weights_of_steps] == pytest.approx(expected)


def test_killed_and_resumed_gives_the_same_bytes(
    train_splade: Trained, resumed_equals: Trained, weights_of_steps: list[tuple[float, float | None]]
) -> None:
    """The weights of the penalties go on where the last checkpoint was, in the middle of their warm-up."""
    values: dict[str, Any] = {
        "steps": 6,
        "regularisation": {**PENALTIES, "warmup": 0.9},
        "development": {"against": "teacher", "documents": 20, "times": 3},
    }
    resumed_equals(train_splade, values, goes_on_from=2)
    whole = weights_of_steps[:6]
    assert weights_of_steps == [*whole, *whole[:4], *whole[2:]]


def test_collapse_is_an_error(train_splade: Trained, tmp_path: Path) -> None:
    """The base's output bias is -100: nothing is active from the start."""
    from safetensors.torch import load_file, save_file

    base = tiny_encoders.make_masked_model(tmp_path / "dead")
    weights = load_file(base / "model.safetensors")
    weights["cls.predictions.bias"] -= 100
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    message = (
        r"training collapsed: 0\.00 active terms a query on average, below 1 in 10 batches in a row.*"
        r"lower regularisation\.query\.weight or learning_rate"
    )
    with pytest.raises(RetrievalKDError, match=message):
        train_splade(base=str(base), steps=PATIENCE, batch_size=2)
    train_splade(base=str(base), steps=PATIENCE - 1, batch_size=2)


def test_a_base_without_a_head_gets_the_word_embeddings(
    train_splade: Trained, dense: Path, collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the 68 words are active at first; log, manifest, settings and card say what the head was."""
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        model = train_splade(base=str(dense), steps=0)
    assert "the head starts as tied word embeddings (the base has no trained masked-LM head)" in caplog.text
    for said in (model.settings["head"], model.manifest.details["head"], (model.path / "README.md").read_text()):
        assert "bias set on 40 documents to 34 active terms each" in said
    loaded = stock(model.path)
    terms = (loaded.encode_document(texts_of(collection)[1], convert_to_sparse_tensor=False) > 0).sum(dim=1)
    assert 20 < float(terms.float().mean()) < 48


def test_layers_and_divided_head(train_splade: Trained, masked: Path) -> None:
    """With steps: 0 the logits are a sixteenth; one layer of two remains."""
    model = train_splade(steps=0, layers=[1], head_divisor=16)
    weights, start = tiny.weights(model.path), tiny.weights(masked)
    name = "cls.predictions.transform.LayerNorm.weight"
    np.testing.assert_allclose(weights[name] * 16, start[name], rtol=1e-6)
    assert not any("layer.1." in key for key in weights)


@pytest.mark.parametrize("make", [tiny_encoders.make_splade, tiny_encoders.make_inference_free])
def test_a_sparse_model_is_trained_further(make: Any, train_splade: Trained, tmp_path: Path) -> None:
    base = make(tmp_path / "sparse")
    model = train_splade(base=str(base), steps=0)
    start = tiny.weights(tmp_path / "sparse-plain")
    assert all((value == start[name]).all() for name, value in tiny.weights(model.path).items())


def test_echo_with_adapters(train_splade: Trained, tmp_path: Path, collection: Collection, scores: Path) -> None:
    """A causal model learns the teacher's order with LoRA; the adapters are merged and stock loads the result."""
    model = train_splade(
        base=str(tiny_sparse.make_causal(tmp_path / "llama")),
        echo=True,
        lora={"rank": 8, "alpha": 32, "dropout": 0},
        steps=40,
        learning_rate=2e-2,
        document_length=8,
        prompts={"query": "query: "},
    )
    kl = [float(row["kl"]) for row in tiny.log_rows(model.path)[:-1]]
    assert np.mean(kl[-5:]) < np.mean(kl[:5]) * 0.7
    loaded = stock(model.path, trust_remote_code=True)
    assert not [name for name in tiny.weights(model.path) if "lora" in name]
    queries, documents = texts_of(collection)
    found = student(echo=True).development_scores(loaded, queries, documents)
    np.testing.assert_allclose(found, similarities(loaded, queries, documents), rtol=1e-4, atol=1e-5)
    ids = [5, 45, 55, 55]
    assert tiny.document_text(0) == "w0 w40 w50 w50"
    by_hand = tiny_sparse.heads_of(loaded[0].model, [2, *ids, *ids])[5:].max(axis=0)
    np.testing.assert_allclose(loaded.encode_document(documents[:1]).to_dense()[0], by_hand, rtol=1e-4, atol=1e-5)
    assert "trust_remote_code=True" in (model.path / "README.md").read_text()


def test_echo_batches_are_cut_into_parts(tmp_path: Path) -> None:
    """The forward pass of a batch, in parts of 2 padded on the left, gives what each text gives alone."""
    import torch

    loss, features, _ = objective_of(tiny_sparse.make_causal(tmp_path / "llama"), echo=True, texts_at_once=2)
    of = loss.loss.student
    vectors = of.embed(loss.model, features[1]).detach()
    alone = [loss.model.encode_document([text], convert_to_sparse_tensor=False)[0] for text in ("w1", "w7 w8 w9")]
    torch.testing.assert_close(vectors[[1, 4]], torch.stack(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regularisation": {"document": {"weight": 1}}}, r"regularisation\.query is missing"),
        (
            {"regularisation": {**PENALTIES, "document": {"kind": "l1", "weight": 1, "threshold": 9}}},
            "threshold is for",
        ),
        ({"regularisation": {**PENALTIES, "document": {"weight": 0}}}, "weight"),
        ({"regularisation": {**PENALTIES, "warmup": 0}}, "warmup"),
        ({"pruning": {"document": {"top_terms": 0}}}, "top_terms"),
        ({"echo": True, "head_divisor": 16}, "head_divisor is for masked language models"),
        ({"similarity": "cosine"}, "unknown key 'similarity'"),
    ],
)
def test_recipes_that_cannot_be(change: dict[str, Any], message: str, train_splade: Trained) -> None:
    with pytest.raises(RecipeError, match=message):
        train_splade(**change)
