"""Inference-free students: queries by hand from the IDF, documents through the network, targets of an ensemble."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
import tiny_scores
import tiny_sparse

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, OutputExistsError, RecipeError, RetrievalKDError
from retrieval_kd.models.load import Model
from retrieval_kd.models.sparse_encoder import SparseEncoder
from retrieval_kd.recipe import validate
from retrieval_kd.students.sparsity import PATIENCE
from retrieval_kd.students.splade_doc import SpladeDocStudent
from retrieval_kd.teachers.ensemble import ensemble_scores

Trained = Callable[..., Model]
PENALTY = {"document": {"weight": 1e-3}}
W = 5
"""The id of ``w0``."""


@pytest.fixture(scope="module")
def masked(shared: Path) -> Path:
    return tiny_encoders.make_masked_model(shared / "splade-doc-base")


@pytest.fixture
def train_doc(fit: Trained, masked: Path, scores: Path) -> Trained:
    def run(**values: Any) -> Model:
        recipe = {
            "kind": "splade-doc",
            "base": str(masked),
            "regularisation": PENALTY,
            "losses": [{"kind": "kl", "teacher_temperature": 0.05}],
        }
        return fit(**{"inputs": {"scores": [scores]}, **recipe, **values})

    return run


def stock(path: Path) -> Any:
    from sentence_transformers import SparseEncoder as Stock

    return Stock(str(path))


def with_active_terms(base: Path) -> Path:
    """``base`` with logits raised by 2: most terms have a gradient."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["cls.predictions.bias"] += 2
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def idf_by_hand(word: str) -> float:
    df = sum(word in tiny.document_text(row).split() for row in range(tiny.DOCUMENTS))
    return math.log(1 + (tiny.DOCUMENTS - df + 0.5) / (df + 0.5)) if df else 1.0


def encoded(model: Any, texts: list[str], task: str) -> np.ndarray:
    encode = model.encode_query if task == "query" else model.encode_document
    return np.asarray(encode(texts, convert_to_sparse_tensor=False))


def test_queries_are_looked_up_and_scores_are_sums(train_doc: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word counts once however often it occurs, unknown words not at all; no network runs for a query."""
    model = train_doc(steps=3)
    loaded = stock(model.path)
    documents = encoded(loaded, [tiny.document_text(7)], "document")[0]
    network = loaded[0].sub_modules["document"][0].auto_model
    ids = [W + int(word[1:]) for word in tiny.document_text(7).split()]
    expected = np.log1p(tiny_sparse.heads_of(network, [2, *ids, 3]).max(axis=0))
    np.testing.assert_allclose(documents, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(network, "forward", lambda *_, **__: pytest.fail("a network ran for a query"))
    queries = encoded(loaded, ["w7 w7 w47 nowhere w39", "", "w7"], "query")
    assert np.flatnonzero(queries[0]).tolist() == [W + 7, W + 39, W + 47]
    for word in ("w7", "w39", "w47"):
        assert queries[0][W + int(word[1:])] == pytest.approx(idf_by_hand(word), rel=1e-5)
    assert not queries[1].any()
    score = sum(idf_by_hand(f"w{word}") * documents[W + word] for word in (7, 39, 47))
    assert float(queries[0] @ documents) == pytest.approx(score, rel=1e-5)
    assert model.manifest.counts["tokens_without_idf"] == 68 - 5 - sum(
        any(word in tiny.document_text(row).split() for row in range(40)) for word in tiny.WORDS
    )


def test_learns_from_a_heterogeneous_ensemble(train_doc: Trained, collection: Collection, tmp_path: Path) -> None:
    """Two teachers, one of hundreds and one of fractions, that agree on each query's own document: it comes first.

    The target is min-max over a query, mean, times 30: 30 for that document, less for the others.
    """
    rows = [(query, [f"d{(i + j) % 40:02d}" for j in range(6)]) for i, query in enumerate(collection.queries("train"))]
    members = {}
    for name, values in (("dense", [0.9, 0.8, 0.1, 0.5, 0.3, 0.2]), ("sparse", [700, 300, 500, 400, 350, 320])):
        made = [(query, ids, values, None) for query, ids in rows]
        members[name] = tiny_scores.make_scores(tmp_path / name, made, inputs={"collection": collection.ref()})
    target = ensemble_scores("teachers/ensemble-heterogeneous", members, out=tmp_path / "ensemble")
    assert next(iter(target)).scores[0] == pytest.approx(30, abs=1e-3)
    base = str(with_active_terms(tiny_encoders.make_masked_model(tmp_path / "base")))
    values = {"base": base, "inputs": {"scores": [target.path]}, "losses": [{"kind": "kl"}]}
    model = train_doc(**values, steps=60, batch_size=15, learning_rate=2e-2, activation="log1p")

    def ranked_first(path: Path) -> float:
        loaded = stock(path)
        documents = encoded(loaded, [tiny.document_text(row) for row in range(tiny.DOCUMENTS)], "document")
        queries = encoded(loaded, list(collection.queries("train").values()), "query")
        pools = [
            documents[[int(doc_id[1:]) for doc_id in ids]] @ query
            for (_, ids), query in zip(rows, queries, strict=True)
        ]
        return float(np.mean([pool.argmax() == 0 for pool in pools]))

    assert ranked_first(train_doc(**values, steps=0).path) < 0.6
    assert ranked_first(model.path) >= 0.8


def test_development_checkpoints_and_pruning(train_doc: Trained, collection: Collection, masked: Path) -> None:
    """The best checkpoint is loaded again with its routes; scores are those of pruned vectors."""
    pruning = {"document": {"top_terms": 6}}
    model = train_doc(steps=4, pruning=pruning, development={"against": "teacher", "documents": 20, "times": 2})
    assert len(model.manifest.details["development"]["all"]) == 2
    loaded = stock(model.path)
    texts = [tiny.document_text(row) for row in range(4)]
    documents, queries = encoded(loaded, texts, "document"), encoded(loaded, ["w1 w41", "w2"], "query")
    documents = np.where(documents >= np.sort(documents, axis=1)[:, -6:-5], documents, 0)
    recipe = {"kind": "splade-doc", "base": str(masked), "regularisation": PENALTY, "losses": [{"kind": "kl"}]}
    of = SpladeDocStudent(validate(SpladeDocStudent.Recipe, {**recipe, "pruning": pruning}, "made"))
    found = of.development_scores(loaded, ["w1 w41", "w2"], texts)
    np.testing.assert_allclose(found, queries @ documents.T, rtol=1e-5, atol=1e-6)
    ours = SparseEncoder.load(model.path)
    assert ours.encode(texts, "document").lengths.tolist() == [6, 6, 6, 6]
    assert ours.encode(["w1 w41"], "query").lengths.tolist() == [2]


def test_a_given_table_and_the_written_one(
    train_doc: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``w1`` weighs what the table says, others 1; the model's idf.json makes the same queries in another student."""
    table = tiny_sparse.write_table(tmp_path / "given.json", {"w1": 3.5, "[CLS]": 2.0})
    out = tmp_path / "first"
    with caplog.at_level(logging.INFO, "retrieval_kd"):
        model = train_doc(steps=0, idf=str(table), out=out)
    assert "IDF of 1 tokens; 62 others have none and weigh 1" in caplog.messages
    query = encoded(stock(model.path), ["w1 w2"], "query")[0]
    assert query[W + 1] == 3.5 and query[W + 2] == 1 and query.sum() == 4.5
    assert model.manifest.counts["tokens_without_idf"] == 62
    assert "the table given.json, kept; 62 tokens without one weigh 1" in (model.path / "README.md").read_text()
    assert model.settings["trained_on"]["idf"] == model.manifest.inputs["idf"]["fingerprint"]
    written = model.path / "idf.json"
    assert json.loads(written.read_text())["w1"] == 3.5
    again = train_doc(steps=0, idf=str(written))
    np.testing.assert_array_equal(encoded(stock(again.path), ["w1 w2"], "query")[0], query)
    table.write_text('{"w1": 4}')
    with pytest.raises(OutputExistsError):
        train_doc(steps=0, idf=str(table), out=out)


def test_a_table_of_another_vocabulary(train_doc: Trained, tmp_path: Path) -> None:
    table = tiny_sparse.write_table(tmp_path / "given.json", {"w1": 3.5, "##ing": 2.0})
    with pytest.raises(InputError, match=r"1 of its 2 tokens are not among the 68 of the base's tokenizer \('##ing'\)"):
        train_doc(steps=0, idf=str(table))
    with pytest.raises(InputError, match=r"idf: .*nowhere\.json: no such file"):
        train_doc(steps=0, idf=str(tmp_path / "nowhere.json"))


def test_frozen_and_trained_tables(train_doc: Trained) -> None:
    """Frozen, the table stays; else Adam moves a weight by at most its rate a step, and none below 0."""
    start = np.array([0.0] * 5 + [idf_by_hand(word) for word in tiny.WORDS] + [1.0] * 3)

    def table(**values: Any) -> np.ndarray:
        model = train_doc(steps=4, schedule="constant_with_warmup", warmup=0, weight_decay=0, **values)
        return np.asarray(stock(model.path)[0].sub_modules["query"][0].weight.detach())

    np.testing.assert_allclose(table(), start, rtol=1e-5)
    moved = np.abs(table(idf_learning_rate=0.1, learning_rate=1e-5) - start)
    assert 0.1 < moved.max() <= 0.41
    assert table(idf_learning_rate=2.0, learning_rate=1e-5).min() == 0


def test_lengths_prompts_and_more_rows_than_tokens(train_doc: Trained, tmp_path: Path) -> None:
    """Queries are cut at 4 word-pieces, prompt included; rows of the base's vocabulary without a token go."""
    import torch
    from transformers import BertForMaskedLM

    base = tmp_path / "padded"
    torch.manual_seed(0)
    config = tiny.bert_config()
    config.vocab_size = 80
    BertForMaskedLM(config).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    model = train_doc(
        base=str(base),
        steps=2,
        query_length=4,
        document_length=6,
        prompts={"query": "query: ", "document": "passage: "},
    )
    loaded = stock(model.path)
    assert np.flatnonzero(encoded(loaded, ["w3 w1 w2"], "query")[0]).tolist() == [W + 1, W + 3, 65, 67]
    document = encoded(loaded, ["w3 w1 w2"], "document")[0]
    network = loaded[0].sub_modules["document"][0].auto_model
    expected = np.log1p(tiny_sparse.heads_of(network, [2, 66, 67, W + 3, W + 1, 3]).max(axis=0))
    np.testing.assert_allclose(document, expected, rtol=1e-4, atol=1e-5)
    assert len(document) == 68


def test_sparse_documents_are_spared_by_the_threshold(masked: Path, collection: Collection) -> None:
    """Documents with at most 3 active terms do not count; they stay in the mean: (0 + 0 + 4) / 3 a term, 4 terms."""
    import torch

    from retrieval_kd.losses.objective import WeightedLosses
    from retrieval_kd.students.objective import Objective

    recipe = {
        "kind": "splade-doc",
        "base": str(masked),
        "regularisation": {"document": {"weight": 1, "threshold": 3}},
        "losses": [{"kind": "kl"}],
    }
    of = SpladeDocStudent(validate(SpladeDocStudent.Recipe, recipe, "made"))
    of.documents = collection.documents
    loss = of.loss(Objective(of, of.start(), WeightedLosses(of.recipe.losses)))
    vectors = torch.zeros(3, 68)
    vectors[0, :3], vectors[1, 60:61], vectors[2, 10:14] = 9.0, 9.0, 4.0
    found = loss.document_regularizer.compute_loss_from_embeddings(vectors)
    assert float(found) == pytest.approx(4 * (4 / 3) ** 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regularisation": {**PENALTY, "query": {"weight": 1}}}, "a query has the terms of its words"),
        ({"regularisation": {"document": {"kind": "idf-flops", "weight": 1}}}, "would count the IDF twice"),
        ({"lora": {"rank": 4}}, "lora is not possible"),
        ({"idf_learning_rate": 0}, "idf_learning_rate"),
        ({"echo": True}, "unknown key 'echo'"),
    ],
)
def test_recipes_that_cannot_be(change: dict[str, Any], message: str, train_doc: Trained) -> None:
    with pytest.raises(RecipeError, match=message):
        train_doc(**change)


def test_documents_without_a_word_of_any_query_are_a_collapse(train_doc: Trained, tmp_path: Path) -> None:
    """Every document has the two terms [PAD] and [MASK], which no query has: all scores and gradients are 0."""
    from safetensors.torch import load_file, save_file

    base = tiny_encoders.make_masked_model(tmp_path / "strangers")
    weights = load_file(base / "model.safetensors")
    weights["cls.predictions.bias"] -= 100
    weights["cls.predictions.bias"][[0, 4]] += 200
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    message = rf"training collapsed: in {PATIENCE} batches in a row no document had a term of a query.*temperature"
    with pytest.raises(RetrievalKDError, match=message):
        train_doc(base=str(base), steps=PATIENCE, batch_size=2)
    train_doc(base=str(base), steps=PATIENCE - 1, batch_size=2)
