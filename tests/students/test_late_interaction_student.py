from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
import torch

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.losses.objective import WeightedLosses
from retrieval_kd.models.load import Model
from retrieval_kd.recipe import validate
from retrieval_kd.students.base import Batch
from retrieval_kd.students.late_interaction import LateInteractionStudent

Trained = Callable[..., Model]

QUERIES = ["w1 w2", "w3 w44 w55 w6 w7 w8"]
DOCUMENTS = ["w1 w9", "w2 : w3 w4 w5 : w8 w10", "w44", "w7 w8 w6 w3 w55 w12 w13 w14"]
COLUMN = [[0, 1, 2], [3, 1, 0]]
PRESENT = [[True, True, True], [True, True, False]]


@pytest.fixture(scope="session")
def plain(shared: Path) -> Path:
    return tiny.make_transformer(shared / "late-interaction-plain", hidden_dropout_prob=0.0)


@pytest.fixture(scope="session")
def multi_vector(shared: Path) -> Path:
    return tiny_encoders.make_multi_vector(
        shared / "late-interaction-base", expansion={"strategy": "fixed", "length": 6}, skiplist=[":"]
    )


@pytest.fixture
def learn(fit: Trained, plain: Path) -> Trained:
    """Trains a tiny ColBERT of 8 dimensions."""

    def run(**values: Any) -> Model:
        fresh = {} if "base" in values else {"base": str(plain), "dimension": 8}
        return fit(**{"kind": "late-interaction", "losses": [{"kind": "kl"}], **fresh, **values})

    return run


def make_student(plain: Path, **values: Any) -> LateInteractionStudent:
    recipe = {"kind": "late-interaction", "base": str(plain), "dimension": 8, "losses": [{"kind": "kl"}], **values}
    return LateInteractionStudent(validate(LateInteractionStudent.Recipe, recipe, "made"))


def made_batch() -> Batch:
    present = np.array(PRESENT)
    teacher = np.where(present, np.array([[5.0, 1.0, 0.0], [2.0, 3.0, np.nan]]), np.nan).astype(np.float32)
    return Batch(QUERIES, DOCUMENTS, np.array(COLUMN), present, teacher, np.zeros((2, 4), dtype=bool))


def labels_of(batch: Batch) -> dict[str, Any]:
    names = ("column", "present", "teacher", "relevant")
    return {name: torch.from_numpy(getattr(batch, name)) for name in names}


def features_of(student: LateInteractionStudent, model: Any, batch: Batch) -> list[dict[str, Any]]:
    """As the trainer's ``collect_features`` takes them apart."""
    from sentence_transformers.base.trainer import BaseTrainer

    return list(BaseTrainer.collect_features(None, student.tokenize(model, batch))[0])


def outputs_of(student: LateInteractionStudent, model: Any) -> Any:
    batch = made_batch()
    return student.outputs(model, {}, features_of(student, model, batch), labels_of(batch))


def stock_matrices(model: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token vectors as stock sentence-transformers encodes them."""
    return (
        [x.numpy() for x in model.encode_query(QUERIES, show_progress_bar=False)],
        [x.numpy() for x in model.encode_document(DOCUMENTS, show_progress_bar=False)],
    )


def max_sim(queries: Sequence[np.ndarray], documents: Sequence[np.ndarray]) -> np.ndarray:
    """Σ over query tokens of the greatest dot product, pair by pair."""
    return np.array([[(q @ d.T).max(axis=1).sum() for d in documents] for q in queries])


def xtr(queries: Sequence[np.ndarray], documents: Sequence[np.ndarray], top_k: int) -> np.ndarray:
    """A document's retrieved maxima, summed and divided by the query tokens that retrieved some token of it."""
    owner = np.concatenate([np.full(len(d), i) for i, d in enumerate(documents)])
    scores = np.zeros((len(queries), len(documents)))
    for i, query in enumerate(queries):
        retrieved = np.zeros(len(documents))
        for similarities in query @ np.concatenate(documents).T:
            found = np.argsort(-similarities)[:top_k]
            for document in set(owner[found].tolist()):
                scores[i, document] += similarities[found][owner[found] == document].max()
                retrieved[document] += 1
        scores[i] /= np.maximum(retrieved, 1)
    return scores


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "expanded": {"query_expansion": {"length": 6}, "query_length": 7, "document_length": 8},
    "attended": {"query_expansion": {"length": 6, "strategy": "fixed", "attend": True}},
    "markers": {
        "prompts": {"query": "[Q] ", "document": "[D] "},
        "special_tokens": ["[Q]", "[D]"],
        "similarity": "dot",
        "skip_punctuation": False,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_scores_in_training_are_those_of_the_encoded_texts(options: dict[str, Any], plain: Path) -> None:
    """Group by group and over the batch: by hand from stock ``encode``, with its masks; parts of 2 texts, in order."""
    student = make_student(plain, texts_at_once=2, **options)
    model = student.start().eval()
    queries, documents = stock_matrices(model)
    if "query_expansion" in options:
        assert len(queries[0]) == 6 and len(queries[1]) == (7 if "query_length" in options else 6)
    words = 9 if options.get("skip_punctuation") is False else 7
    assert len(documents[1]) == (6 if "document_length" in options else words + ("prompts" in options) + 2 - 1)
    expected = max_sim(queries, documents)
    found = outputs_of(student, model)
    assert found.batch_scores is None
    np.testing.assert_allclose(
        found.scores.detach(), np.take_along_axis(expected, np.array(COLUMN), axis=1) * np.array(PRESENT), atol=1e-5
    )
    over_batch = outputs_of(make_student(plain, losses=[{"kind": "info-nce"}], **options), model)
    np.testing.assert_allclose(over_batch.batch_scores.detach(), expected, atol=1e-5)
    np.testing.assert_allclose(student.development_scores(model, QUERIES, DOCUMENTS), expected, atol=1e-5)


def test_mean_divides_by_query_tokens(plain: Path) -> None:
    student = make_student(plain, scoring="mean", query_expansion={"length": 6})
    model = student.start().eval()
    queries, documents = stock_matrices(model)
    expected = max_sim(queries, documents) / np.array([[6], [8]])
    np.testing.assert_allclose(outputs_of(student, model).scores[0].detach(), expected[0, :3], atol=1e-5)
    np.testing.assert_allclose(student.development_scores(model, QUERIES, DOCUMENTS), expected, atol=1e-5)
    assert model.similarity_fn_name == "meanmaxsim"


@pytest.mark.parametrize("top_k", [2, 7, 1000])
def test_xtr_counts_the_best_tokens_of_the_batch(top_k: int, plain: Path) -> None:
    student = make_student(plain, scoring="xtr", top_k=top_k, query_expansion={"length": 6})
    model = student.start().eval()
    expected = xtr(*stock_matrices(model), top_k)
    found = outputs_of(student, model)
    np.testing.assert_allclose(found.batch_scores.detach(), expected, atol=1e-5)
    np.testing.assert_allclose(found.scores[0].detach(), expected[0, :3], atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "margin-mse"])
def test_losses_equal_those_of_sentence_transformers(kind: str, plain: Path) -> None:
    """The same texts with as many columns as documents, where no slot is empty."""
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorDistillKLDivLoss, MultiVectorMarginMSELoss

    term = {"kind": "kl", "temperature": 0.25} if kind == "kl" else {"kind": kind}
    student = make_student(plain, losses=[term], query_expansion={"length": 6})
    model = student.start().eval()
    teacher = torch.tensor([[5.0, 1.0, 0.0], [2.0, 3.0, 1.0]])
    labels = labels_of(made_batch()) | {"teacher": teacher, "present": torch.ones(2, 3, dtype=torch.bool)}
    ours = WeightedLosses(student.recipe.losses)(
        student.outputs(model, {}, features_of(student, model, made_batch()), labels)
    )
    columns = [[DOCUMENTS[row[j]] for row in COLUMN] for j in range(3)]
    features = [
        model.preprocess(QUERIES, task="query"),
        *(model.preprocess(texts, task="document") for texts in columns),
    ]
    stock = MultiVectorDistillKLDivLoss(model, temperature=0.25) if kind == "kl" else MultiVectorMarginMSELoss(model)
    assert ours[kind].item() == pytest.approx(stock(features, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"scoring": "xtr", "top_k": 5}], ids=["maxsim", "xtr"])
def test_recomputing_gives_the_same_gradients(options: dict[str, Any], plain: Path) -> None:
    def gradients(**values: Any) -> list[torch.Tensor]:
        student = make_student(plain, query_expansion={"length": 6}, **options, **values)
        model = student.start().eval()
        sum(WeightedLosses(student.recipe.losses)(outputs_of(student, model)).values()).backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    whole, again = gradients(), gradients(recompute=True, texts_at_once=2)
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in whole)
    for one, other in zip(whole, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_kl_follows_the_teacher(
    learn: Trained, scores: Path, teacher: Path, collection: Collection, tmp_path: Path
) -> None:
    """The loss falls to less than half, and stock sentence-transformers gives the scores of the development pool."""
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

    values: dict[str, Any] = {
        "losses": [{"kind": "kl", "teacher_temperature": 0.02, "student_temperature": 0.25}],
        "query_expansion": {"length": 6},
        "query_length": 7,
        "document_length": 9,
        "prompts": {"query": "query: ", "document": "passage: "},
    }
    model = learn(inputs={"scores": [scores]}, steps=40, batch_size=15, learning_rate=2e-2, **values)
    log = tiny.losses(model.path)
    assert np.mean(log[-5:]) < np.mean(log[:5]) / 2
    stock = MultiVectorEncoder(str(model.path))
    assert stock.prompts["query"] == "query: " and (stock[0].query_length, stock[0].document_length) == (7, 9)
    queries, documents = list(collection.queries("train").values()), list(collection.documents.iter_texts())
    q, d = stock.encode_query(queries), stock.encode_document(documents)
    similarities = stock.similarity(q, d).numpy()
    student = make_student(model.path, dimension=None, **values)
    np.testing.assert_array_equal(student.development_scores(stock, queries, documents), similarities)
    goal_model = SentenceTransformer(str(teacher))
    goal = goal_model.similarity(goal_model.encode_query(queries), goal_model.encode_document(documents)).numpy()
    untrained = make_student(learn(inputs={}, steps=0, **values).path, dimension=None).start()
    before = student.development_scores(untrained, queries, documents)

    def agreement(found: np.ndarray) -> float:
        rows = [(i, [(i + j) % 40 for j in range(6)]) for i in range(30)]
        return float(np.mean([np.corrcoef(found[i, own], goal[i, own])[0, 1] for i, own in rows]))

    assert agreement(similarities) > agreement(before) + 0.2
    expected = {"kind": "late-interaction", "similarity": "maxsim", "scoring": "maxsim", "token_pooling": None}
    assert expected.items() <= model.settings.items()
    assert model.problems() == []


@pytest.mark.parametrize(
    "options",
    [
        {"losses": [{"kind": "info-nce"}]},
        {"scoring": "xtr", "top_k": 20, "losses": [{"kind": "info-nce", "temperature": 0.1}]},
    ],
    ids=["maxsim", "xtr"],
)
def test_info_nce_ranks_the_positive_first(
    options: dict[str, Any], learn: Trained, candidates: Path, collection: Collection
) -> None:
    from sentence_transformers import MultiVectorEncoder

    groups = {"documents": 4, "positive": "qrels"}
    values = {"inputs": {"candidates": candidates}, "groups": groups, "losses": [{"kind": "info-nce"}], **options}
    trained = learn(**values, steps=40, batch_size=15, learning_rate=1e-2)
    first = []
    for model in (learn(**values, steps=0), trained):
        stock = MultiVectorEncoder(str(model.path))
        queries = stock.encode_query(list(collection.queries("train").values()))
        best = stock.similarity(queries, stock.encode_document(list(collection.documents.iter_texts()))).argmax(dim=1)
        first.append(float((best.numpy() == np.arange(30)).mean()))
    assert first[0] < 0.6 and first[1] >= 0.9


def test_pooled_documents(learn: Trained, scores: Path, collection: Collection) -> None:
    """Of 6 tokens [CLS] stays and 5 become ⌊5 / 2⌋ = 2; the same weights give the same scores up to the pooling."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    values: dict[str, Any] = {"inputs": {"scores": [scores]}, "losses": [{"kind": "kl"}], "steps": 4}
    pooled = learn(**values, token_pooling={"factor": 2})
    whole = learn(**values)
    assert tiny.losses(pooled.path) == tiny.losses(whole.path)
    small, full = MultiVectorEncoder(str(pooled.path)), MultiVectorEncoder(str(whole.path))
    texts = list(collection.documents.iter_texts())
    assert [len(full.encode_document(texts[9])), len(small.encode_document(texts[9]))] == [6, 3]
    queries = list(collection.queries("train").values())
    q = small.encode_query(queries)
    found = small.similarity(q, small.encode_document(texts)).numpy()
    expected = full.similarity(q, full.encode_document(texts)).numpy()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8
    afterwards = HierarchicalTokenPooling(2.0).pool(full.encode_document(texts))
    np.testing.assert_allclose(found, full.similarity(q, afterwards).numpy(), atol=1e-5)
    student = make_student(whole.path, dimension=None, token_pooling={"factor": 2})
    np.testing.assert_allclose(student.development_scores(full, queries, texts), found, atol=1e-5)
    assert pooled.settings["token_pooling"] == 2
    taught = learn(**values, token_pooling={"factor": 2, "in_training": True})
    assert tiny.losses(taught.path) != tiny.losses(whole.path)
    assert len(MultiVectorEncoder(str(taught.path)).encode_document(texts[9])) == 3


def test_late_interaction_killed_and_resumed_gives_the_same_weights(
    learn: Trained, resumed_equals: Trained, scores: Path
) -> None:
    values: dict[str, Any] = {
        "inputs": {"scores": [scores]},
        "losses": [{"kind": "kl", "teacher_temperature": 0.05}],
        "steps": 6,
        "special_tokens": ["[Q]"],
        "prompts": {"query": "[Q] "},
        "query_expansion": {"length": 6},
        "development": {"against": "teacher", "documents": 20, "times": 3},
    }
    resumed_equals(learn, values, goes_on_from=2, files=("model.safetensors", "1_Dense/model.safetensors"))


def test_special_tokens_are_one_token_each(learn: Trained) -> None:
    from sentence_transformers import MultiVectorEncoder

    markers = {"query": "[Q] ", "document": "[D] "}
    model = learn(inputs={}, steps=0, prompts=markers, special_tokens=["[Q]", "[D]"])
    stock = MultiVectorEncoder(str(model.path))
    ids = stock.preprocess(["w1"], prompt=stock.prompts["query"], task="query")["input_ids"][0].tolist()
    assert stock.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "[Q]", "w1", "[SEP]"]
    assert stock[0].auto_model.get_input_embeddings().num_embeddings == 70
    assert len(stock.encode_document("w1 :")) == 4


def test_a_multi_vector_base_is_kept(learn: Trained, multi_vector: Path) -> None:
    from sentence_transformers import MultiVectorEncoder

    base = MultiVectorEncoder(str(multi_vector))
    kept = MultiVectorEncoder(str(learn(inputs={}, steps=0, base=str(multi_vector)).path))
    for mine, theirs in zip(stock_matrices(kept), stock_matrices(base), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
    longer = learn(inputs={}, steps=0, base=str(multi_vector), query_expansion={"length": 9}, layers=[0])
    stock = MultiVectorEncoder(str(longer.path))
    assert len(stock.encode_query("w1")) == 9 and stock[0].auto_model.config.num_hidden_layers == 1
    with pytest.raises(RecipeError, match=r"dimension: the base .* is a late-interaction model already"):
        learn(inputs={}, steps=0, base=str(multi_vector), dimension=4)
    with pytest.raises(RecipeError, match=r"compares by maxsim; set scoring=maxsim"):
        learn(inputs={}, steps=0, base=str(multi_vector), scoring="mean")
    pooled = learn(inputs={}, steps=0, base=str(multi_vector), token_pooling={"factor": 2})
    with pytest.raises(RecipeError, match=r"token_pooling: .* pools its tokens"):
        learn(inputs={}, steps=0, base=str(pooled.path), token_pooling={"factor": 2})


def test_projection_keeps_the_similarities_of_its_base(plain: Path, dense: Path) -> None:
    """At the base's own 16 dimensions the untrained projection only turns the vectors; prompts are taken over."""
    student = make_student(dense, dimension=16, similarity="dot", prompts={"query": "query: "})
    model = student.start().eval()
    features = model.preprocess(DOCUMENTS, task="document")
    hidden = model[0](dict(features))["token_embeddings"].detach()
    projected = model[1](dict(model[0](dict(features))))["token_embeddings"].detach()
    np.testing.assert_allclose(projected @ projected.mT, hidden @ hidden.mT, rtol=1e-4, atol=1e-4)
    assert model.prompts["query"] == "query: "


def test_a_document_without_a_token_to_compare_is_refused(shared: Path) -> None:
    base = tiny_encoders.make_multi_vector(shared / "keeps-w1", keep_only=[5 + 1])
    student = make_student(base, dimension=None)
    with pytest.raises(InputError, match="a document of the batch has no token"):
        outputs_of(student, student.start())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [{"kind": "embedding"}]}, "cannot learn 'embedding'"),
        ({"losses": [{"kind": "mi-alpha"}]}, "cannot learn 'mi-alpha'"),
        ({"scoring": "xtr"}, "top_k"),
        ({"top_k": 5}, "top_k"),
        ({"query_length": 8, "query_expansion": {"length": 32}}, "query_length: 8 is less than"),
        ({"token_pooling": {"factor": 1}}, "greater than 1"),
        ({"special_tokens": ["[Q]"]}, r"'\[Q\]': in no prompt"),
        ({"scoring": "sum"}, "'maxsim', 'mean' or 'xtr'"),
    ],
)
def test_late_interaction_recipes_that_cannot_be(change: dict[str, Any], message: str, learn: Trained) -> None:
    with pytest.raises(RecipeError, match=message):
        learn(inputs={}, steps=0, **change)
