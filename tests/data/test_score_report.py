from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_scores import Row, make_scores

from retrieval_kd.data import score_report
from retrieval_kd.data.score_labels import auc
from retrieval_kd.data.score_report import describe_scores
from retrieval_kd.data.score_report_text import bar, histogram_lines, lines
from retrieval_kd.data.score_statistics import Moments, Quantiles, Truncation
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import ArtifactError, InputError, UsageError

ROWS: list[Row] = [
    ("q1", ["d1", "d3", "d2"], [1.0, 2.0, 1.0], [0, 4, 3]),
    ("q2", ["d4", "d3"], [5.0, -1.0], [0, 7]),
    ("q3", ["d1"], [0.5], [2]),
]


def one_query(scores: Sequence[float]) -> Row:
    return "q", [f"d{i}" for i in range(len(scores))], list(scores), None


@pytest.fixture
def collection(beir: Path, tmp_path: Path) -> Path:
    return make_collection(str(beir), tmp_path / "collection").path


def judged_scores(tmp_path: Path, collection: Path, **values: Any) -> Path:
    from retrieval_kd.data.collection import Collection

    return make_scores(tmp_path / "scores", ROWS, inputs={"collection": Collection.load(collection).ref()}, **values)


def test_the_numbers_of_a_small_file(tmp_path: Path) -> None:
    """Sorted: −1, 0.5, 1, 1, 2, 5. Mean 8.5 / 6; the squares add up to 32.25."""
    found = describe_scores(make_scores(tmp_path / "scores", ROWS))
    scores = found["scores"]
    assert (scores["pairs"], scores["min"], scores["max"]) == (6, -1, 5)
    assert scores["mean"] == pytest.approx(8.5 / 6)
    assert scores["std"] == pytest.approx((32.25 / 6 - (8.5 / 6) ** 2) ** 0.5)
    assert scores["quantiles"] == pytest.approx(
        {"1%": -0.925, "5%": -0.625, "25%": 0.625, "50%": 1, "75%": 1.75, "95%": 4.25, "99%": 4.85}
    )
    assert found["queries"] == {
        "queries": 3,
        "documents": {"min": 1, "median": 2, "max": 3},
        "spread": {
            "mean": pytest.approx(7 / 3),
            "quantiles": pytest.approx(
                {"1%": 0.02, "5%": 0.1, "25%": 0.5, "50%": 1, "75%": 3.5, "95%": 5.5, "99%": 5.9}
            ),
        },
        "one_document": 1,
        "all_tied": 0,
    }
    assert (found["ties"]["pairs"], found["ties"]["share"], found["ties"]["queries"]) == (2, pytest.approx(1 / 3), 1)
    assert json.loads(json.dumps(found)) == found


def test_truncation_by_pair_and_document(tmp_path: Path) -> None:
    """d3 lost 4 and 7, d2 3, d1 2: four of six pairs."""
    found = describe_scores(make_scores(tmp_path / "scores", ROWS))["truncation"]
    assert found == {
        "known_pairs": 6,
        "cut_pairs": 4,
        "tokens_lost": 16,
        "cut_documents": 3,
        "worst": [
            {"doc_id": "d3", "most": 7, "pairs": 2},
            {"doc_id": "d2", "most": 3, "pairs": 1},
            {"doc_id": "d1", "most": 2, "pairs": 1},
        ],
    }


def test_truncation_that_is_not_known(tmp_path: Path) -> None:
    found = describe_scores(make_scores(tmp_path / "scores", [one_query([1, 2])]))
    assert found["truncation"]["known_pairs"] == 0
    assert "Truncation: the file does not say what was cut" in lines(found)
    none_cut = describe_scores(make_scores(tmp_path / "whole", [("q", ["a", "b"], [1, 2], [0, 0])]))
    assert "Truncation: none of the 2 pairs was cut" in lines(none_cut)


def test_merging_documents_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 9, 20), rng.integers(0, 5, 20).astype(np.int32)) for _ in range(10)]
    found = []
    for limit in (1 << 20, 15):
        monkeypatch.setattr("retrieval_kd.data.score_statistics._MERGE_AT", limit)
        truncation = Truncation()
        for documents, lost in parts:
            truncation.add(pa.array([f"d{i}" for i in documents]), lost)
        found.append(truncation.documents().to_pylist())
    assert found[0] == found[1]
    assert sum(row["pairs"] for row in found[0]) == sum(int((lost > 0).sum()) for _, lost in parts)


def test_labels_by_hand(tmp_path: Path, collection: Path) -> None:
    """In test, q1 ranks d3, d2, d1 (a tie, ids descending): d1 of grade 2 has DCG 2 / log2(4) of 2; d1 loses and ties.

    q2 is right in test (d4) and wrong in train (d3 at rank 2).
    """
    found = describe_scores(judged_scores(tmp_path, collection))["labels"]
    assert found["why_not"] is None and found["judged_candidates"] == []
    assert found["splits"]["test"] == {
        "judged_queries": 2,
        "queries": 2,
        "relevant": 2,
        "relevant_scored": 2,
        "auc": pytest.approx((0.25 + 1) / 2),
        "auc_queries": 2,
        "nDCG@10": pytest.approx((0.5 + 1) / 2),
    }
    assert found["splits"]["train"]["auc"] == 0
    assert found["splits"]["train"]["nDCG@10"] == pytest.approx(1 / np.log2(3))


def test_one_split_and_wrong_names(tmp_path: Path, collection: Path, beir: Path) -> None:
    scores = judged_scores(tmp_path, collection)
    assert list(describe_scores(scores, split="train")["labels"]["splits"]) == ["train"]
    assert describe_scores(scores, collection=str(beir))["labels"]["splits"]["test"]["queries"] == 2
    with pytest.raises(InputError, match="no split 'dev'"):
        describe_scores(scores, split="dev")
    (beir / "queries.jsonl").write_text('{"_id": "q1", "text": "other"}\n{"_id": "q2", "text": "other"}\n')
    other = make_collection(str(beir), tmp_path / "other").path
    with pytest.raises(ArtifactError, match=r"is not the collection that .*scores was made with"):
        describe_scores(scores, collection=other)


def test_a_collection_that_is_gone_is_a_sentence(tmp_path: Path, collection: Path) -> None:
    scores = judged_scores(tmp_path, collection)
    collection.rename(tmp_path / "moved")
    found = describe_scores(scores)
    assert found["labels"]["splits"] == {}
    assert any(line.startswith("Labels: not compared (") and "--collection" in line for line in lines(found))
    assert describe_scores(scores, collection=tmp_path / "moved")["labels"]["splits"]["test"]["queries"] == 2


def test_queries_without_labels_are_a_sentence(tmp_path: Path, collection: Path) -> None:
    from retrieval_kd.data.collection import Collection

    inputs = {"collection": Collection.load(collection).ref()}
    found = describe_scores(make_scores(tmp_path / "scores", [ROWS[2]], inputs=inputs))
    assert any("no split of" in line and "judges a query of this file" in line for line in lines(found))
    asked = describe_scores(tmp_path / "scores", split="test")
    assert asked["labels"]["splits"]["test"]["auc"] is None
    assert any("test: 0 of 2 judged queries are in the file" in line for line in lines(asked))


def test_judged_candidates_are_said(tmp_path: Path, collection: Path) -> None:
    found = describe_scores(judged_scores(tmp_path, collection, recipe={"candidates": ["qrels:test"]}))
    assert found["labels"]["judged_candidates"] == ["test"]
    assert sum("relevant documents were added" in line for line in lines(found)) == 1


def test_auc_of_a_query() -> None:
    """Relevant 3 and 1 against 2, 1, 0: 3 wins three, 1 loses, ties and wins."""
    values, relevant = np.array([3, 1, 2, 1, 0], dtype=np.float32), np.array([True, True, False, False, False])
    assert auc(values, relevant) == pytest.approx(4.5 / 6)
    assert auc(values, ~relevant) == pytest.approx(1.5 / 6)
    assert auc(values, np.ones(5, dtype=bool)) is None
    assert auc(values, np.zeros(5, dtype=bool)) is None


def test_histogram_counts(tmp_path: Path) -> None:
    """0 to 600 in 60 bins of 10; the last bin has both its edges."""
    found = describe_scores(make_scores(tmp_path / "scores", [one_query(np.arange(601.0))]))["histogram"]
    assert found["edges"] == pytest.approx(np.arange(0, 601, 10).tolist())
    assert found["counts"] == [10] * 59 + [11]
    assert (found["below"], found["above"]) == (0, 0)
    drawn = histogram_lines(found)
    assert len(drawn) == 20
    assert drawn[0].split()[:3] == ["0", "…", "30"] and drawn[0].endswith(" 30")
    assert drawn[-1].split()[:3] == ["570", "…", "600"] and drawn[-1].endswith(f" {'█' * 40} 31")


def test_outliers_are_counted_not_drawn(tmp_path: Path) -> None:
    values = [*np.linspace(0, 1, 998), -1e6, 1e6]
    found = describe_scores(make_scores(tmp_path / "scores", [one_query(values)]))
    histogram = found["histogram"]
    assert histogram["edges"][0] > -1e-9 and histogram["edges"][-1] < 1.01
    assert (found["scores"]["min"], found["scores"]["max"]) == (-1e6, 1e6)
    assert histogram["below"] + histogram["above"] + sum(histogram["counts"]) == 1000
    assert histogram["below"] >= 1 and histogram["above"] >= 1
    assert histogram_lines(histogram)[-1].startswith("  not drawn: ")


def test_all_scores_the_same(tmp_path: Path) -> None:
    rows: list[Row] = [("q1", ["a", "b"], [0.1, 0.1], None), ("q2", ["a"], [0.1], None)]
    found = describe_scores(make_scores(tmp_path / "scores", rows), png=tmp_path / "flat.png")
    assert found["scores"]["std"] == 0
    assert found["histogram"]["counts"] == [3]
    assert found["queries"]["all_tied"] == 1
    text = lines(found)
    assert "  queries that teach nothing, because all their documents tie: 1" in text
    assert "  all scores are 0.1" in text


@pytest.mark.parametrize(
    ("values", "kind", "hint"),
    [
        ([1.0, 1.0, 1.0078125], "logit", "every score is a bfloat16 number"),
        ([0.1, 0.1, 0.3], "logit", "look at both ends"),
        ([np.float32(np.float16(0.1))] * 2, "logit", "every score is a float16 number"),
        ([-1.0, -1.0, -2.0], "rank", None),
        ([-1.5, -1.5, -2.0], "rank", None),
        ([3.0, 3.0, 0.0], "grade", None),
        ([3.0, 3.0, 0.0], "imported", "every score is a small whole number"),
        ([512.0, 512.0, 1024.0], "dot", "every score is a bfloat16 number"),
        ([0.1, 0.2, 0.3], "logit", None),
    ],
)
def test_what_may_be_behind_ties(values: list[float], kind: str, hint: str | None, tmp_path: Path) -> None:
    found = describe_scores(make_scores(tmp_path / "scores", [one_query(values)], score_kind=kind))["ties"]["hint"]
    assert found is None if hint is None else found.startswith(hint)


def test_in_words(tmp_path: Path, collection: Path) -> None:
    scores = judged_scores(
        tmp_path,
        collection,
        model="some/model",
        revision=None,
        prompt="is it\nrelevant? " * 30,
        max_length=256,
        members={"one": {"model": "x", "revision": None}},
    )
    text = lines(describe_scores(scores))
    assert text[0] == f"{scores}: made scores (logit), 6 pairs of 3 queries"
    assert "  model       some/model" in text
    assert "  max_length  256" in text
    assert text[text.index("Members") + 1] == "  one: x"
    assert not any("revision" in line or "kind" in line.split()[:1] for line in text)
    (prompt,) = (line for line in text if "prompt" in line)
    assert "\n" not in prompt and prompt.endswith("… (479 characters)")
    assert any(line.startswith("  collection  /") for line in text)
    assert any(line.startswith("Software: python 3.") for line in text)
    assert "  documents: 1 to 3, median 2" in text
    assert "Truncation: 4 of 6 pairs (66.7%) were cut, 16 tokens were not read" in text
    assert "    nDCG@10 of the teacher's ranking of the candidates: 0.7500" in text
    assert (
        "    AUC of relevant against other documents of the query: 0.6250 (mean of the 2 queries that have both)"
        in text
    )


def test_failed_pairs(tmp_path: Path) -> None:
    failed = [("q1", f"x{i}", "too long") for i in range(5)]
    found = describe_scores(make_scores(tmp_path / "scores", ROWS, failed=failed))
    assert found["failed"]["pairs"] == 5
    assert [row["doc_id"] for row in found["failed"]["first"]] == ["x0", "x1", "x2"]
    assert "5 pairs could not be scored and are not in the file" in lines(found)
    assert describe_scores(make_scores(tmp_path / "fine", ROWS))["failed"] is None


def test_a_file_without_scores(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no scores"):
        describe_scores(make_scores(tmp_path / "empty", []))


def test_picture(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", ROWS, model="a/" + "very-long-" * 9 + "name")
    describe_scores(scores, png=tmp_path / "one" / "scores.png")
    describe_scores(scores, png=tmp_path / "two.png")
    picture = (tmp_path / "one" / "scores.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture == (tmp_path / "two.png").read_bytes()
    with pytest.raises(UsageError, match=r"scores.svg: the histogram is a PNG"):
        describe_scores(scores, png=tmp_path / "scores.svg")


def test_shards_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty shards, read twice; never more than the one before and the new one are alive."""
    rows: list[Row] = [(f"q{i}", ["a", "b", "c"], [1.0, i, 2.0], [0, i, 1]) for i in range(20)]
    scores = make_scores(tmp_path / "scores", rows, pairs_per_shard=3)
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = score_report.read_shard

    def counted(path: Path) -> Any:
        nonlocal most
        table = original(path)
        alive.append(weakref.ref(table))
        most = max(most, sum(reference() is not None for reference in alive))
        return table

    monkeypatch.setattr(score_report, "read_shard", counted)
    assert describe_scores(scores)["scores"]["pairs"] == 60
    assert len(alive) == 40 and most <= 2


def test_moments_keep_their_digits_in_parts() -> None:
    values = (np.random.default_rng(1).normal(size=1000) + 1e6).astype(np.float32)
    moments = Moments()
    for part in np.split(values, [1, 1, 400, 999]):
        moments.add(part)
    exact = values.astype(np.float64)
    assert moments.mean == pytest.approx(exact.mean(), rel=1e-14)
    assert moments.std == pytest.approx(exact.std(), rel=1e-9)
    assert (moments.count, moments.low, moments.high) == (1000, exact.min(), exact.max())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.lists(st.integers(0, 60), max_size=3),
)
def test_quantiles_are_exact(values: list[float], cuts: list[int]) -> None:
    """Any floats in any parts: what numpy says of all of them in double precision."""
    shares = [0, 0.05, 0.5, 0.77, 1]
    parts = np.split(np.array(values, dtype=np.float32), sorted(cuts))
    quantiles = Quantiles(shares)
    for part in parts:
        quantiles.add(part)
    for part in parts:
        quantiles.refine(part)
    expected = np.quantile(np.array(values, dtype=np.float64), shares)
    np.testing.assert_allclose(quantiles.values(), expected, rtol=1e-12, atol=1e-45)
    for share, value in zip((0, 1), (min(values), max(values)), strict=True):
        low, high = quantiles.roughly(share)
        assert low <= value <= high


def test_bars() -> None:
    assert bar(1) == "█" * 40
    assert bar(0.5) == "█" * 20
    assert bar(0.0125) == "▌"
    assert bar(1e-9) == "▏"
    assert bar(0) == ""
