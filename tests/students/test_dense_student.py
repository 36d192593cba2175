from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import tiny_dense
from tiny_dense import features_and_labels, gradients, make_batch, make_student

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.losses.on_scores import info_nce, kl_divergence
from retrieval_kd.models.encode import encode
from retrieval_kd.models.load import Model
from retrieval_kd.recipe import validate
from retrieval_kd.students.dense import DenseStudent
from retrieval_kd.students.development import PoolEvaluator
from retrieval_kd.students.exits import check_exits, embed_exits, exit_of
from retrieval_kd.students.train import train

Trained = Callable[..., Model]
PROMPTS = {"query": "query ", "document": "w7 w8 "}


def stock(path: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", **options)


def cosines(model: Any, collection: Collection) -> np.ndarray:
    """[train queries, documents]."""
    queries = model.encode_query(list(collection.queries("train").values()), show_progress_bar=False)
    documents = model.encode_document(list(collection.documents.iter_texts()), show_progress_bar=False)
    return np.asarray(tiny.unit(queries) @ tiny.unit(documents).T)


def agreement(model: Any, teacher: Path, collection: Collection) -> float:
    """Mean correlation of the cosines of a query with its six candidates."""
    mine, goal = cosines(model, collection), cosines(stock(teacher), collection)
    rows = [[(i + j) % 40 for j in range(6)] for i in range(30)]
    return float(np.mean([np.corrcoef(mine[i, r], goal[i, r])[0, 1] for i, r in enumerate(rows)]))


@pytest.mark.parametrize("base", ["encoder", "decoder"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_pooling_and_prompts_by_hand(base: str, pooling: str, similarity: str, tmp_path: Path) -> None:
    """Each text alone through the bare network, its prompt in front: nothing depends on padding, right or left."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    make = tiny.make_transformer if base == "encoder" else tiny_dense.make_decoder
    folder = make(tmp_path / base)
    student, model, objective = make_student(
        folder, pooling=pooling, similarity=similarity, prompts=PROMPTS, scale={"initial": 3}, texts_at_once=2
    )
    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def vector(text: str) -> Any:
        states = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = {"mean": states.mean(dim=0), "cls": states[0], "lasttoken": states[-1]}[pooling]
        return pooled / pooled.norm() if similarity == "cosine" else pooled

    queries = torch.stack([vector(PROMPTS["query"] + text) for text in tiny_dense.QUERIES])
    documents = torch.stack([vector(PROMPTS["document"] + text) for text in tiny_dense.DOCUMENTS])
    features, labels = features_and_labels(student, model, make_batch())
    outputs = student.outputs(model, objective.extra, features, labels)
    scale = 3 if similarity == "cosine" else 1
    torch.testing.assert_close(outputs.batch_scores, scale * queries @ documents.T, atol=1e-5, rtol=1e-4)
    found = student.development_scores(model, tiny_dense.QUERIES, tiny_dense.DOCUMENTS)
    torch.testing.assert_close(torch.tensor(found), queries @ documents.T, atol=1e-5, rtol=1e-4)


class TestMatryoshka:
    def test_sum_by_hand(self, dense: Path) -> None:
        """At 16, 8 and 4 dimensions with weights 1, 0.5 and 2: cosines of the cut vectors, times the scale."""
        import torch

        settings = {"matryoshka": {"dimensions": [4, 8], "weights": [2, 0.5]}, "scale": {"initial": 5}}
        student, model, objective = make_student(dense, **settings)
        features, labels = features_and_labels(student, model, make_batch())
        loss = student.loss(objective)(features, labels)
        queries, documents = (
            torch.from_numpy(encode(texts))
            for encode, texts in (
                (model.encode_query, tiny_dense.QUERIES),
                (model.encode_document, tiny_dense.DOCUMENTS),
            )
        )
        expected = 0.0
        for dimension, weight in ((16, 1.0), (8, 0.5), (4, 2.0)):
            q, d = (torch.nn.functional.normalize(x[:, :dimension], dim=1) for x in (queries, documents))
            scores = 5 * q @ d.T
            kl = kl_divergence(scores.gather(1, labels["column"]), labels["teacher"], labels["present"])
            expected += weight * float(
                kl + info_nce(scores, labels["column"][:, 0], torch.ones(2, 3, dtype=torch.bool))
            )
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)

    def test_recompute_gives_the_same_gradients(self, dense: Path) -> None:
        import torch

        found = []
        for recompute in (False, True):
            student, model, objective = make_student(
                dense, matryoshka={"dimensions": [4]}, recompute=recompute, texts_at_once=2
            )
            loss = student.loss(objective)(*features_and_labels(student, model, make_batch()))
            found.append(gradients(objective, loss))
        assert found[0].keys() == found[1].keys() and "extra.log_scale" in found[0]
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)

    def test_cut_vectors_find_the_positive(
        self, fit: Trained, candidates: Path, dense: Path, collection: Collection
    ) -> None:
        model = fit(
            inputs={"candidates": candidates},
            groups={"documents": 4, "positive": "qrels"},
            losses=[{"kind": "info-nce"}],
            matryoshka={"dimensions": [6]},
            steps=40,
            batch_size=15,
            learning_rate=1e-2,
        )

        def found(path: Path) -> float:
            best = cosines(stock(path, truncate_dim=6), collection).argmax(axis=1)
            return float((best == np.arange(30)).mean())

        assert found(dense) < 0.2 < 0.5 < found(model.path)
        assert stock(model.path, truncate_dim=6).encode(["w1"]).shape == (1, 6)
        assert model.settings["dimensions"] == [6]
        assert "truncate_dim=6" in (model.path / "README.md").read_text()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"similarity": "dot"}, "compared by cosine"),
            ({"exits": [1]}, "one of matryoshka and exits"),
            ({"losses": [{"kind": "embedding"}]}, "vectors of one length"),
            ({"losses": [{"kind": "taid"}]}, "not 'taid'"),
            ({"matryoshka": {"dimensions": [4, 4]}}, "different numbers"),
            ({"matryoshka": {"dimensions": [4], "weights": [1, 2]}}, "one number above 0 for each"),
        ],
    )
    def test_refusals(self, values: dict[str, Any], message: str) -> None:
        given = {"kind": "dense", "base": "x", "losses": [{"kind": "kl"}], "matryoshka": {"dimensions": [4]}, **values}
        with pytest.raises(RecipeError, match=message):
            validate(DenseStudent.Recipe, given, "made")

    def test_longer_than_the_vectors(self, dense: Path) -> None:
        with pytest.raises(RecipeError, match="the model's vectors have 16"):
            make_student(dense, matryoshka={"dimensions": [17]})


class TestExits:
    @pytest.mark.parametrize("kind", ["bert", "decoder", "modern-bert"])
    def test_an_exit_is_the_model_cut_off(self, kind: str, tmp_path: Path) -> None:
        import torch

        makers: dict[str, Callable[[Path], Path]] = {
            "bert": lambda folder: tiny.make_transformer(folder, layers=3),
            "decoder": tiny_dense.make_decoder,
            "modern-bert": tiny_dense.make_modern_bert,
        }
        _, model, _ = make_student(makers[kind](tmp_path / kind), pooling="lasttoken" if kind == "decoder" else "mean")
        with torch.no_grad():
            found = embed_exits(model, model.preprocess(tiny_dense.DOCUMENTS), [1])
        np.testing.assert_allclose(found[:, 0], exit_of(model, 1).encode(tiny_dense.DOCUMENTS), atol=1e-5)
        np.testing.assert_allclose(found[:, 1], model.encode(tiny_dense.DOCUMENTS), atol=1e-5)
        assert not np.allclose(found[:, 0], found[:, 1], atol=0.1)

    def test_losses_by_hand(self, tmp_path: Path) -> None:
        """Three exits weigh 1/3, 2/3 and 1; the KL from the last to the others counts 0.5 each."""
        import torch

        base = tiny.make_dense(tmp_path / "deep", layers=3)
        student, model, objective = make_student(
            base, exits=[2, 1], exit_weight=0.5, scale={"initial": 5}, losses=[{"kind": "kl"}]
        )
        features, labels = features_and_labels(student, model, make_batch())
        losses = student.loss(objective)(features, labels)

        def scores(encoder: Any) -> Any:
            q = torch.from_numpy(tiny.unit(encoder.encode_query(tiny_dense.QUERIES)))
            return 5 * q @ torch.from_numpy(tiny.unit(encoder.encode_document(tiny_dense.DOCUMENTS))).T

        def kl(of: Any) -> float:
            return float(kl_divergence(of.gather(1, labels["column"]), labels["teacher"], labels["present"]))

        every = torch.ones(2, 3, dtype=torch.bool)
        last = scores(model)
        expected = {"kl": kl(last)}
        for layers, share in ((1, 1 / 3), (2, 2 / 3)):
            here = scores(exit_of(model, layers))
            expected[f"exit-{layers}/kl"] = share * kl(here)
            expected[f"exit-{layers}/last"] = 0.5 * float(kl_divergence(here, last, every))
        assert {key: float(value.detach()) for key, value in losses.items()} == pytest.approx(expected, rel=1e-4)

    def test_the_last_layer_learns_nothing_from_exits(self, tmp_path: Path) -> None:
        student, model, objective = make_student(tiny.make_dense(tmp_path / "deep", layers=3), exits=[1])
        losses = student.loss(objective)(*features_and_labels(student, model, make_batch()))
        touched = gradients(model, losses["exit-1/last"])
        assert any("layer.0." in name for name in touched)
        assert not any("layer.1." in name or "layer.2." in name for name in touched)

    def test_recompute_gives_the_same_gradients(self, dense: Path) -> None:
        import torch

        found = []
        for recompute in (False, True):
            student, model, objective = make_student(dense, exits=[1], recompute=recompute, texts_at_once=2)
            losses = student.loss(objective)(*features_and_labels(student, model, make_batch()))
            found.append(gradients(objective, torch.stack(list(losses.values())).sum()))
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)

    def test_an_exit_is_served_alone(
        self, fit: Trained, scores: Path, teacher: Path, dense: Path, collection: Collection, tmp_path: Path
    ) -> None:
        model = fit(
            inputs={"scores": [scores]},
            losses=[{"kind": "kl", "teacher_temperature": 0.05}],
            exits=[1],
            steps=40,
            prompts={"query": "query "},
        )
        start = agreement(exit_of(stock(dense), 1), teacher, collection)
        assert agreement(stock(model.path / "exit-1"), teacher, collection) > start + 0.2
        whole, alone = stock(model.path), stock(model.path / "exit-1")
        assert (len(whole[0].auto_model.encoder.layer), len(alone[0].auto_model.encoder.layer)) == (2, 1)
        np.testing.assert_allclose(alone.encode_query(["w1"]), exit_of(whole, 1).encode_query(["w1"]), atol=1e-6)
        vectors = encode(model.path / "exit-1", collection, tmp_path / "vectors")
        np.testing.assert_allclose(
            vectors.matrix[:2], alone.encode_document(collection.documents.texts([0, 1])), atol=1e-5
        )
        assert model.settings["exits"] == [1] and "`exit-1`" in (model.path / "README.md").read_text()
        row = tiny.log_rows(model.path)[0]
        parts = [float(row[key]) for key in ("kl", "exit-1/kl", "exit-1/last")]
        assert float(row["loss"]) == pytest.approx(sum(parts), abs=2e-3)

    @pytest.mark.parametrize("exits", [[0], [2], [1, 1]])
    def test_no_such_exit(self, exits: list[int], dense: Path) -> None:
        with pytest.raises(RecipeError, match="different numbers of layers, from 1 to 1"):
            make_student(dense, exits=exits)

    def test_an_unknown_ending_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, model, _ = make_student(tiny_dense.make_decoder(tmp_path / "decoder"), pooling="lasttoken")
        monkeypatch.setattr("retrieval_kd.students.exits._FINAL_NORMS", ())
        with pytest.raises(RecipeError, match="ends in a way that is not known"):
            check_exits(model, [1])


class TestLora:
    VALUES: ClassVar[dict[str, Any]] = {
        "losses": [{"kind": "kl", "teacher_temperature": 0.05}],
        "pooling": "lasttoken",
        "prompts": PROMPTS,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "gradient_checkpointing": True,
        "learning_rate": 2e-2,
    }

    def test_a_decoder_learns_and_is_merged(
        self, fit: Trained, scores: Path, teacher: Path, collection: Collection, tmp_path: Path, monkeypatch: Any
    ) -> None:
        base = tiny_dense.make_decoder(tmp_path / "decoder")
        model = fit(inputs={"scores": [scores]}, base=str(base), steps=60, **self.VALUES)
        start = fit(inputs={}, base=str(base), **{**self.VALUES, "steps": 0})
        log = tiny.losses(model.path)
        assert np.mean(log[-5:]) < np.mean(log[:5]) / 2
        monkeypatch.setitem(sys.modules, "peft", None)
        loaded = stock(model.path)
        assert loaded.tokenizer.padding_side == "left" and loaded.prompts["query"] == PROMPTS["query"]
        assert agreement(loaded, teacher, collection) > agreement(stock(start.path), teacher, collection) + 0.2
        assert not list(model.path.rglob("adapter*"))
        before, after = tiny.weights(start.path), tiny.weights(model.path)
        changed = {name for name in before if (before[name] != after[name]).any()}
        assert before.keys() == after.keys() and changed == {name for name in before if "_proj" in name}

    @pytest.mark.parametrize("layers", [None, [1]])
    def test_resumed_is_undisturbed_and_the_best_is_kept(
        self, layers: list[int] | None, fit: Trained, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values: dict[str, Any] = {
            **self.VALUES,
            "inputs": {"scores": [scores]},
            "base": str(tiny_dense.make_decoder(tmp_path / "decoder")),
            "layers": layers,
            "steps": 6,
            "development": {"against": "teacher", "documents": 20, "times": 3},
        }
        measured: list[float] = []
        monkeypatch.setattr(PoolEvaluator, "__call__", lambda *_, **__: {"development": measured.pop(0)})
        measured[:] = [0.1, 0.9, 0.3]
        undisturbed = fit(out=tmp_path / "undisturbed", **values)
        measured[:] = [0.1, 0.2, 0.3]
        last = fit(out=tmp_path / "last", **{**values, "weight_decay": 0.01 + 1e-9})

        def dies(self: PoolEvaluator, model: Any, output_path: Any = None, epoch: float = -1, steps: int = -1) -> Any:
            if steps == 4:
                raise KeyboardInterrupt
            return {"development": 0.1}

        with monkeypatch.context() as patch:
            patch.setattr(PoolEvaluator, "__call__", dies)
            with pytest.raises(KeyboardInterrupt):
                fit(out=tmp_path / "student", **values)
        measured[:] = [0.9, 0.3]
        resumed = fit(out=tmp_path / "student", **values)
        for name, weights in tiny.weights(undisturbed.path).items():
            np.testing.assert_array_equal(weights, tiny.weights(resumed.path)[name])
        assert resumed.settings == undisturbed.settings != last.settings
        best, worse = tiny.weights(undisturbed.path), tiny.weights(last.path)
        assert not all(np.allclose(best[name], worse[name], atol=1e-4) for name in best)


class TestRepresentations:
    def test_mi_alpha_with_a_narrower_teacher(
        self, fit: Trained, scores: Path, collection: Collection, tmp_path: Path
    ) -> None:
        """The teacher has 8 dimensions, the student 16: the bound on their mutual information rises."""
        narrow = tiny_dense.make_narrow(tmp_path / "narrow")
        vectors = [
            encode(narrow, collection, tmp_path / "documents").path,
            encode(narrow, collection, tmp_path / "queries", queries="train").path,
        ]
        inputs = {"scores": [scores], "teacher_vectors": vectors}
        log = tiny.losses(fit(inputs=inputs, losses=[{"kind": "mi-alpha"}], steps=30).path)
        assert np.mean(log[-5:]) < np.mean(log[:5]) - 1

    def test_relations_are_of_the_last_layer(self, dense: Path, teacher: Path) -> None:
        import torch

        student, model, objective = make_student(
            dense,
            losses=[{"kind": "minilm-relations", "heads": 4}],
            relations_from=str(teacher),
            texts_at_once=2,
        )
        features, labels = features_and_labels(student, model, make_batch())
        outputs = student.outputs(model, objective.extra, features, labels)
        assert outputs.relations is not None and outputs.token_mask is not None
        # queries first, then documents; [CLS] and [SEP] around the words
        assert outputs.token_mask.sum(dim=1).tolist() == [5, 3, 3, 7, 4]
        texts = [*tiny_dense.QUERIES, *tiny_dense.DOCUMENTS]
        for side, network in enumerate((model[0].auto_model, stock(teacher)[0].auto_model.eval())):
            for text, row in zip(texts, range(5), strict=True):
                encoded = model.tokenizer(text, return_tensors="pt")
                below = network(**encoded, output_hidden_states=True).hidden_states[-2][0]
                attention = network.encoder.layer[-1].attention.self
                for pair, name in zip(outputs.relations, ("query", "key", "value"), strict=True):
                    torch.testing.assert_close(
                        pair[side][row][: len(below)], getattr(attention, name)(below), atol=1e-5, rtol=1e-4
                    )
        plain, *_ = (
            make_student(dense)[0].outputs(model, objective.extra, *features_and_labels(student, model, make_batch())),
        )
        torch.testing.assert_close(outputs.batch_scores, plain.batch_scores)

    @pytest.mark.parametrize("recompute", [False, True])
    def test_relations_are_learned(self, recompute: bool, fit: Trained, scores: Path, teacher: Path) -> None:
        model = fit(
            inputs={"scores": [scores]},
            losses=[{"kind": "minilm-relations", "heads": 4}],
            relations_from=str(teacher),
            recompute=recompute,
            steps=30,
        )
        log = tiny.losses(model.path)
        assert np.mean(log[-5:]) < np.mean(log[:5]) / 2
        assert len(model.manifest.inputs["relations_from"]["fingerprint"]) == 64

    def test_refusals(self, dense: Path, teacher: Path, tmp_path: Path) -> None:
        losses = [{"kind": "minilm-relations", "heads": 4}]
        given = {"kind": "dense", "base": "x", "losses": losses}
        with pytest.raises(RecipeError, match="relations_from"):
            validate(DenseStudent.Recipe, given, "made")
        decoder = tiny_dense.make_decoder(tmp_path / "decoder")
        with pytest.raises(InputError, match="another tokenizer"):
            make_student(dense, losses=losses, relations_from=str(decoder))
        with pytest.raises(InputError, match="no attention with query, key and value layers"):
            make_student(decoder, losses=losses, relations_from=str(decoder), pooling="lasttoken")
        with pytest.raises(InputError, match="reads 64 tokens, the student up to 100"):
            make_student(dense, losses=losses, relations_from=str(teacher), document_length=100)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dense-matryoshka", ["matryoshka={dimensions: [8, 4]}"]),
        ("dense-exits", ["exits=[1]"]),
        ("dense-llm-lora", []),
    ],
)
def test_recipes(
    name: str, overrides: list[str], scores: Path, dense: Path, collection: Collection, tmp_path: Path
) -> None:
    base = tiny_dense.make_decoder(tmp_path / "decoder") if "llm" in name else dense
    common = [f"base={base}", "steps=2", "batch_size=4", "development={against: nothing}"]
    model = train(
        name, collection=collection, scores=[scores], out=tmp_path / "student", overrides=[*common, *overrides]
    )
    assert [row["step"] for row in tiny.log_rows(model.path) if row["loss"]] == ["1", "2"]
