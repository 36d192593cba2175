"""The late-interaction teacher against sentence-transformers' own similarity and a MaxSim by loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.models.multi_vector_encoder import MultiVectorEncoder
from retrieval_kd.teachers.base import Candidates, ScoringJob
from retrieval_kd.teachers.late_interaction import LateInteractionTeacher

QUERIES = {"a": ("w3 w43 w50", [20, 0, 7]), "b": ("w1", [7, 39, 20]), "c": ("", [1])}


def teacher(model: Path, **values: Any) -> LateInteractionTeacher:
    return tiny_encoders.make_teacher(LateInteractionTeacher, kind="late-interaction", model=str(model), **values)


def scored(late: LateInteractionTeacher, collection: Collection, work: Path) -> Any:
    job = tiny_encoders.make_job(collection, QUERIES, work)
    late.prepare(job)
    return tiny_encoders.score_all(late, job)


@pytest.fixture(scope="module")
def multi_vector(shared: Path) -> Path:
    return tiny_encoders.make_multi_vector(shared / "multi-vector")


@pytest.fixture(scope="module")
def colbert(shared: Path) -> Path:
    """Queries filled up to 8 tokens with [MASK]; w50 and w51 are skipped in documents; markers as prompts."""
    return tiny_encoders.make_multi_vector(
        shared / "colbert",
        expansion={"strategy": "fixed", "length": 8},
        skiplist=["w50", "w51"],
        prompts={"query": "query: ", "document": "passage: "},
        lengths=(None, 7),
    )


@pytest.mark.parametrize("name", ["multi_vector", "colbert"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 16384])
def test_scores_are_the_models_own(
    name: str, batch_tokens: int, collection: Collection, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from sentence_transformers import MultiVectorEncoder as Stock

    path = request.getfixturevalue(name)
    late = teacher(path, batch_tokens=batch_tokens)
    assert late.ref().path == path and "encoder" not in late.__dict__
    scores, lost = scored(late, collection, tmp_path / "work")
    stock = Stock(str(path))
    assert late.score_kind == stock.similarity_fn_name == "maxsim"
    for values, of_query, (text, rows) in zip(scores, lost, QUERIES.values(), strict=True):
        query, documents = stock.encode_query([text]), stock.encode_document([tiny.document_text(row) for row in rows])
        np.testing.assert_allclose(values, stock.similarity(query, documents)[0].numpy(), rtol=0, atol=1e-5)
        by_loops = [
            sum(max(float(q @ d) for d in document.numpy()) for q in query[0].numpy()) for document in documents
        ]
        np.testing.assert_allclose(values, by_loops, rtol=0, atol=1e-5)
        assert values.dtype == np.float32 and of_query.dtype == np.int32


def test_masks_decide_what_is_compared(multi_vector: Path, colbert: Path) -> None:
    """[CLS] w9 w49 w50 w52 [SEP] are 6 vectors; [CLS] passage : w9 w49 w50 [SEP], cut to 7, are 6 without w50."""
    for path, documents, queries in ((multi_vector, 6, 3), (colbert, 6, 8)):
        late = teacher(path)
        encoder = late.encoder
        for task, text, expected in (("document", "w9 w49 w50 w52", documents), ("query", "w9", queries)):
            lengths = encoder.readers[task].lengths([text])
            ((places, (matrix,)),) = encoder.batches([text], task, lengths, 100)
            assert places.tolist() == [0]
            assert matrix.shape == (expected, 8)
            np.testing.assert_allclose(np.linalg.norm(matrix.numpy(), axis=1), 1, atol=1e-5)


def test_tokens_lost_by_hand(colbert: Path, collection: Collection, tmp_path: Path) -> None:
    """Documents: [CLS] passage : 4 words [SEP] = 8, to 7. Queries: [CLS] query : words [SEP] = 4 + words, to 8."""
    late = teacher(colbert)
    texts = {"none": ("w1 w2 w3 w4", [1, 2]), "two": ("w1 w2 w3 w4 w5 w6", [3])}
    job = tiny_encoders.make_job(collection, texts, tmp_path / "work")
    assert [lost.tolist() for lost in tiny_encoders.score_all(late, job).tokens_lost] == [[1, 1], [1 + 2]]
    facts = late.details()
    assert (facts["max_length"], facts["query_max_length"]) == (7, 8)
    assert facts["prompts"] == {"query": "query: ", "document": "passage: "}


@pytest.mark.parametrize(("length", "limit"), [(None, 32), (12, 12), (8, 8)])
def test_expansion_to_a_least_length_cuts_at_the_querys_own(length: int | None, limit: int, tmp_path: Path) -> None:
    model = tiny_encoders.make_multi_vector(
        tmp_path / "model", expansion={"strategy": "min", "length": 8}, lengths=(length, None)
    )
    reader = teacher(model).encoder.readers["query"]
    assert reader.limit == limit
    assert reader.read(np.array([3, 8, 10, 40])).tolist() == [8, 8, min(10, limit), limit]


def test_a_document_is_encoded_once_a_shard(
    multi_vector: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six pairs, five distinct documents; a document that two queries share gets both scores."""
    read: list[str] = []
    batches = MultiVectorEncoder.batches

    def counted(self: MultiVectorEncoder, texts: list[str], task: str, *rest: Any) -> Any:
        read.extend(texts if task == "document" else [])
        return batches(self, texts, task, *rest)

    monkeypatch.setattr(MultiVectorEncoder, "batches", counted)
    scores, _ = scored(teacher(multi_vector), collection, tmp_path / "work")
    assert sorted(read) == sorted(tiny.document_text(row) for row in (0, 1, 7, 20, 39))
    assert scores[0][2] != scores[1][0]


def test_the_same_shard_gives_the_same_bytes_and_parts_agree(
    multi_vector: Path, collection: Collection, tmp_path: Path
) -> None:
    late = teacher(multi_vector)
    first = scored(late, collection, tmp_path / "work")
    tiny_encoders.assert_same(scored(late, collection, tmp_path / "work"), first)
    part = late.score([Candidates("a", "w3 w43 w50", np.array([0]))], [[tiny.document_text(0)]])
    assert part.scores[0][0] == pytest.approx(first.scores[0][1], abs=1e-5)


def test_mean_maxsim_where_the_model_says_so(multi_vector: Path, collection: Collection, tmp_path: Path) -> None:
    """The query a has [CLS], 3 words and [SEP]: the mean is a fifth of the sum."""
    mean = teacher(tiny_encoders.make_multi_vector(tmp_path / "mean", similarity="meanmaxsim"))
    scores = scored(mean, collection, tmp_path / "work").scores
    assert mean.score_kind == "meanmaxsim"
    np.testing.assert_allclose(
        scores[0], scored(teacher(multi_vector), collection, tmp_path / "work").scores[0] / 5, atol=1e-6
    )


def test_empty_texts_have_scores(multi_vector: Path, tmp_path: Path) -> None:
    """[CLS] [SEP] on both sides: each finds itself, 1 + 1."""
    collection = tiny_encoders.make_collection_of(tmp_path, ["", "w1"])
    job = tiny_encoders.make_job(collection, {"q": ("", [1, 0])}, tmp_path / "work")
    assert tiny_encoders.score_all(teacher(multi_vector), job).scores[0][1] == pytest.approx(2, abs=1e-5)


def test_a_document_that_the_mask_leaves_nothing_of_is_refused(collection: Collection, tmp_path: Path) -> None:
    """Only w20 (token 25) is compared: document 0 has none, and no score is invented for it."""
    late = teacher(tiny_encoders.make_multi_vector(tmp_path / "model", keep_only=[25]))
    job: ScoringJob = tiny_encoders.make_job(collection, {"q": ("w3", [20])}, tmp_path / "work")
    assert np.isfinite(tiny_encoders.score_all(late, job).scores[0]).all()
    with pytest.raises(ValueError, match="no token of the document is one that the model compares: 'w0 w40"):
        tiny_encoders.score_all(late, tiny_encoders.make_job(collection, {"q": ("w3", [20, 0])}, tmp_path / "work"))


def test_nan_weights_give_nan_to_their_pairs_alone(collection: Collection, tmp_path: Path) -> None:
    """The weights of w7 are NaN: the driver, which refuses such scores, can name the pair."""
    late = teacher(tiny.spoil(tiny_encoders.make_multi_vector(tmp_path / "spoilt")))
    scores = scored(late, collection, tmp_path / "work").scores
    assert [np.isnan(values).tolist() for values in scores] == [[False, False, True], [True, False, False], [False]]


def test_unknown_key(multi_vector: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'batch_tokens'"):
        teacher(multi_vector, batch_size=3)


def test_a_model_of_another_kind_is_refused(dense: Path) -> None:
    """A dense model would get a random projection."""
    with pytest.raises(InputError, match=r"is not a MultiVectorEncoder: .* \(it is a SentenceTransformer\)"):
        assert teacher(dense).encoder
