"""The BM25 teacher against the BM25 index, to the last bit, and against one score worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_encoders

from retrieval_kd.data.analyzer import Analyzer
from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.indexes.build import build_index
from retrieval_kd.teachers.bm25 import BM25Teacher


def teacher(**values: object) -> BM25Teacher:
    return tiny_encoders.make_teacher(BM25Teacher, kind="bm25", **values)


def test_one_score_worked_out_by_hand(tmp_path: Path) -> None:
    """N = 3, df(cat) = 2: idf = ln(1 + 1.5/2.5) = 0.470004; lengths 2, 4, 3: average 3."""
    collection = tiny_encoders.make_collection_of(tmp_path, ["cat cat", "cat dog bird fish", "dog bird fish"])
    job = tiny_encoders.make_job(collection, {"q": ("Cats", [2, 0, 1]), "none": ("the", [1])}, tmp_path / "work")
    bm25 = teacher()
    bm25.prepare(job)
    scores, lost = tiny_encoders.score_all(bm25, job)
    # tf 2, length 2: 2 / (2 + .9 (.6 + .4·2/3)) = 0.719424; tf 1, length 4: 1 / (1 + .9 (.6 + .4·4/3)) = 0.495050
    np.testing.assert_allclose(scores[0], [0, 0.470004 * 0.719424, 0.470004 * 0.495050], rtol=1e-5)
    assert scores[1].tolist() == [0]
    assert [values.dtype for values in (*scores, *lost)] == [np.float32, np.float32, np.int32, np.int32]
    assert [values.tolist() for values in lost] == [[0, 0, 0], [0]]


@pytest.mark.parametrize("values", [{}, {"k1": 1.6, "b": 0.75, "stemmer": "none", "stop_words": "none"}, {"k1": 0}])
def test_every_document_scores_what_the_index_says(values: dict[str, object], tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    words = ["the", "running", "runs", "run", "cats", "cat", "über", "d", *(f"word{i}" for i in range(30))]
    texts = [" ".join(rng.choice(words, size=rng.integers(0, 40))) for _ in range(150)]
    collection = tiny_encoders.make_collection_of(tmp_path, texts)
    queries = {f"q{i}": (" ".join(rng.choice(words, size=6)), list(range(150))) for i in range(20)}
    queries["twice"] = ("runs runs nowhere run the", [149, 3, 77])
    overrides = [f"{key}={value}" for key, value in values.items()]
    index = build_index("bm25", collection=collection, out=tmp_path / "index", overrides=overrides)
    found, rows = index.search([text for text, _ in queries.values()], 150)
    bm25 = teacher(**values)
    job = tiny_encoders.make_job(collection, queries, tmp_path / "work")
    bm25.prepare(job)
    for i, scores in enumerate(tiny_encoders.score_all(bm25, job).scores):
        expected = np.zeros(150, dtype=np.float32)
        expected[rows[i][rows[i] >= 0]] = found[i][rows[i] >= 0]
        np.testing.assert_array_equal(scores, expected[job.candidates[i].rows])


def test_statistics_are_counted_once(collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_encoders.make_job(collection, {"q": ("w5 w45", [5, 6])}, tmp_path / "work")
    first, second = teacher(), teacher()
    first.prepare(job)
    monkeypatch.setattr(type(collection.documents), "iter_texts", lambda *_: pytest.fail("read again"))
    second.prepare(job)
    tiny_encoders.assert_same(tiny_encoders.score_all(second, job), tiny_encoders.score_all(first, job))


def test_reference_is_of_parameters_and_analyzer(monkeypatch: pytest.MonkeyPatch) -> None:
    one = teacher().ref()
    assert one.name == "bm25" and len(one.fingerprint) == 64
    assert teacher(k1=0.9, depth=7, pairs_per_shard=3).ref() == one
    assert teacher(b=0.5).ref() != one
    monkeypatch.setattr(Analyzer, "version", lambda: {"words": "other"})
    assert teacher().ref() != one


def test_mistakes(tmp_path: Path) -> None:
    collection = tiny_encoders.make_collection_of(tmp_path, ["the", "?"])
    with pytest.raises(InputError, match="none of the 2 documents has a term"):
        teacher().prepare(tiny_encoders.make_job(collection, {"q": ("cat", [0])}, tmp_path / "work"))
    with pytest.raises(RecipeError, match="did you mean 'stop_words'"):
        teacher(stopwords="en")
    with pytest.raises(RecipeError, match="less than or equal to 1"):
        teacher(b=2)
