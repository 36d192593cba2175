from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import Scores
from retrieval_kd.data.vectors import write_vectors
from retrieval_kd.errors import ArtifactError, DataError, InputError, OutputExistsError, RecipeError, UsageError
from retrieval_kd.models.encode import encode
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.teachers.base import Candidates
from retrieval_kd.teachers.score import estimate_score, gather_candidates, plan_shards, score


@pytest.fixture
def recipe(dense: Path, tmp_path: Path) -> str:
    return tiny.write_recipe(tmp_path / "bi.yaml", {"kind": "bi-encoder", "model": str(dense), "pairs_per_shard": 20})


def made_run(path: Path, hits: dict[str, list[str]]) -> Path:
    """A TREC file with each query's documents in this order."""
    lines = [f"{q} Q0 {d} {i + 1} {100 - i} made\n" for q, docs in hits.items() for i, d in enumerate(docs)]
    path.write_text("".join(lines))
    return path


def by_query(scores: Scores) -> dict[str, dict[str, float]]:
    return {row.query_id: dict(zip(row.doc_ids, row.scores.tolist(), strict=True)) for row in scores}


def similarities(model: Path, collection: Collection, cosine: bool) -> np.ndarray:
    """[train queries, documents] from the encoder's vectors, in double precision."""
    encoder = DenseEncoder.load(model)
    queries = encoder.encode_queries(list(collection.queries("train").values())).astype(np.float64)
    documents = encoder.encode_documents([tiny.document_text(i) for i in range(40)]).astype(np.float64)
    return np.asarray(tiny.unit(queries) @ tiny.unit(documents).T if cosine else queries @ documents.T)


@pytest.mark.parametrize("similarity", ["model", "dot"])
def test_scores_are_the_vectors_similarity(
    similarity: str, recipe: str, collection: Collection, candidates: Path, dense: Path, tmp_path: Path
) -> None:
    scores = score(
        recipe,
        collection=collection,
        candidates=[candidates],
        out=tmp_path / "scores",
        overrides=[f"similarity={similarity}"],
    )
    expected = similarities(dense, collection, cosine=similarity == "model")
    found = by_query(scores)
    for i in range(30):
        rows = [(i + j) % 40 for j in range(6)]
        assert list(found[f"train-{i}"]) == tiny.ids_of(rows)
        np.testing.assert_allclose(list(found[f"train-{i}"].values()), expected[i, rows], rtol=1e-4, atol=1e-5)
    assert scores.score_kind == ("cosine" if similarity == "model" else "dot")
    assert scores.manifest.counts == {
        "queries": 30,
        "pairs": 180,
        "shards": 10,
        "truncated_texts": 0,
        "tokens_lost": 0,
    }
    assert scores.problems() == []
    assert sorted(scores.manifest.inputs) == ["candidates", "collection", "model"]


def test_ready_vectors_give_the_same_bytes(
    recipe: str,
    collection: Collection,
    candidates: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = [encode(dense, collection, tmp_path / "d").path]
    vectors.append(encode(dense, collection, tmp_path / "q", queries="train").path)
    without = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "without")
    for task in ("encode_queries", "encode_documents"):
        monkeypatch.setattr(DenseEncoder, task, lambda *_: pytest.fail("encoded again"))
    ready = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "with", vectors=vectors)
    np.testing.assert_allclose(ready.arrays().scores, without.arrays().scores, rtol=1e-5, atol=1e-6)
    assert ready.arrays().doc_ids == without.arrays().doc_ids


def test_vectors_that_do_not_fit(
    recipe: str, collection: Collection, candidates: Path, dense: Path, tmp_path: Path
) -> None:
    def refused(name: str, message: str, ids: Sequence[str] = tiny.ids_of(range(40)), **changes: Any) -> None:
        values = {"model": DenseEncoder.load(dense).ref(), "collection": collection.ref(), **changes}
        matrix = np.ones((len(ids), 16))
        write_vectors(tmp_path / name, matrix, ids, of="documents", split=None, similarity="cosine", **values)
        with pytest.raises(ArtifactError, match=message):
            score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "s", vectors=[tmp_path / name])

    refused("model", "made by another model", model=tiny.reference("aa"))
    refused("collection", "of another collection", collection=tiny.reference("cc"))
    refused("order", "are not the collection's 40 documents", ids=tiny.ids_of(range(40))[::-1])


def test_depth_and_union(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    """Two of each run: d05, d06 for train-5 from the first; the second adds d30 and repeats d05."""
    second = made_run(tmp_path / "second.trec", {"train-5": ["d30", "d05", "d31"], "test-1": ["d02"]})
    scores = score(
        recipe,
        collection=collection,
        candidates=[candidates, second],
        out=tmp_path / "scores",
        overrides=["depth=2"],
    )
    found = by_query(scores)
    assert list(found["train-5"]) == ["d05", "d06", "d30"]
    assert list(found["test-1"]) == ["d02"]
    assert list(found) == [f"train-{i}" for i in range(30)] + ["test-1"]
    assert scores.manifest.counts["pairs"] == 30 * 2 + 1 + 1
    assert sorted(scores.manifest.inputs) == ["candidates", "candidates_2", "collection", "model"]


def test_judged_documents_as_candidates(recipe: str, collection: Collection, candidates: Path, tmp_path: Path) -> None:
    scores = score(recipe, collection=collection, candidates=["qrels:train", "qrels:dev"], out=tmp_path / "scores")
    found = {query: list(docs) for query, docs in by_query(scores).items()}
    assert found == {f"{split}-{i}": [f"d{i:02d}"] for split, n in (("train", 30), ("dev", 6)) for i in range(n)}
    assert scores.manifest.recipe["candidates"] == ["qrels:train", "qrels:dev"]
    with pytest.raises(InputError, match="no split 'tran'"):
        score(recipe, collection=collection, candidates=["qrels:tran"], out=tmp_path / "other")
    with pytest.raises(OutputExistsError, match=r"candidates"):
        score(recipe, collection=collection, candidates=["qrels:train"], out=tmp_path / "scores")


def test_depth_cuts_the_runs_it_belongs_to(collection: Collection) -> None:
    """A source of judged documents comes with no depth: all relevant documents are scored."""
    cut = Run.from_hits(["train-5"], [["d05", "d06"]], [np.array([2, 1], dtype=np.float32)])
    whole = Run.from_hits(["train-5"], [["d08", "d07"]], [np.array([2, 1], dtype=np.float32)])
    (found,) = gather_candidates(collection, [(cut, 1), (whole, None)])
    assert collection.documents.ids_of(found.rows) == ["d05", "d08", "d07"]


def test_finished_scores_are_kept(
    recipe: str, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "scores")
    monkeypatch.setattr("retrieval_kd.teachers.score.write_shard", lambda *_: pytest.fail("scored again"))
    again = score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "scores")
    assert again.manifest.created == first.manifest.created


def test_candidates_that_do_not_fit(recipe: str, collection: Collection, tmp_path: Path) -> None:
    unknown = made_run(tmp_path / "unknown.trec", {"train-1": ["d01"], "nobody-1": ["d01"], "nobody-2": ["d01"]})
    with pytest.raises(InputError, match=r"2 queries of the candidates are not in the collection: 'nobody-1'"):
        score(recipe, collection=collection, candidates=[unknown], out=tmp_path / "scores")
    document = made_run(tmp_path / "document.trec", {"train-1": ["d01", "x9"]})
    with pytest.raises(DataError, match=r"1 of 2 document ids are unknown: 'x9'"):
        score(recipe, collection=collection, candidates=[document], out=tmp_path / "scores")
    with pytest.raises(UsageError, match="--candidates"):
        score(recipe, collection=collection, candidates=[], out=tmp_path / "scores")
    empty = tmp_path / "empty"
    Run.from_hits([], [], []).save(empty, recipe={"kind": "made"}, inputs={})
    with pytest.raises(InputError, match="no candidates"):
        score(recipe, collection=collection, candidates=[empty], out=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_unknown_key_of_a_recipe(recipe: str, collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'similarty' \(did you mean 'similarity'\?\)"):
        score(recipe, collection=collection, candidates=["qrels:dev"], out=tmp_path / "s", overrides=["similarty=dot"])


def test_truncation_is_counted_once_a_text(
    collection: Collection, candidates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Documents are 6 tokens; at 5 each of the 35 distinct candidates (d00 to d34) loses one, however often it is."""
    model = tiny.make_dense(tmp_path / "short", lengths=(None, 5))
    recipe = tiny.write_recipe(tmp_path / "short.yaml", {"kind": "bi-encoder", "model": str(model)})
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        scores = score(recipe, collection=collection, candidates=[candidates], out=tmp_path / "scores")
    counts = scores.manifest.counts
    assert (counts["truncated_texts"], counts["tokens_lost"]) == (35, 35)
    assert "35 texts were cut at the teacher's length, 35 tokens lost" in caplog.text


def test_shards_never_divide_a_query() -> None:
    queries = [Candidates(f"q{i}", "", np.arange(n)) for i, n in enumerate([3, 2, 6, 1, 9, 4, 1])]
    shards = plan_shards(queries, 5)
    assert [[len(query.rows) for query in shard] for shard in shards] == [[3, 2], [6], [1], [9], [4, 1]]


def test_estimate(recipe: str, collection: Collection, candidates: Path) -> None:
    """180 pairs of 4 + 2 words, 1.3 tokens each."""
    found = estimate_score(recipe, collection=collection, candidates=[candidates])
    del found["recipe"]
    assert found == {
        "queries": 30,
        "pairs": 180,
        "distinct_documents": 35,
        "shards": 10,
        "approximate_tokens": 1404,
    }
