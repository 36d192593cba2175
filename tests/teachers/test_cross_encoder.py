from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.scores import Scores, write_shard
from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.teachers import score as driver
from retrieval_kd.teachers.score import score


def write_recipe(folder: Path, model: Path, **values: object) -> str:
    defaults = {"kind": "cross-encoder", "model": str(model), "pairs_per_shard": 12}
    return tiny.write_recipe(folder / "cross.yaml", {**defaults, **values})


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_logits_are_the_cross_encoders_own(
    collection: Collection, candidates: Path, cross_encoder: Path, tmp_path: Path
) -> None:
    """In batches of 5 with padding or one by one: the same logits, without the sigmoid."""
    import torch
    from sentence_transformers import CrossEncoder

    recipe = write_recipe(tmp_path, cross_encoder, batch_size=5)
    scores = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    model = CrossEncoder(str(cross_encoder))
    texts = collection.queries("train")
    outside = 0
    for row in list(scores)[::7]:
        for doc_id, value in zip(row.doc_ids, row.scores, strict=True):
            pair = (texts[row.query_id], tiny.document_text(int(doc_id[1:])))
            own = model.predict([pair], activation_fn=torch.nn.Identity(), show_progress_bar=False)[0]
            assert value == pytest.approx(float(own), abs=1e-5)
            outside += not 0 <= value <= 1
    assert outside > 0
    assert scores.score_kind == "logit"
    assert scores.manifest.details["max_length"] == 32
    assert scores.manifest.counts["shards"] == 15


def test_two_outputs_are_refused(collection: Collection, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny.make_cross_encoder(tmp_path / "two", outputs=2))
    with pytest.raises(InputError, match="has 2 outputs; a cross-encoder teacher has one"):
        score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "scores")


def test_truncation_is_counted_for_each_pair(
    collection: Collection, candidates: Path, cross_encoder: Path, tmp_path: Path
) -> None:
    """A pair is [CLS] 2 words [SEP] 4 words [SEP]: 9 tokens, so that at 8 each of 180 loses one."""
    recipe = write_recipe(tmp_path, cross_encoder, max_length=8)
    scores = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    counts = scores.manifest.counts
    assert (counts["truncated_texts"], counts["tokens_lost"]) == (180, 180)
    assert scores.manifest.details["max_length"] == 8


def test_nan_names_the_pair_and_keeps_finished_shards(collection: Collection, candidates: Path, tmp_path: Path) -> None:
    """The weights of w7 are NaN. Two queries a shard: d07 is first met by train-2, in the second shard."""
    model = tiny.spoil(tiny.make_cross_encoder(tmp_path / "spoilt"))
    recipe = write_recipe(tmp_path, model)
    with pytest.raises(RetrievalKDError, match=r"NaN or infinite scores for 2 .* pairs: 'train-2/d07', 'train-3/d07'"):
        score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
    assert sorted(shard_bytes(tmp_path / "scores.partial")) == ["shard-00000-of-00015.parquet"]


def test_truncated_shard_is_scored_again(
    collection: Collection,
    candidates: Path,
    cross_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = write_recipe(tmp_path, cross_encoder, max_length=8)
    undisturbed = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "undisturbed")
    written: list[str] = []

    def stops_after_four(
        path: Path,
        ids: Sequence[str],
        docs: Sequence[Sequence[str]],
        values: Sequence[np.ndarray],
        lost: dict[str, int],
    ) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, ids, docs, values, lost)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "write_shard", stops_after_four)
        with pytest.raises(KeyboardInterrupt):
            score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    broken = tmp_path / "scores.partial" / written[1]
    broken.write_bytes(broken.read_bytes()[:-30])
    with caplog.at_level(logging.INFO, "retrieval_kd"):
        resumed = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    assert f"{written[1]}: damaged score shard" in caplog.text and "scoring it again" in caplog.text
    assert "going on after 3 of 15 shards" in caplog.text
    assert shard_bytes(resumed.path) == shard_bytes(undisturbed.path)
    assert resumed.manifest.counts == undisturbed.manifest.counts
    assert resumed.fingerprint == undisturbed.fingerprint


def test_killed_five_times_gives_the_same_bytes(
    collection: Collection, shared: Path, cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments, each after at least one new shard. One server process imports torch for all runs."""
    candidates = tiny.make_candidates(shared, collection, depth=20)
    recipe = write_recipe(tmp_path, cross_encoder, pairs_per_shard=20, batch_size=1)
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
