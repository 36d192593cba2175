"""The bi-encoder as teacher, and what all teachers share that encode each text once: resuming, lookup, counting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.merge_scores import merge_scores
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import ArtifactError
from retrieval_kd.models.encode import encode
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.teachers import encoded
from retrieval_kd.teachers.base import Candidates, ScoringJob
from retrieval_kd.teachers.bi_encoder import BiEncoderTeacher
from retrieval_kd.teachers.score import score

# 5 distinct documents: 0, 1, 7, 20, 39.
QUERIES = {"train-3": ("w3 w43", [20, 0, 7]), "train-1": ("w1 w41", [7, 39]), "train-9": ("w9 w49", [1])}


def teacher(model: Path, **values: Any) -> BiEncoderTeacher:
    return tiny_encoders.make_teacher(BiEncoderTeacher, kind="bi-encoder", model=str(model), **values)


@pytest.fixture
def job(collection: Collection, tmp_path: Path) -> ScoringJob:
    return tiny_encoders.make_job(collection, QUERIES, tmp_path / "work")


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseEncoder, "encode", lambda *_: pytest.fail("encoded again"))


@pytest.mark.parametrize(("similarity", "kind"), [("model", "cosine"), ("dot", "dot")])
def test_scores_are_the_models_similarity(similarity: str, kind: str, dense: Path, job: ScoringJob) -> None:
    from sentence_transformers import SentenceTransformer

    bi = teacher(dense, similarity=similarity)
    assert "encoder" not in bi.__dict__ and bi.ref().path == dense and "encoder" not in bi.__dict__
    bi.prepare(job)
    scores, lost = tiny_encoders.score_all(bi, job)
    stock = SentenceTransformer(str(dense), similarity_fn_name=kind)
    for values, of_query, (text, rows) in zip(scores, lost, QUERIES.values(), strict=True):
        own = stock.similarity(stock.encode_query([text]), stock.encode_document([tiny.document_text(r) for r in rows]))
        np.testing.assert_allclose(values, own[0].numpy(), rtol=1e-5, atol=1e-6)
        assert values.dtype == np.float32 and of_query.dtype == np.int32
        assert of_query.tolist() == [0] * len(rows)
    assert bi.score_kind == kind
    facts = {"model": str(dense), "revision": None, "max_length": 32, "query_max_length": 32, "dtype": "float32"}
    assert bi.details() == {**facts, "prompts": {}}


def test_any_part_of_a_shard_scores_the_same(dense: Path, job: ScoringJob) -> None:
    bi = teacher(dense)
    bi.prepare(job)
    whole = tiny_encoders.score_all(bi, job).scores[0]
    for i, row in enumerate(job.candidates[0].rows.tolist()):
        alone = bi.score([Candidates("train-3", "w3 w43", np.array([row]))], [[tiny.document_text(row)]])
        assert alone.scores[0][0] == pytest.approx(whole[i], abs=1e-6)


def test_tokens_lost_are_those_of_query_and_document(collection: Collection, tmp_path: Path) -> None:
    """Query [CLS] query : wA wB [SEP] is 6 tokens, read to 5; document [CLS] passage : and 4 words [SEP] is 8, to 6."""
    model = tiny.make_dense(tmp_path / "short", prompts={"query": "query: ", "document": "passage: "}, lengths=(5, 6))
    job = tiny_encoders.make_job(collection, QUERIES | {"short": ("w1", [3])}, tmp_path / "work")
    bi = teacher(model)
    bi.prepare(job)
    assert [lost.tolist() for lost in tiny_encoders.score_all(bi, job).tokens_lost] == [[3, 3, 3], [3, 3], [3], [2]]
    assert bi.details()["prompts"] == {"query": "query: ", "document": "passage: "}


def test_the_second_worker_encodes_nothing(
    dense: Path, job: ScoringJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = teacher(dense), teacher(dense)
    first.prepare(job)
    forbid_encoding(monkeypatch)
    second.prepare(job)
    for one, other in zip(tiny_encoders.score_all(first, job), tiny_encoders.score_all(second, job), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert {path.name for path in (tmp_path / "work" / "documents").iterdir()} == {
        "vectors",
        "tokens_lost",
        "blocks.json",
    }
    assert (tmp_path / "work" / "documents" / "vectors").stat().st_size == 5 * 16 * 4


def test_killed_encoding_goes_on(dense: Path, job: ScoringJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks of 2 texts: 3 of documents, 2 of queries. Killed after the second, with a part of the third written."""
    undisturbed = teacher(dense)
    undisturbed.prepare(dataclasses.replace(job, work=tmp_path / "undisturbed"))
    monkeypatch.setattr(encoded, "BLOCK", 2)
    seen: list[list[str]] = []
    encode_all = DenseEncoder.encode

    def watched(self: DenseEncoder, texts: Sequence[str], task: str) -> Any:
        seen.append(list(texts))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode_all(self, texts, task)

    monkeypatch.setattr(DenseEncoder, "encode", watched)
    with pytest.raises(KeyboardInterrupt):
        teacher(dense).prepare(job)
    blocks = [[tiny.document_text(i) for i in rows] for rows in ((0, 1), (7, 20), (39,))]
    assert seen == blocks
    with (tmp_path / "work" / "documents" / "vectors").open("ab") as file:
        file.write(b"half a block")
    resumed = teacher(dense)
    resumed.prepare(job)
    assert seen[3:] == [blocks[2], ["w3 w43", "w1 w41"], ["w9 w49"]]
    expected = tiny_encoders.score_all(undisturbed, job)
    tiny_encoders.assert_same(tiny_encoders.score_all(resumed, job), expected, atol=1e-6)


def test_lost_files_are_noticed(dense: Path, job: ScoringJob, tmp_path: Path) -> None:
    teacher(dense).prepare(job)
    (tmp_path / "work" / "documents" / "vectors").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"shorter than its blocks\.json says; delete"):
        teacher(dense).prepare(job)


def test_ready_vectors_are_not_made_again(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: ScoringJob
) -> None:
    """Documents are 6 tokens, read to 5: the tokenizer says so although the network does not run."""
    model = tiny.make_dense(tmp_path / "short", lengths=(None, 5))
    without = teacher(model)
    without.prepare(job)
    ready = [encode(model, collection, tmp_path / "d"), encode(model, collection, tmp_path / "q", queries="train")]
    expected = tiny_encoders.score_all(without, job)
    forbid_encoding(monkeypatch)
    ready_job = dataclasses.replace(job, vectors=ready, work=tmp_path / "other")
    for _ in range(2):
        bi = teacher(model)
        bi.prepare(ready_job)
        found = tiny_encoders.score_all(bi, ready_job)
        tiny_encoders.assert_same(found, expected, atol=1e-6)
        assert [lost.tolist() for lost in found.tokens_lost] == [[1, 1, 1], [1, 1], [1]]
    lengths = np.fromfile(tmp_path / "other" / "document-lengths" / "tokens_lost", dtype=np.int32)
    assert lengths.tolist() == [1] * 5


def test_queries_of_another_split_are_encoded(
    collection: Collection, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors are of train's queries: a dev query among the candidates needs the network."""
    ready = [encode(dense, collection, tmp_path / "q", queries="train")]
    queries = {"dev-1": ("w1 w41", [7, 39]), "train-1": ("w1 w41", [7])}
    job = dataclasses.replace(tiny_encoders.make_job(collection, queries, tmp_path / "work"), vectors=ready)
    bi = teacher(dense)
    bi.prepare(job)
    scores = tiny_encoders.score_all(bi, job).scores
    assert scores[0][0] == pytest.approx(scores[1][0], abs=1e-6)
    forbid_encoding(monkeypatch)
    with pytest.raises(pytest.fail.Exception):
        teacher(dense).prepare(dataclasses.replace(job, work=tmp_path / "other"))


def test_candidates_are_read_one_at_a_time(dense: Path, job: ScoringJob) -> None:
    """`prepare` holds no list of the candidates: it goes through them and asks for single queries."""

    class OnDisk(Sequence[Candidates]):
        def __len__(self) -> int:
            return len(job.candidates)

        def __iter__(self) -> Iterator[Candidates]:
            return iter(job.candidates)

        def __getitem__(self, index: Any) -> Any:
            assert isinstance(index, int)
            return job.candidates[index]

    bi = teacher(dense)
    bi.prepare(dataclasses.replace(job, candidates=OnDisk()))
    assert np.isfinite(np.concatenate(tiny_encoders.score_all(bi, job).scores)).all()


def test_an_empty_text_has_a_score(dense: Path, tmp_path: Path) -> None:
    collection = tiny_encoders.make_collection_of(tmp_path, ["", "w1 w2"])
    job = tiny_encoders.make_job(collection, {"q": ("", [0, 1])}, tmp_path / "work")
    bi = teacher(dense)
    bi.prepare(job)
    assert tiny_encoders.score_all(bi, job).scores[0][0] == pytest.approx(1, abs=1e-6)


def test_a_text_with_nan_makes_its_pairs_nan(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """w7 is NaN: document 7 cannot be encoded, nor the query that has the word; all others are as without them."""
    model = tiny.spoil(tiny.make_dense(tmp_path / "spoilt"))
    queries = {**QUERIES, "bad": ("w7 w41", [0, 39])}
    bi = teacher(model)
    bi.prepare(job := tiny_encoders.make_job(collection, queries, tmp_path / "work"))
    found = [np.isnan(values).tolist() for values in tiny_encoders.score_all(bi, job).scores]
    assert found == [[False, False, True], [True, False], [False], [True, True]]
    assert "a text cannot be encoded: NaN or infinite values: 'w7 w47 w50 w51'" in caplog.text
    again = teacher(model)
    again.prepare(job)
    assert np.isnan(tiny_encoders.score_all(again, job).scores[1]).tolist() == [True, False], "resumed from its files"


def test_a_text_that_cannot_be_read_is_found(
    dense: Path, job: ScoringJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = DenseEncoder.encode

    def fails(self: DenseEncoder, texts: Sequence[str], task: str) -> Any:
        if any("w39" in text for text in texts):
            raise ValueError("unreadable")
        return encode(self, texts, task)

    undisturbed = teacher(dense)
    undisturbed.prepare(dataclasses.replace(job, work=job.work.parent / "undisturbed"))
    monkeypatch.setattr(DenseEncoder, "encode", fails)
    bi = teacher(dense)
    bi.prepare(job)
    for values, expected in zip(
        tiny_encoders.score_all(bi, job).scores, tiny_encoders.score_all(undisturbed, job).scores, strict=True
    ):
        good = ~np.isnan(values)
        np.testing.assert_allclose(values[good], expected[good], atol=1e-6)
    assert np.isnan(tiny_encoders.score_all(bi, job).scores[1]).tolist() == [False, True]
    assert "a text cannot be encoded: ValueError: unreadable: 'w39 w49 w54 w50'" in caplog.text


def test_a_model_that_can_encode_nothing_stops_the_run(
    job: ScoringJob, monkeypatch: pytest.MonkeyPatch, dense: Path
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(DenseEncoder, "encode", fails)
    with pytest.raises(ValueError, match="broken"):
        teacher(dense).prepare(job)


def test_files_that_were_cut_off_are_noticed_before_more_is_written(
    dense: Path, job: ScoringJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half way: without this, zeros would stand where the lost vectors were."""
    monkeypatch.setattr("retrieval_kd.teachers.encoded.BLOCK", 2)
    written: list[Path] = []
    append = encoded._append

    def stops(path: Path, *arguments: Any) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        append(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoded, "_append", stops)
        teacher(dense).prepare(job)
    vectors = job.work / "documents" / "vectors"
    vectors.write_bytes(vectors.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"vectors: shorter than its blocks.json says; delete .*documents"):
        teacher(dense).prepare(job)


def test_a_model_of_another_kind_may_be_read_as_dense(collection: Collection, tmp_path: Path) -> None:
    """A sparse model's transformer with mean pooling: nothing of it is random, so that it is not refused."""
    encoder = teacher(tiny_encoders.make_splade(tmp_path / "splade")).encoder
    assert encoder.encode(["w1"], "document").vectors.shape == (1, 16)


def test_a_model_without_a_length_loses_nothing(collection: Collection, tmp_path: Path) -> None:
    """A table of word vectors reads all of 200 words; its tokenizer is of another kind than a transformer's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = tiny.tokenizer().backend_tokenizer
    table = np.random.default_rng(0).normal(size=(68, 8)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=table)]).save_pretrained(str(tmp_path / "m"))
    long = tiny_encoders.make_collection_of(tmp_path, ["w1 " * 200, "w2"])
    job = tiny_encoders.make_job(long, {"q": ("w1", [0, 1])}, tmp_path / "work")
    bi = teacher(tmp_path / "m")
    bi.prepare(job)
    scores, lost = tiny_encoders.score_all(bi, job)
    np.testing.assert_allclose(scores[0], tiny.unit(table[[6, 7]]) @ tiny.unit(table[6]), atol=1e-6)
    assert lost[0].tolist() == [0, 0]
    assert bi.details()["max_length"] is None


def test_slices_are_the_bytes_of_the_undivided_run(dense: Path, tmp_path: Path) -> None:
    """Texts of very different lengths: what a text is padded to must not depend on the slice."""
    texts = [" ".join(tiny.WORDS[(i + j) % 60] for j in range(1 + 3 * i % 25)) for i in range(20)]
    tiny_encoders.make_collection_of(tmp_path, texts)
    beir = tmp_path / "texts-beir"
    (beir / "queries.jsonl").write_text("".join(f'{{"_id": "q{i}", "text": "w{i} w{i + 9}"}}\n' for i in range(12)))
    collection = make_collection(str(beir), tmp_path / "collection")
    run = tmp_path / "run.trec"
    rows = [(f"q{i}", f"d{j}") for i in range(12) for j in range(i % 5, 20, 3)]
    run.write_text("".join(f"{q} Q0 {d} 1 {-j} made\n" for j, (q, d) in enumerate(rows)))
    recipe = tiny.write_recipe(
        tmp_path / "bi.yaml", {"kind": "bi-encoder", "model": str(dense), "pairs_per_shard": len(rows) // 4}
    )
    arguments: dict[str, Any] = {"collection": collection, "candidates": [run]}
    whole = score(recipe, **arguments, out=tmp_path / "whole")
    parts = [score(recipe, **arguments, out=tmp_path / f"{i}", shard=f"{i}/3").path for i in (1, 2, 3)]
    assert merge_scores(parts, tmp_path / "merged").fingerprint == whole.fingerprint
