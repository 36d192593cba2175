from __future__ import annotations

import multiprocessing
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.scores import Scores
from retrieval_kd.errors import InputError, MissingExtraError, RecipeError, RetrievalKDError
from retrieval_kd.recipe import validate
from retrieval_kd.teachers.base import Candidates, ScoringJob
from retrieval_kd.teachers.cross_encoder import CrossEncoderTeacher, _some_pairs
from retrieval_kd.teachers.score import score


def write_recipe(folder: Path, model: Path, **values: object) -> str:
    defaults = {"kind": "cross-encoder", "model": str(model), "pairs_per_shard": 12}
    return tiny.write_recipe(folder / "cross.yaml", {**defaults, **values})


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def teacher(model: Path, **keys: Any) -> CrossEncoderTeacher:
    return CrossEncoderTeacher(CrossEncoderTeacher.Recipe(kind="cross-encoder", model=str(model), **keys))


def shard_of(collection: Collection) -> tuple[list[Candidates], list[list[str]]]:
    """Three queries with 6, 1 and 4 documents of 4 words; their texts."""
    queries = collection.queries("train")
    shard = [
        Candidates(name, queries[name], np.arange(start, stop))
        for name, start, stop in (("train-0", 0, 6), ("train-3", 30, 31), ("train-9", 7, 11))
    ]
    return shard, [collection.documents.texts(query.rows) for query in shard]


def predicted(model: Any, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """What `CrossEncoder.predict` says of the same pairs, without the sigmoid."""
    import torch

    pairs = [(query.text, text) for query, of_query in zip(shard, texts, strict=True) for text in of_query]
    return np.asarray(model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False))


def cross_encoder_at(path: Path, **keys: Any) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(path), **keys)


@pytest.mark.parametrize("batch_tokens", [None, 1, 30])
def test_logits_are_the_cross_encoders_own(
    collection: Collection, cross_encoder: Path, batch_tokens: int | None
) -> None:
    """All in one batch, one by one, or three by three."""
    shard, texts = shard_of(collection)
    scorer = teacher(cross_encoder, batch_tokens=batch_tokens)
    scores, lost = scorer.score(shard, texts)
    expected = predicted(cross_encoder_at(cross_encoder), shard, texts)
    assert [len(values) for values in scores] == [len(values) for values in lost] == [6, 1, 4]
    assert {values.dtype.name for values in scores} == {"float32"} and {v.dtype.name for v in lost} == {"int32"}
    np.testing.assert_allclose(np.concatenate(scores), expected, atol=1e-5)
    assert ((expected < 0) | (expected > 1)).any()
    assert np.concatenate(lost).sum() == 0
    assert scorer.score_kind == "logit"
    assert scorer.details() == {
        "model": str(cross_encoder),
        "revision": None,
        "max_length": 32,
        "dtype": "float32",
        "backend": "torch",
        "prompt": None,
    }


def test_the_same_shard_gives_the_same_bytes(collection: Collection, cross_encoder: Path) -> None:
    """Another teacher gives the same bytes; a part of the shard, down to one pair, the same scores up to rounding."""
    shard, texts = shard_of(collection)
    first, again = (np.concatenate(teacher(cross_encoder).score(shard, texts).scores) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    part = [Candidates("train-9", shard[2].text, shard[2].rows[2:3])]
    np.testing.assert_allclose(teacher(cross_encoder).score(part, [texts[2][2:3]]).scores[0], first[9:10], atol=1e-5)


def test_nothing_is_loaded_before_the_first_shard(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers

    monkeypatch.setattr(sentence_transformers, "CrossEncoder", lambda *_, **__: pytest.fail("loaded"))
    assert teacher(cross_encoder).ref().to_json(cross_encoder)["fingerprint"]


def test_truncation_is_that_of_predict_and_counted_for_each_pair(collection: Collection, cross_encoder: Path) -> None:
    """[CLS] 2 words [SEP] 4 words [SEP] are 9 tokens. Of 6 and 4 words one token goes from the 6, then from both."""
    shard, texts = shard_of(collection)
    scorer = teacher(cross_encoder, max_length=8)
    scores, lost = scorer.score(shard, texts)
    model = cross_encoder_at(cross_encoder, max_length=8)
    np.testing.assert_allclose(np.concatenate(scores), predicted(model, shard, texts), atol=1e-5)
    assert np.concatenate(lost).tolist() == [1] * 11
    assert scorer.details()["max_length"] == 8
    shard = [Candidates("long", "w1 w2 w3 w4 w5 w6", np.arange(3))]
    texts = [["w7 w8 w9 w10", "w11", "w7 w8 w9 w10 w11 w12 w13"]]
    scores, lost = scorer.score(shard, texts)
    np.testing.assert_allclose(scores[0], predicted(model, shard, texts), atol=1e-5)
    assert lost[0].tolist() == [6 + 4 + 3 - 8, 6 + 1 + 3 - 8, 6 + 7 + 3 - 8]


def test_a_tokenizer_without_a_length_is_cut_at_the_positions(cross_encoder: Path, tmp_path: Path) -> None:
    """64 positions; [CLS] 1 word [SEP] 70 words [SEP] are 74 tokens."""
    shutil.copytree(cross_encoder, tmp_path / "endless")
    tiny.tokenizer(max_length=10**30).save_pretrained(tmp_path / "endless")
    scorer = teacher(tmp_path / "endless")
    shard, texts = [Candidates("q", "w1", np.arange(1))], [["w2 w3 w4 w5 w6 w7 w8 " * 10]]
    scores, lost = scorer.score(shard, texts)
    assert lost[0].tolist() == [10] and scorer.details()["max_length"] == 64
    np.testing.assert_allclose(
        scores[0], predicted(cross_encoder_at(cross_encoder, max_length=64), shard, texts), atol=1e-5
    )


def test_empty_texts_are_scored(cross_encoder: Path) -> None:
    shard = [Candidates("empty", "", np.arange(2)), Candidates("full", "w1", np.arange(1))]
    texts = [["w2 w3", ""], [""]]
    scores, lost = teacher(cross_encoder).score(shard, texts)
    expected = predicted(cross_encoder_at(cross_encoder), shard, texts)
    np.testing.assert_allclose(np.concatenate(scores), expected, atol=1e-5)
    assert np.concatenate(lost).tolist() == [0, 0, 0]


def test_the_default_prompt_precedes_the_query(collection: Collection, cross_encoder: Path, tmp_path: Path) -> None:
    model = cross_encoder_at(cross_encoder, prompts={"rank": "query: "}, default_prompt_name="rank")
    model.save_pretrained(str(tmp_path / "prompted"))
    shard, texts = shard_of(collection)
    scorer = teacher(tmp_path / "prompted")
    (first, *_), _ = scorer.score(shard, texts)
    np.testing.assert_allclose(first, predicted(model, shard[:1], texts[:1]), atol=1e-5)
    asked = [Candidates("q", "query: " + shard[0].text, shard[0].rows)]
    np.testing.assert_allclose(first, teacher(cross_encoder).score(asked, texts[:1]).scores[0], atol=1e-5)
    assert scorer.details()["prompt"] == "query: "


def test_bfloat16_scores_are_float32(collection: Collection, cross_encoder: Path) -> None:
    import torch

    shard, texts = shard_of(collection)
    scorer = teacher(cross_encoder, precision="bfloat16", batch_tokens=10_000)
    scores = np.concatenate(scorer.score(shard, texts).scores)
    model = cross_encoder_at(cross_encoder, model_kwargs={"dtype": torch.bfloat16})
    assert scores.dtype == np.float32 and scorer.details()["dtype"] == "bfloat16"
    np.testing.assert_array_equal(scores, predicted(model, shard, texts))
    full = predicted(cross_encoder_at(cross_encoder), shard, texts)
    assert 1e-4 < np.abs(scores - full).max() < 0.2


def test_scores_are_not_continued_in_another_precision(
    collection: Collection, cross_encoder: Path, tmp_path: Path
) -> None:
    job = ScoringJob(collection, shard_of(collection)[0], [], tmp_path)
    teacher(cross_encoder).prepare(job)
    assert (tmp_path / "precision").read_text() == "float32"
    (tmp_path / "precision").write_text("bfloat16")
    with pytest.raises(InputError, match="begun in bfloat16, but precision 'auto' is float32"):
        teacher(cross_encoder).prepare(job)


def test_models_that_cannot_be_this_teacher(collection: Collection, cross_encoder: Path, tmp_path: Path) -> None:
    def refused(model: Path, message: str, **keys: Any) -> None:
        with pytest.raises(InputError, match=message):
            teacher(model, **keys).score(*shard_of(collection))

    refused(tiny.make_cross_encoder(tmp_path / "two", outputs=2), "has 2 outputs; a cross-encoder that ranks has one")
    refused(cross_encoder, "has 64 positions, but max_length is 65; set max_length=64", max_length=65)
    for name, change in (("chat", {"chat_template": "{{ messages[0]['content'] }}"}), ("padless", {"pad_token": None})):
        shutil.copytree(cross_encoder, tmp_path / name)
        tokenizer = tiny.tokenizer()
        for key, value in change.items():
            setattr(tokenizer, key, value)
        tokenizer.save_pretrained(tmp_path / name)
    refused(tmp_path / "chat", "language model that is asked for an answer; use kind: llm-pointwise")
    refused(tmp_path / "padless", "has no padding token")


def test_a_full_gpu_stops_the_run(collection: Collection, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer = teacher(cross_encoder, batch_tokens=30)
    monkeypatch.setattr(scorer._model, "forward", full)
    with pytest.raises(RetrievalKDError, match=r"27 tokens does not fit .* set batch_tokens lower \(it is 30\)"):
        scorer.score(*shard_of(collection))


@pytest.fixture(scope="module")
def exported(shared: Path, collection: Collection, cross_encoder: Path) -> dict[str, ScoringJob]:
    """Jobs whose work folders hold the exported model, by backend."""
    jobs = {}
    for backend in ("onnx", "onnx-int8"):
        (shared / backend).mkdir()
        (shared / backend / "onnx.tmp").mkdir()
        (shared / backend / "onnx.tmp" / "left.over").touch()
        jobs[backend] = ScoringJob(collection, shard_of(collection)[0], [], shared / backend)
        teacher(cross_encoder, backend=backend).prepare(jobs[backend])
    return jobs


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("onnx", "float32", 1e-5), ("onnx-int8", "int8", 0.3)])
def test_exported_models(
    exported: dict[str, ScoringJob],
    collection: Collection,
    cross_encoder: Path,
    backend: str,
    dtype: str,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that exported nothing itself: scores near torch's, and the deviation measured on all 11 pairs."""
    monkeypatch.setattr("retrieval_kd.teachers.cross_encoder.export_onnx", lambda *_, **__: pytest.fail("exported"))
    job = exported[backend]
    worker = teacher(cross_encoder, backend=backend, batch_tokens=2048)
    worker.prepare(job)
    shard, texts = shard_of(collection)
    scores, lost = worker.score(shard, texts)
    off = np.abs(np.concatenate(scores) - predicted(cross_encoder_at(cross_encoder), shard, texts))
    assert off.max() < tolerance and np.concatenate(lost).sum() == 0
    details = worker.details()
    assert (details["dtype"], details["backend"], details["max_length"]) == (dtype, backend, 32)
    found = details["deviation_from_torch"]
    assert found["pairs"] == 11 and found["kendall_tau"] > (0.99 if backend == "onnx" else 0.5)
    if backend == "onnx-int8":
        assert off.max() > 1e-4
        np.testing.assert_allclose([found["max"], found["mean"]], [off.max(), off.mean()], rtol=1e-3)
    assert sorted(path.name for path in (job.work / "onnx").iterdir()) == ["deviation.json", "model.onnx"]
    assert not (job.work / "onnx.tmp").exists()


def test_a_wrong_export_stops_the_run(
    collection: Collection, cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session gives every pair 3 more than torch does."""
    import retrieval_kd.teachers.cross_encoder as module

    scorer = teacher(cross_encoder, backend="onnx")
    monkeypatch.setattr(module, "export_onnx", lambda *_, **__: None)
    monkeypatch.setattr(module, "OnnxSession", lambda _: lambda features: scorer._torch_forward(features) + 3)
    with pytest.raises(RetrievalKDError, match="its ONNX export is off by 3 from torch on 11 pairs; use backend=torch"):
        scorer.prepare(ScoringJob(collection, shard_of(collection)[0], [], tmp_path))
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(RetrievalKDError, match=r"exported by prepare\(\)"):
        scorer.score(*shard_of(collection))


def test_pairs_that_torch_cannot_score_say_nothing_about_the_export(
    collection: Collection, cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w7 gives NaN and is in document 7 alone: 10 of 11 pairs are compared."""
    import retrieval_kd.teachers.cross_encoder as module

    spoilt = tiny.spoil(Path(shutil.copytree(cross_encoder, tmp_path / "spoilt")))
    scorer = teacher(spoilt, backend="onnx")
    monkeypatch.setattr(module, "export_onnx", lambda *_, **__: None)
    monkeypatch.setattr(module, "OnnxSession", lambda _: scorer._torch_forward)
    scorer.prepare(ScoringJob(collection, shard_of(collection)[0], [], tmp_path))
    tau = pytest.approx(1)
    assert scorer.details()["deviation_from_torch"] == {"pairs": 10, "max": 0, "mean": 0, "kendall_tau": tau}
    only = [Candidates("q", "w7", np.arange(2))]
    (tmp_path / "other").mkdir()
    with pytest.raises(RetrievalKDError, match="NaN or infinite scores for all of 2 pairs"):
        teacher(spoilt, backend="onnx").prepare(ScoringJob(collection, only, [], tmp_path / "other"))


def test_onnx_recipes_that_cannot_be_right(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"kind": "cross-encoder", "model": str(cross_encoder), "backend": "onnx", "precision": "bfloat16"}
    with pytest.raises(RecipeError, match="precision 'bfloat16' is for backend torch; onnx computes in float32"):
        validate(CrossEncoderTeacher.Recipe, values, "x.yaml")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"'onnxscript'; install it with: pip install 'retrieval-kd\[onnx\]'"):
        teacher(cross_encoder, backend="onnx")


def test_pairs_to_compare_are_spread_over_the_candidates(collection: Collection) -> None:
    """Of 11 pairs (6, 1, 4) the positions 0, 5, 10 for three; all 11 when there are no more."""
    job = ScoringJob(collection, shard_of(collection)[0], [], Path())
    queries, documents = _some_pairs(job, 3)
    assert queries == [job.candidates[i].text for i in (0, 0, 2)]
    assert documents == [tiny.document_text(row) for row in (0, 5, 10)]
    queries, documents = _some_pairs(job, 64)
    assert documents == [tiny.document_text(row) for row in (*range(6), 30, *range(7, 11))]


def test_nan_names_the_document_and_keeps_finished_shards(
    collection: Collection, candidates: Path, tmp_path: Path
) -> None:
    """The weights of w7 are NaN. Two queries a shard: d07 is first met by train-2, in the second shard."""
    recipe = write_recipe(tmp_path, tiny.spoil(tiny.make_cross_encoder(tmp_path / "spoilt")))
    arguments: dict[str, Any] = {"collection": collection, "candidates": [candidates], "out": tmp_path / "scores"}
    with pytest.raises(
        RetrievalKDError, match=r"1 documents or queries could not be scored \(document 'd07': the score"
    ):
        score(recipe, **arguments, max_failed=0)
    assert not (tmp_path / "scores").exists()
    assert sorted(shard_bytes(tmp_path / "scores.partial")) == ["shard-00000-of-00015.parquet"]
    scores = score(recipe, **arguments)
    assert scores.manifest.counts["failed_pairs"] == 6 + 6 - 1, "d07 for six queries, and all documents of train-7"


def test_killed_five_times_gives_the_same_bytes(
    collection: Collection, shared: Path, cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments, each after at least one new shard. One server process imports torch for all runs."""
    candidates = tiny.make_candidates(shared, collection, depth=20)
    recipe = write_recipe(tmp_path, cross_encoder, pairs_per_shard=20, batch_tokens=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retrieval_kd.teachers.score", "sentence_transformers"])

    def start(out: Path) -> multiprocessing.process.BaseProcess:
        arguments = {"collection": collection.path, "candidates": [candidates], "out": out}
        process = context.Process(target=score, args=(recipe,), kwargs=arguments)
        process.start()
        return process

    undisturbed = start(tmp_path / "undisturbed")
    out, partial = tmp_path / "scores", tmp_path / "scores.partial"
    rng = np.random.default_rng(5)
    for _ in range(5):
        before = len(shard_bytes(partial))
        process = start(out)
        wanted = before + int(rng.integers(1, 4))
        while len(list(partial.glob("*.parquet"))) < wanted:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.03)))
        process.kill()
        process.join()
        assert process.exitcode == -9 and not out.exists()
        assert before < len(shard_bytes(partial)) < 30
    last = start(out)
    for process in (last, undisturbed):
        process.join()
        assert process.exitcode == 0
    expected = Scores.load(tmp_path / "undisturbed")
    assert shard_bytes(out) == shard_bytes(expected.path) and len(shard_bytes(out)) == 30
    assert Scores.load(out).fingerprint == expected.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["scores", "undisturbed"]


def test_a_model_without_a_trained_head_is_refused(shared: Path) -> None:
    """Its weights would be random, and other ones in every process."""
    plain = tiny.make_transformer(shared / "plain-for-cross-encoder")
    with pytest.raises(
        InputError, match=r"no trained cross-encoder: its files lack 2 weights \(first: classifier.bias"
    ):
        teacher(plain).details()
