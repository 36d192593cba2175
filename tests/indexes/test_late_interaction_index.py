"""The token index: its sums by hand, its MaxSim against the exact index, filters, growth, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import unit

from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import InputError, RecipeError, UsageError
from retrieval_kd.indexes import late_interaction as module
from retrieval_kd.indexes import late_interaction_scoring as scoring
from retrieval_kd.indexes.base import Index, Source
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.indexes.distill_vq.engine import DistillVQIndex
from retrieval_kd.plan import Draft

Embed = Callable[..., Vectors]
Build = Callable[..., Index]
DOCUMENTS = [np.array([[1.0, 0], [0, 1]]), np.zeros((0, 2)), np.array([[0.6, 0.8]]), np.array([[-1.0, 0]])]
QUERY = np.array([[1, 0], [0, 2]], dtype=np.float32)
WIDE = {"token_candidates": 10**6}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A function that builds an index of vectors with the keys of a recipe, at ``tmp_path / name``."""

    def make(vectors: Vectors, name: str = "index", queries: Vectors | None = None, **recipe: Any) -> Index:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"kind": "late-interaction", "factory": "Flat", **recipe}))
        return build_index(path, vectors=vectors, queries=queries, out=tmp_path / name)

    return make


def random_tokens(number: int, seed: int = 0, dimension: int = 8, shortest: int = 0) -> list[np.ndarray]:
    """Documents of up to 9 tokens of unit length; some have none."""
    rng = np.random.default_rng(seed)
    return [
        unit(rng.standard_normal((rng.integers(shortest, 10), dimension))).astype(np.float32) for _ in range(number)
    ]


def imputed(query: np.ndarray, documents: list[np.ndarray], number: int) -> dict[int, float]:
    """XTR's scores by its definition, of the ``number`` tokens nearest to each query token."""
    owners = np.concatenate([[row] * len(tokens) for row, tokens in enumerate(documents)]).astype(int)
    similarities = query.astype(float) @ np.concatenate(documents).astype(float).T
    nearest = np.argsort(-similarities, axis=1)[:, :number]
    scores = {}
    for document in {int(owners[token]) for token in nearest.ravel()}:
        scores[document] = 0.0
        for of_one, tokens in zip(similarities, nearest, strict=True):
            mine = [of_one[token] for token in tokens if owners[token] == document]
            scores[document] += max(mine) if mine else of_one[tokens[-1]]
    return scores


def test_xtr_by_hand(embed: Embed, build: Build) -> None:
    """Two tokens each: (1, 0) finds 1 of d0 and .6 of d2, (0, 2) finds 2 of d0 and 1.6 of d2; d3 is not found.

    With one token each, only d0 is found: 1 + 2. With all four, d3 is: -1 + 0.
    """
    vectors = embed(DOCUMENTS, "maxsim")
    build(vectors, scoring="xtr")
    found = {}
    for number in (1, 2, 4):
        index = Index.load(vectors.path.with_name("index"), search={"token_candidates": number})
        scores, rows = index.search([QUERY], 4)
        found[number] = dict(zip(rows[0].tolist(), scores[0].tolist(), strict=True))
    assert found[1] == {0: 3, -1: -np.inf}
    np.testing.assert_allclose([found[2][0], found[2][2]], [3, 2.2], rtol=1e-6)
    assert set(found[2]) == {0, 2, -1}
    np.testing.assert_allclose([found[4][0], found[4][2], found[4][3]], [3, 2.2, -1], rtol=1e-6)
    assert index.manifest.counts == {"documents": 4, "tokens": 4, "documents_without_tokens": 1}


def test_the_lowest_retrieved_score_stands_for_what_is_missing() -> None:
    """Query token 0 retrieved .9 and .4 of document 7 and .5 of 3; token 1 retrieved .8 of 3; token 2 nothing.

    Document 3: .5 + .8 + 0; document 7: .9 + .8 (imputed) + 0.
    """
    scores = np.array([[0.9, 0.5, 0.4], [0.8, -np.inf, -np.inf], [-np.inf] * 3], dtype=np.float32)
    owners = np.array([[7, 3, 7], [3, -1, -1], [-1, -1, -1]])
    documents, sums = scoring.retrieved_sums(scores, owners)
    assert documents.tolist() == [3, 7]
    np.testing.assert_allclose(sums, [1.3, 1.7], rtol=1e-6)
    # Token 1 also retrieves .3 of document 9, which is then what stands for document 7.
    scores[1, 1], owners[1, 1] = 0.3, 9
    documents, sums = scoring.retrieved_sums(scores, owners)
    assert documents.tolist() == [3, 7, 9]
    np.testing.assert_allclose(sums, [0.5 + 0.8, 0.9 + 0.3, 0.4 + 0.3], rtol=1e-6)


@pytest.mark.parametrize("number", [1, 5, 60, 10**6])
@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
def test_xtr_equals_its_definition(number: int, similarity: str, embed: Embed, build: Build) -> None:
    documents, queries = random_tokens(60), random_tokens(5, seed=1, shortest=1)
    index = build(embed(documents, similarity), scoring="xtr", search={"token_candidates": number})
    scores, rows = index.search(queries, 60)
    for query, found, values in zip(queries, rows, scores, strict=True):
        divisor = len(query) if similarity == "meanmaxsim" else 1
        expected = {row: score / divisor for row, score in imputed(query, documents, number).items()}
        hits = found[found >= 0].tolist()
        assert set(hits) == set(expected)
        np.testing.assert_allclose(values[found >= 0], [expected[row] for row in hits], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("store", ["float32", "float16", "int8", "codes"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8", "OPQ8_8,IVF4,PQ4x4fs"])
def test_gather_scores_stored_tokens_as_the_exact_index_does(
    store: str, factory: str, embed: Embed, build: Build, tmp_path: Path
) -> None:
    """Whatever chose the candidates, each document that was found has the score of exact MaxSim, to the last bit."""
    documents, queries = random_tokens(90), random_tokens(6, seed=1, shortest=1)
    search = {"token_candidates": 40, "candidates": 30}
    index = build(embed(documents, "maxsim"), factory=factory, store=store, search=search)
    stored = np.asarray(index._read(np.arange(index.manifest.counts["tokens"])), np.float32)  # type: ignore[attr-defined]
    errors = {"float32": 0, "float16": 5e-4, "int8": 5e-3}
    if store != "codes":
        assert np.abs(stored - np.concatenate(documents)).max() <= errors[store]
        assert index.manifest.details["store_error"] <= errors[store]
    bounds = np.cumsum([0, *(len(tokens) for tokens in documents)])
    decoded = [stored[a:b] for a, b in pairwise(bounds.tolist())]
    exact = build_index("maxsim-exact", vectors=embed(decoded, "maxsim", name="decoded"), out=tmp_path / "exact")
    for query, of_ours in zip(queries, zip(*index.search(queries, 20), strict=True), strict=True):
        ours = {int(row): float(score) for score, row in zip(*of_ours, strict=True) if row >= 0}
        all_scores, all_rows = exact.search([query], 90)
        theirs = dict(zip(all_rows[0].tolist(), all_scores[0].tolist(), strict=True))
        assert len(ours) == 20
        expected = [theirs[row] for row in ours]
        # A decoded int8 is no float32: the exact index has it rounded.
        np.testing.assert_allclose(list(ours.values()), expected, rtol=1e-6 if store == "int8" else 0)


@pytest.mark.parametrize("block", [1, 30, 65536])
def test_gather_with_all_candidates_is_exact_whatever_the_blocks(
    block: int, embed: Embed, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every document twice, so that ties cross the cut; half of the documents compared, and all of them."""
    monkeypatch.setattr(scoring, "_BLOCK", block)
    monkeypatch.setattr(module, "_RETRIEVED", 7 * block)
    vectors = embed(random_tokens(50) * 2, "maxsim")
    queries = [*random_tokens(6, seed=1, shortest=1), np.zeros((0, 8), np.float32)]
    exact = build_index("maxsim-exact", vectors=vectors, out=tmp_path / "exact")
    build(vectors, store="float32")
    for search in ({**WIDE, "candidates": 50}, {"candidates": 100}):
        index = Index.load(tmp_path / "index", search=search)
        for ours, theirs in zip(index.search(queries, 11), exact.search(queries, 11), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_there_are_as_many_candidates_as_hits(embed: Embed, build: Build) -> None:
    vectors = embed(random_tokens(60, shortest=1), "maxsim")
    index = build(vectors, search={**WIDE, "candidates": 2})
    assert (index.search(random_tokens(3, seed=1, shortest=1), 20)[1] >= 0).all()


def test_documents_that_tie_at_the_last_candidate_are_all_compared() -> None:
    assert scoring.best_and_ties(np.array([3.0, 1, 2, 2, 2, 0]), 2).tolist() == [0, 2, 3, 4]
    assert scoring.best_and_ties(np.array([3.0, 1]), 2).tolist() == [0, 1]


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "PQ4x4fs", "PQ4x4", "OPQ8_8,IVF8,PQ4x4"])
@pytest.mark.parametrize("kinds", [{"scoring": "xtr"}, {"store": "float32"}])
def test_filtered_hits_are_all_hits_without_the_others(
    factory: str, kinds: dict[str, str], embed: Embed, build: Build
) -> None:
    """Index types that skip tokens by themselves, and those that are asked for more."""
    documents = random_tokens(80)
    wide = {"IVF": {"nprobe": 8}, "HNS": {"ef_search": 800}}.get(factory.removeprefix("OPQ8_8,")[:3], {})
    index = build(embed(documents, "maxsim"), factory=factory, **kinds, search={**WIDE, **wide})
    queries = random_tokens(4, seed=1, shortest=1)
    all_scores, all_rows = index.search(queries, 80)
    for share in (0.05, 0.5, 1.0):
        allowed = np.random.default_rng(2).random(80) < share
        scores, rows = index.search(queries, 10, allowed)
        for i in range(len(queries)):
            kept = [place for place, row in enumerate(all_rows[i]) if row >= 0 and allowed[row]][:10]
            assert rows[i][rows[i] >= 0].tolist() == all_rows[i][kept].tolist()
            np.testing.assert_allclose(scores[i][: len(kept)], all_scores[i][kept], rtol=1e-5, atol=1e-6)
    assert (index.search(queries, 3, np.zeros(80, bool))[1] == -1).all()
    with pytest.raises(UsageError, match="an array of 80 booleans"):
        index.search(queries, 3, np.ones(79, bool))


def test_filtered_retrieval_is_that_of_the_allowed_documents_alone(embed: Embed, build: Build) -> None:
    """A few tokens each: with a filter as many are retrieved as without, and the imputed scores are theirs."""
    documents = random_tokens(80)
    search = {"token_candidates": 12}
    index = build(embed(documents, "maxsim"), scoring="xtr", search=search)
    alone = build(embed(documents[40:], "maxsim", name="half"), name="alone", scoring="xtr", search=search)
    queries = random_tokens(4, seed=1, shortest=1)
    scores, rows = index.search(queries, 10, np.arange(80) >= 40)
    expected = alone.search(queries, 10)
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5)
    np.testing.assert_array_equal(np.where(rows < 0, rows, rows - 40), expected[1])


@pytest.mark.parametrize("factory", ["OPQ8_8,IVF8,PQ4x4fs", "IVF4,RQ2x4fs", "IVF8,SQ8", "PQ4x4"])
def test_a_grown_index_has_the_same_codebooks(factory: str, embed: Embed, build: Build, tmp_path: Path) -> None:
    """The tokens that are in both decode to the same vectors."""
    documents = random_tokens(80)
    index = build(embed(documents, "maxsim"), factory=factory, store="codes")
    folder = tmp_path / "grown"
    folder.mkdir()
    draft = Draft(folder, resumed=False)
    index.grow(Source(vectors=embed(documents[30:], "maxsim", name="later")), draft)
    grown = module.LateInteractionIndex(folder, index.manifest)
    grown.open(index.recipe, index.recipe.search)
    assert draft.counts["documents"] == 50
    assert draft.counts["tokens"] == sum(len(tokens) for tokens in documents[30:])
    before = sum(len(tokens) for tokens in documents[:30])
    everything = np.arange(draft.counts["tokens"])
    old, new = (np.asarray(x._read(y)) for x, y in ((index, before + everything), (grown, everything)))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(old, new)


def test_token_codes_of_distill_vq(embed: Embed, build: Build, tmp_path: Path) -> None:
    """The token index is, byte for byte, the distill-vq index of the tokens as dense vectors, taught by the same."""
    documents, queries = random_tokens(80), random_tokens(30, seed=1)
    training = {"epochs": 1, "top": 20, "pseudo_queries": 30}
    asked = {"of": "queries", "split": "train"}
    vectors = embed(documents, "maxsim")
    index = build(
        vectors, factory="PQ4x4", distill_vq=training, queries=embed(queries, "maxsim", name="queries", **asked)
    )
    path = tmp_path / "dense.yaml"
    path.write_text(yaml.safe_dump({"kind": "distill-vq", "factory": "PQ4x4", "training": training}))
    flat = [embed(np.concatenate(texts), name=name, **keys) for texts, name, keys in
            ((documents, "dense", {}), (queries, "dense-queries", asked))]  # fmt: skip
    dense = build_index(path, vectors=flat[0], queries=flat[1], out=tmp_path / "dense-index")
    assert (index.path / "index.faiss").read_bytes() == (dense.path / "index.faiss").read_bytes()
    assert index.manifest.details["distill_vq"]["shipped"] == dense.manifest.details["shipped"]
    assert index.manifest.counts["training_queries"] == dense.manifest.counts["training_queries"]
    exact = build_index("maxsim-exact", vectors=vectors, out=tmp_path / "exact")
    hits, expected = index.search(queries[:5], 10), exact.search(queries[:5], 10)
    np.testing.assert_array_equal(hits[1], expected[1])
    np.testing.assert_allclose(hits[0], expected[0], rtol=1e-3)


def test_tokens_that_are_added_are_coded_as_the_first_were(embed: Embed, build: Build, tmp_path: Path) -> None:
    """With a rotation, whose place a map of queries would take: the same documents again have the same scores."""
    documents = random_tokens(80)
    training = {"epochs": 8, "temperature": 0.2, "learning_rate": 0.003, "reconstruction": 1.0}
    index = build(embed(documents, "maxsim"), factory="OPQ4,PQ4x4", distill_vq=training, store="codes")
    assert index.manifest.details["distill_vq"]["shipped"] == "distilled"
    draft = Draft(tmp_path / "grown", resumed=False)
    draft.path.mkdir()
    index.grow(Source(vectors=embed(documents, "maxsim", name="again")), draft)
    assert (draft.path / "index.faiss").read_bytes() == (index.path / "index.faiss").read_bytes()
    with pytest.raises(RecipeError, match=r"distill_vq\.query_learning_rate: the tokens of queries have no map"):
        build(embed(documents, "maxsim"), factory="OPQ4,PQ4x4", distill_vq={"query_learning_rate": 0.01})


def test_distill_vq_trains_as_the_recipe_says(
    embed: Embed, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def note(recipe: Any, source: Source, draft: Draft) -> None:
        given.append(recipe)
        raise InputError("noted")

    monkeypatch.setattr(DistillVQIndex, "build", note)
    keys = {"factory": "PQ4x4", "train_sample": 50, "seed": 7, "threads": 3, "device": "cuda:0"}
    with pytest.raises(InputError, match="noted"):
        build(embed(DOCUMENTS, "maxsim"), distill_vq={"epochs": 3}, **keys)
    assert given[0].model_dump(include=set(keys)) == keys and given[0].training.epochs == 3


def test_bytes_are_those_that_were_estimated(embed: Embed, build: Build, tmp_path: Path) -> None:
    documents = random_tokens(200, dimension=16)
    vectors = embed(documents, "maxsim")
    for store in ("float32", "float16", "int8", "codes"):
        recipe = {"factory": "PQ8x4", "store": store}
        index = build(vectors, name=store, **recipe)
        estimate = estimate_index(tmp_path / f"{store}.yaml", vectors=vectors)
        besides = sum(index.manifest.files[name]["bytes"] for name in ("ids.arrow", "rank.npy"))
        headers = 128 * (len(index.manifest.files) - 3) + 200
        assert abs(index.manifest.details["bytes"] - besides - estimate["bytes"]) < headers


def test_half_precision_tokens_are_stored_as_they_are(embed: Embed, build: Build, tmp_path: Path) -> None:
    vectors = embed(random_tokens(60), "maxsim")
    queries = random_tokens(3, seed=1, shortest=1)
    expected = build(vectors).search(queries, 60)
    np.save(vectors.path / "tokens.npy", np.load(vectors.path / "tokens.npy").astype(np.float16))
    half = Vectors(vectors.path, vectors.manifest)
    index = build(half, name="of-half")
    assert index.manifest.details["store_error"] == 0
    for ours, theirs in zip(index.search(queries, 60), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mistakes_are_named(embed: Embed, build: Build, tmp_path: Path) -> None:
    vectors = embed(DOCUMENTS, "maxsim")
    with pytest.raises(RecipeError, match=r"'xtr' reads no stored tokens; leave out store and search\.candidates"):
        build(vectors, scoring="xtr", store="int8")
    with pytest.raises(RecipeError, match="'xtr' reads no stored tokens"):
        build(vectors, scoring="xtr", search={"candidates": 3})
    with pytest.raises(RecipeError, match="has no search parameter 'nprobe'"):
        build(vectors, search={"nprobe": 3})
    with pytest.raises(InputError, match="needs at least 16 vectors to train"):
        build(vectors, factory="IVF16,Flat")
    with pytest.raises(InputError, match="none of the 2 documents has a token"):
        build(embed([np.zeros((0, 2)), np.zeros((0, 2))], "maxsim", name="empty"))
    bad = [DOCUMENTS[0], DOCUMENTS[1], np.array([[1, np.nan]])]
    with pytest.raises(InputError, match=r"1 vectors have NaN or infinite values \(documents 'd2\[0\]'"):
        build(embed(bad, "maxsim", name="bad"))
    with pytest.raises(InputError, match=r"store float16: a vector has the value 1e\+06, float16 ends at 65504"):
        build(embed([np.full((1, 2), 1e6)], "maxsim", name="large"))
    with pytest.raises(UsageError, match=r"take an index of kind .*late-interaction"):
        build_index("flat", vectors=vectors, out=tmp_path / "flat")
    with pytest.raises(UsageError, match="queries teach nothing here"):
        build(vectors, queries=embed(DOCUMENTS, "maxsim", name="queries", of="queries", split="train"))
    index = build(vectors)
    with pytest.raises(UsageError, match=r"query 1 has shape \[1, 3\], this index takes \[tokens, 2\]"):
        index.search([QUERY, np.ones((1, 3), np.float32)], 3)
    with pytest.raises(UsageError, match="query 0 has NaN"):
        index.search([np.full((1, 2), np.inf, np.float32)], 3)


def test_problems_of_an_index(embed: Embed, build: Build) -> None:
    index = build(embed(DOCUMENTS, "maxsim"))
    assert index.problems() == []
    for name, array, message in (
        ("documents.npy", np.array([0, 0, 1, 3]), "documents.npy names other documents than offsets.npy"),
        ("rerank.npy", np.zeros((3, 2), np.float16), "FAISS has 4 tokens but 3 are stored"),
        ("offsets.npy", np.array([0, 2, 2, 3, 9]), "offsets.npy does not divide 4 tokens into 4 documents"),
    ):
        former = np.load(index.path / name)
        np.save(index.path / name, array)
        index.open(index.recipe, index.recipe.search)
        assert index.problems() == [message]
        np.save(index.path / name, former)
