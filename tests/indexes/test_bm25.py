"""BM25 against Lucene's formula worked out in float64, and against one example worked out by hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RecipeError, UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.bm25 import Analyzer
from retrieval_kd.indexes.build import build_index, estimate_index

Collect = Callable[..., Collection]


def lucene(texts: list[str], query: str, k1: float = 0.9, b: float = 0.4) -> np.ndarray:
    """The score [n] float64 of every text by the formula, with nothing of the package's own code."""

    def terms(text: str) -> list[str]:
        stem = Stemmer.Stemmer("porter").stemWord
        return [stem(word) for word in re.findall(r"\w+", text.lower()) if word not in STOPWORDS_EN]

    documents = [Counter(terms(text)) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    average = sum(lengths) / len(lengths)
    scores = np.zeros(len(texts))
    for term in terms(query):
        df = sum(1 for document in documents if term in document)
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for row, document in enumerate(documents):
            tf = document[term]
            if tf:
                scores[row] += idf * tf / (tf + k1 * (1 - b + b * lengths[row] / average))
    return scores


def test_one_score_worked_out_by_hand(collect: Collect, tmp_path: Path) -> None:
    """N = 3, df(cat) = 2 → idf = ln(1 + 1.5/2.5) = 0.470004; lengths 2, 4, 3 → average 3."""
    texts = ["cat cat", "cat dog bird fish", "dog bird fish"]
    index = build_index("bm25", collection=collect(texts), out=tmp_path / "index")
    scores, rows = index.search(["Cats"], 3)
    # tf 2, length 2: 2 / (2 + .9 (.6 + .4·2/3)) = 0.719424; tf 1, length 4: 1 / (1 + .9 (.6 + .4·4/3)) = 0.495050
    np.testing.assert_allclose(scores[0, :2], [0.470004 * 0.719424, 0.470004 * 0.495050], rtol=1e-5)
    assert rows.tolist() == [[0, 1, -1]]
    assert np.isneginf(scores[0, 2])


def test_top_1000_equals_the_formula(
    collect: Collect, synthetic_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    texts = synthetic_texts(600)
    ids = [f"d{row}" for row in range(len(texts))]
    index = build_index("bm25", collection=collect(texts), out=tmp_path / "index")
    queries = [*synthetic_texts(20, seed=11), "zeno", "alko alko", "alko zeno unknownword"]
    scores, rows = index.search(queries, 1000)
    for query, query_scores, query_rows in zip(queries, scores, rows, strict=True):
        expected = lucene(texts, query)
        # Equal texts have equal scores to the last bit; rounding to 9 digits joins sums that differ in order alone.
        order = sorted(np.flatnonzero(expected > 0), key=lambda row: (round(expected[row], 9), ids[row]), reverse=True)
        found = query_rows[query_rows >= 0]
        assert found.tolist() == [int(row) for row in order]
        np.testing.assert_allclose(query_scores[: len(found)], expected[found], rtol=1e-5)


def test_a_cut_inside_a_tie_keeps_the_greatest_ids(collect: Collect, tmp_path: Path) -> None:
    texts = ["other word"] * 3 + ["same text here"] * 30
    index = build_index("bm25", collection=collect(texts), out=tmp_path / "index")
    _, rows = index.search(["same"], 4)
    assert index.ids_of(rows[0]) == ["d9", "d8", "d7", "d6"]


@pytest.mark.parametrize("query", ["", "   ", "the and of", "nowhere", "?!"])
def test_a_query_without_a_known_term_has_no_hit(query: str, collect: Collect, tmp_path: Path) -> None:
    index = build_index("bm25", collection=collect(["a cat", "a dog"]), out=tmp_path / "index")
    scores, rows = index.search([query], 2)
    assert rows.tolist() == [[-1, -1]] and np.isneginf(scores).all()


def test_documents_without_terms_are_counted_and_never_hits(collect: Collect, tmp_path: Path) -> None:
    index = build_index("bm25", collection=collect(["cat", "the", "dog"]), out=tmp_path / "index")
    assert index.manifest.counts == {"documents": 3, "postings": 2, "documents_without_terms": 1}
    assert index.search(["cat the dog"], 3)[1][0, 2] == -1


def test_no_term_at_all_is_an_error(collect: Collect, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 2 documents has a term"):
        build_index("bm25", collection=collect(["the", "?"]), out=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_terms_of_each_analyzer() -> None:
    text = "The Retrievers were retrieving vitamin D"
    assert Analyzer("porter", "en").terms(text) == ["retriev", "were", "retriev", "vitamin", "d"]
    assert Analyzer("none", "none").terms(text) == ["the", "retrievers", "were", "retrieving", "vitamin", "d"]
    assert Analyzer("english", "none").terms("generously") == ["generous"]
    assert Analyzer("porter", "none").terms("generously") == ["gener"]


def test_parameters_change_the_scores(
    collect: Collect, synthetic_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    texts = synthetic_texts(50)
    out = tmp_path / "index"
    index = build_index("bm25", collection=collect(texts), out=out, overrides=["k1=1.6", "b=0.75"])
    scores, rows = index.search(["alko bemi"], 5)
    np.testing.assert_allclose(scores[0], lucene(texts, "alko bemi", 1.6, 0.75)[rows[0]], rtol=1e-5)


def test_the_files_are_those_that_bm25s_computes(
    collect: Collect, synthetic_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    """To the last bit, in its own arrays; ``the`` leaves a document without a term."""
    import bm25s

    texts = [*synthetic_texts(200), "the"]
    build_index("bm25", collection=collect(texts), out=tmp_path / "index")
    stock = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    stock.index([Analyzer("porter", "en").terms(text) for text in texts], create_empty_token=False, show_progress=False)
    ours = bm25s.BM25.load(tmp_path / "index" / "gen-000001")
    assert set(ours.vocab_dict) == set(stock.vocab_dict)
    for term in ours.vocab_dict:
        np.testing.assert_array_equal(ours.get_scores([term]), stock.get_scores([term]))
    stock.save(tmp_path / "stock")
    for name in ("data", "indices", "indptr"):
        ours_file, theirs = (
            np.load(folder / f"{name}.csc.index.npy") for folder in (tmp_path / "index/gen-000001", tmp_path / "stock")
        )
        assert (ours_file.dtype, ours_file.shape) == (theirs.dtype, theirs.shape), name


def test_stock_bm25s_reads_the_files(collect: Collect, tmp_path: Path) -> None:
    import bm25s

    index = build_index("bm25", collection=collect(["cat cat", "cat dog", "dog bird"]), out=tmp_path / "index")
    stock = bm25s.BM25.load(tmp_path / "index" / "gen-000001")
    np.testing.assert_array_equal(stock.get_scores(["cat"])[:2], np.sort(index.search(["cat"], 2)[0][0])[::-1])


def test_estimate_counts_distinct_terms(collect: Collect) -> None:
    """2 + 1 + 2 distinct terms, 8 bytes each."""
    estimate = estimate_index("bm25", collection=collect(["cat dog cat", "cat", "dog bird"]))
    assert (estimate["documents"], estimate["dimension"], estimate["bytes"]) == (3, None, 40)
    assert estimate["bytes_per_document"] == 13.3
    assert estimate["recipe"]["k1"] == 0.9


def test_mistakes_are_named(collect: Collect, tmp_path: Path) -> None:
    collection = collect(["cat"])
    with pytest.raises(UsageError, match="needs a collection, no vectors or model"):
        build_index("bm25", collection=collection, model="builtin", out=tmp_path / "index")
    with pytest.raises(RecipeError, match="did you mean 'stemmer'"):
        build_index("bm25", collection=collection, out=tmp_path / "index", overrides=["stemer=porter"])
    index = build_index("bm25", collection=collection, out=tmp_path / "index")
    with pytest.raises(UsageError, match="one string"):
        index.search("cat", 1)
    with pytest.raises(RecipeError, match=r"unknown key 'search\.nprobe'"):
        Index.load(tmp_path / "index", search={"nprobe": 3})
