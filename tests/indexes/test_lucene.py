"""Lucene's two engines against formulas in float64, and against Anserini's own indexer and searchers."""

from __future__ import annotations

import gc
import json
import logging
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from tiny_sparse_vectors import skewed

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vector_writer import write_ids
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, DataError, InputError, RecipeError, UsageError
from retrieval_kd.indexes import lucene_index
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.indexes.java import java_class

Collect = Callable[..., Collection]
Embed = Callable[..., Vectors]
PLAIN = ["stemmer=none", "stop_words=none"]


def hits(index: Index, query: Any, k: int = 9, allowed: np.ndarray | None = None) -> list[tuple[str, float]]:
    scores, rows = index.search([query] if isinstance(query, str) else query, k, allowed)
    found = rows[0] >= 0
    return list(zip(index.ids_of(rows[0][found]), scores[0][found].tolist(), strict=True))


def bm25(texts: list[str], query: str, k1: float = 0.9, b: float = 0.4) -> np.ndarray:
    """The score [n] float64 of every text; a length up to 40 is one that Lucene stores without rounding."""
    documents = [Counter(text.split()) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    scores = np.zeros(len(texts))
    for term in query.split():
        df = sum(1 for document in documents if term in document)
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for row, document in enumerate(documents):
            tf = document[term]
            scores[row] += idf * tf / (tf + k1 * (1 - b + b * lengths[row] / (sum(lengths) / len(lengths))))
    return scores


@pytest.fixture
def impacts(embed: Embed) -> Callable[..., Index]:
    """A function that makes a lucene-impact index of a matrix."""

    def make(matrix: Any, name: str = "vectors", *, similarity: str = "dot", **keys: float) -> Index:
        vocabulary = [f"w{i}" for i in range(matrix.shape[1])]
        vectors = embed(csr_array(matrix), similarity, name=name, vocabulary=vocabulary)
        overrides = [f"{key}={value}" for key, value in keys.items()]
        return build_index(
            "lucene-impact", vectors=vectors, out=vectors.path.with_name(f"{name}-index"), overrides=overrides
        )

    return make


def test_bm25_by_hand(collect: Collect, tmp_path: Path) -> None:
    """N = 3, df(cat) = 2 → idf = ln(1 + 1.5/2.5) = 0.470004; lengths 2, 4, 3 → average 3."""
    collection = collect(["cat cat", "cat dog bird fish", "dog bird fish"])
    index = build_index("lucene", collection=collection, out=tmp_path / "index")
    found = hits(index, "Cats")
    assert [doc_id for doc_id, _ in found] == ["d0", "d1"]
    # tf 2, length 2: 2 / (2 + .9 (.6 + .4·2/3)) = 0.719424; tf 1, length 4: 1 / (1 + .9 (.6 + .4·4/3)) = 0.495050
    np.testing.assert_allclose([score for _, score in found], [0.470004 * 0.719424, 0.470004 * 0.495050], rtol=1e-5)
    assert index.exact and index.growable and index.problems() == []
    assert index.manifest.counts == {"documents": 3, "postings": 8, "documents_without_terms": 0}


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.6, 0.75)])
def test_all_hits_equal_the_formula_with_parameters_of_the_search(
    k1: float, b: float, collect: Collect, synthetic_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    texts = synthetic_texts(300)
    out = tmp_path / "index"
    build_index("lucene", collection=collect(texts), out=out, overrides=PLAIN)
    index = Index.load(out, search={"k1": k1, "b": b})
    queries = [*synthetic_texts(10, seed=11), "zeno", "alko alko"]
    scores, rows = index.search(queries, 300)
    for query, values, found in zip(queries, scores, rows, strict=True):
        expected = bm25(texts, query, k1, b)
        hit = found >= 0
        assert sorted(found[hit].tolist()) == np.flatnonzero(expected > 0).tolist()
        np.testing.assert_allclose(values[hit], expected[found[hit]], rtol=1e-5)
        pairs = list(zip(values[hit].tolist(), index.ids_of(found[hit]), strict=True))
        assert pairs == sorted(pairs, reverse=True)


def test_analyzers_are_those_of_the_recipe_for_queries_too(collect: Collect, tmp_path: Path) -> None:
    collection = collect(["The Retrievers", "retrieving", "generously", "Häuser", "😀 日本"])

    def found(query: str, **keys: str) -> list[str]:
        out = tmp_path / "-".join(["index", *keys, *keys.values()])
        overrides = [f"{key}={value}" for key, value in keys.items()]
        index = build_index("lucene", collection=collection, out=out, overrides=overrides)
        return sorted(doc_id for doc_id, _ in hits(index, query))

    assert found("retrieve") == ["d0", "d1"]
    assert found("the") == [] and found("the", stop_words="none") == ["d0"]
    assert found("retrieve", stemmer="none") == [] and found("RETRIEVING", stemmer="none") == ["d1"]
    assert found("generous", stemmer="krovetz") == ["d2"]
    assert found("haus", language="de") == ["d3"] and found("haus") == []
    assert found("日本") == ["d4"]


def test_a_cut_inside_a_tie_keeps_the_greatest_ids(collect: Collect, tmp_path: Path) -> None:
    texts = ["other word"] * 3 + ["same text here"] * 30
    index = build_index("lucene", collection=collect(texts), out=tmp_path / "index")
    assert [doc_id for doc_id, _ in hits(index, "same", 4)] == ["d9", "d8", "d7", "d6"]


@pytest.mark.parametrize("query", ["", "the and of", "nowhere", "?!"])
def test_a_query_without_a_known_term_has_no_hit(query: str, collect: Collect, tmp_path: Path) -> None:
    index = build_index("lucene", collection=collect(["a cat", "", "dog"]), out=tmp_path / "index")
    assert hits(index, query) == []
    assert index.manifest.counts["documents_without_terms"] == 1


def test_impacts_by_hand(impacts: Callable[..., Index]) -> None:
    """At scale 10 the weights .44, 1.26 and .04 become 4, 13 and nothing; query weights stay as they are."""
    documents = np.array([[0.44, 1.26, 0], [0, 0.04, 2], [0, 0, 0], [0.44, 0, 0]])
    index = impacts(documents, scale=10)
    asked = csr_array(np.array([[0.5, 0.25, 0.0]]))
    found = hits(index, asked)
    assert [doc_id for doc_id, _ in found] == ["d0", "d3"]
    np.testing.assert_allclose([score for _, score in found], [(0.5 * 4 + 0.25 * 13) / 10, 0.5 * 4 / 10], rtol=1e-6)
    assert index.manifest.counts == {"documents": 4, "postings": 4, "documents_without_terms": 1, "impacts_of_0": 1}
    assert not index.exact and index.problems() == []


def test_only_scores_above_0_are_hits(impacts: Callable[..., Index]) -> None:
    """As in the other sparse engines: neither a term of weight 0 nor one that Java's float rounds to 0 finds any."""
    index = impacts(np.array([[1.0, 2, 0], [0, 1, 3]]))
    asked = csr_array((np.array([0, 1.0, 1e-60]), np.array([0, 1, 2]), np.array([0, 3])), shape=(1, 3))
    assert hits(index, asked) == [("d0", 2.0), ("d1", 1.0)]
    for weight in (0.0, 1e-60):
        assert hits(index, csr_array((np.array([weight]), np.array([2]), np.array([0, 1])), shape=(1, 3))) == []


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_hits_are_the_best_of_rounded_weights(similarity: str, impacts: Callable[..., Index]) -> None:
    documents, queries = skewed(300, 100, seed=1), skewed(10, 100, seed=2, entries=8)
    index = impacts(documents, similarity=similarity, scale=500)
    matrix, asked = documents.toarray().astype(float), queries.toarray().astype(float)
    if similarity == "cosine":
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    rounded = np.rint(matrix.astype(np.float32).astype(float) * 500) / 500
    scores, rows = index.search(queries, 20)
    for values, found, expected in zip(scores, rows, asked @ rounded.T, strict=True):
        np.testing.assert_allclose(values, np.sort(expected)[::-1][:20], rtol=1e-5)
        np.testing.assert_allclose(values, expected[found], rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_filters_equal_filtering_afterwards(share: float, impacts: Callable[..., Index]) -> None:
    index = impacts(skewed(500, 100, seed=1))
    queries = skewed(5, 100, seed=2, entries=8)
    allowed = np.random.default_rng(5).random(500) < share
    for place in range(5):
        asked = queries[place : place + 1]
        every = [pair for pair in hits(index, asked, 500) if allowed[int(pair[0][1:])]]
        assert hits(index, asked, 10, allowed) == every[:10]


def test_anserinis_searchers_open_the_folder(collect: Collect, impacts: Callable[..., Index], tmp_path: Path) -> None:
    """The classes that pyserini wraps, with scores and document ids of their own."""
    texts = [f"cat {'dog ' * (i + 1)}bird{i}" for i in range(20)]
    index = build_index("lucene", collection=collect(texts), out=tmp_path / "index")
    stock = java_class("io.anserini.search.SimpleSearcher")(str(index.path / "lucene"))
    stock.set_bm25(0.9, 0.4)
    theirs = {hit.docid: hit.score for hit in stock.search("dog bird7", 20)}
    assert theirs == pytest.approx(dict(hits(index, "dog bird7", 20)), abs=1e-4)  # they round to four digits
    index = impacts(np.array([[1.0, 2], [0.5, 0], [0, 3]]), scale=10)
    stock = java_class("io.anserini.search.SimpleImpactSearcher")(str(index.path / "lucene"))
    weights = java_class("java.util.HashMap")()
    for term, weight in (("0", 4), ("1", 1)):
        weights.put(term, java_class("java.lang.Integer")(weight))
    theirs = {hit.docid: hit.score / 10 for hit in stock.search(weights, 3)}
    assert theirs == dict(hits(index, csr_array(np.array([[4.0, 1]])))) == {"d0": 6.0, "d1": 2.0, "d2": 3.0}


def test_the_same_as_anserinis_indexer_makes_of_impact_jsonl(impacts: Callable[..., Index], tmp_path: Path) -> None:
    """``{"id", "contents", "vector": {token: impact}}``, a pretokenized impact index: same hits, same scores."""
    documents, queries = skewed(60, 40, seed=1, entries=10), skewed(5, 40, seed=2, entries=5)
    index = impacts(documents)
    (tmp_path / "jsonl").mkdir()
    with (tmp_path / "jsonl" / "documents.jsonl").open("w") as file:
        for row, line in enumerate(np.rint(documents.toarray().astype(float) * 100).astype(int).tolist()):
            vector = {f"w{term}": impact for term, impact in enumerate(line) if impact}
            file.write(json.dumps({"id": f"d{row}", "contents": "", "vector": vector}) + "\n")
    given = f"-collection JsonVectorCollection -input {tmp_path}/jsonl -index {tmp_path}/stock -threads 1"
    kind = "-generator DefaultLuceneDocumentGenerator -impact -pretokenized -quiet"
    java_class("io.anserini.index.IndexCollection").main([*given.split(), *kind.split()])
    stock = java_class("io.anserini.search.SimpleImpactSearcher")(f"{tmp_path}/stock")
    for place in range(5):
        asked = queries[place : place + 1]
        asked.data = np.rint(asked.data * 100)
        weights = java_class("java.util.HashMap")()
        for term, weight in zip(asked.indices.tolist(), asked.data.tolist(), strict=True):
            weights.put(f"w{term}", java_class("java.lang.Integer")(int(weight)))
        theirs = {hit.docid: hit.score / 100 for hit in stock.search(weights, 60)}
        assert theirs == pytest.approx(dict(hits(index, asked, 60)), rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process has mapped")
@pytest.mark.parametrize("shards", [1, 2])
def test_files_are_let_go_with_the_index(shards: int, impacts: Callable[..., Index]) -> None:
    index = impacts(skewed(50, 20, seed=1), shards=shards)
    folder = str(index.path.resolve())
    assert folder in Path("/proc/self/maps").read_text()
    other = impacts(skewed(50, 20, seed=1), "other")
    del index
    gc.collect()
    assert folder not in Path("/proc/self/maps").read_text()
    assert len(hits(other, skewed(1, 20, seed=2))) == 9, "it stays open"


def test_the_first_threads_of_a_process_at_once(collect: Collect, tmp_path: Path) -> None:
    """Each reads Java's classes first: pyjnius makes broken ones when threads do so at once, or ends the process."""
    index = build_index("lucene", collection=collect(["cat", "dog", "cat dog"]), shards=2, out=tmp_path / "index")
    program = f"""
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from retrieval_kd.indexes.base import Index
sys.setswitchinterval(1e-6)
together = threading.Barrier(8)
def find(_):
    together.wait()
    return Index.load({str(tmp_path / "index")!r}).search(["dog"], 2)[1].tolist()
with ThreadPoolExecutor(8) as pool:
    print(list(pool.map(find, range(8))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"{[index.search(['dog'], 2)[1].tolist()] * 8}\n", done.stderr


def test_estimates(collect: Collect, impacts: Callable[..., Index]) -> None:
    """2.4 bytes a distinct term: 2 + 1 + 2 of them; 2.5 a term of a vector."""
    estimate = estimate_index("lucene", collection=collect(["cat dog cat", "cat", "dog bird"]))
    assert (estimate["documents"], estimate["bytes"]) == (3, 12)
    vectors = impacts(np.array([[1.0, 2], [3, 0]])).path.parent.with_name("vectors")
    assert estimate_index("lucene-impact", vectors=vectors)["bytes_per_document"] == 3.8


def test_another_lucene_than_that_of_the_build_is_said(
    collect: Collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build_index("lucene", collection=collect(["cat"]), out=tmp_path / "index")
    monkeypatch.setattr(lucene_index, "_version", lambda: "11.0.0")
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        Index.load(tmp_path / "index")
    assert "11.0.0 is installed; build again if hits differ" in caplog.text


def test_mistakes_are_named(collect: Collect, impacts: Callable[..., Index], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 2 documents has a term"):
        build_index("lucene", collection=collect(["the", "?"], "empty"), out=tmp_path / "empty-index")
    collection = collect(["cat"])
    with pytest.raises(RecipeError, match=r"no analyzer for 'dee'.*did you mean 'de'"):
        build_index("lucene", collection=collection, out=tmp_path / "dee", overrides=["language=dee"])
    index = build_index("lucene", collection=collection, out=tmp_path / "lucene")
    with pytest.raises(UsageError, match="one string"):
        index.search("cat", 1)
    with pytest.raises(InputError, match="weights below 0"):
        impacts(np.array([[1.0, -1]]), "negative")
    with pytest.raises(InputError, match=r"all weights round to 0 at scale 0\.1"):
        impacts(np.array([[1.0, 1]]), "small", scale=0.1)
    with pytest.raises(InputError, match=r"add up to 4000000000 at scale 1e\+09, Lucene holds 2147483647"):
        impacts(np.array([[1.0, 3]]), "large", scale=1e9)
    sparse = impacts(np.array([[1.0, 1]]), "good")
    with pytest.raises(UsageError, match="queries have 3 terms, this index takes 2"):
        sparse.search(csr_array(np.ones((1, 3))), 1)
    with pytest.raises(UsageError, match="queries have weights below 0"):
        sparse.search(csr_array(np.array([[1.0, -1]])), 1)
    for weight in (np.nan, np.inf, 1e39):
        with pytest.raises(UsageError, match="queries have NaN or infinite weights, or some that float32 cannot hold"):
            sparse.search(csr_array(np.array([[weight, 0]])), 1)
    with pytest.raises(RecipeError, match="k1"):
        Index.load(tmp_path / "lucene", search={"k1": math.inf})
    with pytest.raises(RecipeError, match="scale"):
        impacts(np.array([[1.0]]), "endless", scale=math.inf)


def test_an_id_that_is_too_long(embed: Embed) -> None:
    """A term of Lucene's has at most 32,766 bytes; ``é`` has two."""
    for letters in (16383, 16384):
        vectors = embed(csr_array(np.ones((2, 1))), name=f"vectors-{letters}", vocabulary=["a"])
        write_ids(vectors.path / "ids.arrow", ["d0", "é" * letters])
        out = vectors.path.with_name(f"index-{letters}")
        if letters == 16383:
            assert build_index("lucene-impact", vectors=vectors, out=out).search(csr_array([[1.0]]), 2)[0].all()
            continue
        with pytest.raises(DataError, match=r"1 document ids have more than 32766 bytes, .*'é{40}…'; give these"):
            build_index("lucene-impact", vectors=vectors, out=out)


def test_damaged_files(impacts: Callable[..., Index]) -> None:
    index = impacts(np.array([[1.0, 1]]))
    (segments,) = (index.path / "lucene").glob("segments_*")
    segments.write_bytes(segments.read_bytes()[:20])
    with pytest.raises(ArtifactError, match="segments_"):
        Index.load(index.path.parent)
    with pytest.raises(ArtifactError, match="Lucene failed"):
        index.open(index.recipe, index.recipe.search)
