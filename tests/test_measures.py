import math

import numpy as np
import pytest

from retrieval_kd.data.run import Run
from retrieval_kd.errors import RecipeError
from retrieval_kd.measures import about, depth_needed, evaluate_run, parse_measures

QRELS = {
    "q1": {"d1": 1, "d3": 2, "d9": 1, "d2": 0},  # three relevant documents, two of them found
    "q2": {"d1": 1},  # answered without a relevant document
    "q3": {"d5": 1, "d6": 1},  # the run lacks it
    "q4": {"d1": 0},  # no document is relevant
}


def make_run(hits: dict[str, list[tuple[str, float]]]) -> Run:
    ids = [[doc_id for doc_id, _ in row] for row in hits.values()]
    scores = [np.array([score for _, score in row], dtype=np.float32) for row in hits.values()]
    return Run.from_hits(list(hits), ids, scores)


@pytest.fixture
def run() -> Run:
    """q1 ranks d2, d3, d7, d1: the scores of d3 and d7 are equal and the larger id would come first (d7, d3)."""
    return make_run(
        {
            "q1": [("d2", 4.0), ("d3", 3.0), ("d7", 3.0), ("d1", 1.0)],
            "q2": [("d8", 1.0)],
            "q4": [("d1", 1.0)],
            "other": [("d1", 1.0)],
        }
    )


def test_measures_by_hand(run):
    # q1 in order: d2 (0), d7 (not judged), d3 (2), d1 (1).
    dcg = 2 / math.log2(4) + 1 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    expected = {
        "nDCG@10": dcg / ideal,
        "nDCG@2": 0.0,
        "nDCG(dcg='exp-log2')@10": (3 / 2 + 1 / math.log2(5)) / (3 + 1 / math.log2(3) + 1 / 2),
        "RR@10": 1 / 3,
        "RR@2": 0.0,
        "R@3": 1 / 3,
        "R@100": 2 / 3,
        "AP": (1 / 3 + 2 / 4) / 3,
        "AP@3": (1 / 3) / 3,
        "P@3": 1 / 3,
        "P@10": 2 / 10,
        "P(rel=2)@3": 1 / 3,
        "R(rel=2)@3": 1.0,
        "Success@2": 0.0,
        "Success@3": 1.0,
        "Rprec": 1 / 3,
        "Judged@3": 2 / 3,
    }
    values = evaluate_run(run, QRELS, list(expected))
    assert list(values) == list(expected)
    for name, value in expected.items():
        assert values[name]["q1"] == pytest.approx(value, abs=1e-12), name


def test_missing_and_unanswerable_queries_score_0_and_count(run):
    values = evaluate_run(run, QRELS, ["nDCG@10", "AP", "nDCG(judged_only=True)@10", "P@5"])
    for row in values.values():
        assert list(row) == ["q1", "q2", "q3", "q4"]
        assert row["q1"] > 0
        assert (row["q2"], row["q3"], row["q4"]) == (0, 0, 0)


def test_an_empty_run_scores_0_everywhere():
    values = evaluate_run(make_run({"other": [("d1", 1.0)]}), QRELS, ["nDCG@10", "Bpref", "RR"])
    assert values == {name: dict.fromkeys(QRELS, 0.0) for name in ["nDCG@10", "Bpref", "RR"]}


def test_equal_to_trec_eval_on_a_run_full_of_ties():
    """pytrec_eval is trec_eval's own code; it is given the scores themselves, so it breaks the ties by itself."""
    import ir_measures

    rng = np.random.default_rng(7)
    ids = [f"d{i}" for i in range(60)] + ["é1", "Z9", "😀", "ﬁ"]
    qrels, hits = {}, {}
    for q in range(60):
        judged = rng.choice(ids, size=rng.integers(1, 15), replace=False).tolist()
        qrels[f"q{q}"] = {doc_id: int(rng.choice([-1, 0, 0, 1, 1, 2, 3])) for doc_id in judged}
        found = rng.choice(ids, size=rng.integers(1, 40), replace=False).tolist()
        if q % 9:
            hits[f"q{q}"] = [(doc_id, float(rng.integers(0, 5))) for doc_id in found]
    names = ["nDCG@10", "nDCG", "nDCG@3", "R@5", "R@100", "RR", "AP", "AP@10", "P@1", "P@5", "P@100", "Success@1"]
    names += ["Success@5", "Rprec", "P(rel=2)@5", "AP(rel=3)", "R(rel=2)@5", "RR(rel=2)", "nDCG(judged_only=True)@5"]
    names += ["Bpref", "nDCG(gains={1: 5})@5"]
    values = evaluate_run(make_run(hits), qrels, names)
    scored = {query_id: dict(row) for query_id, row in hits.items()}
    for name in names:
        measure = ir_measures.parse_measure(name)
        evaluator = ir_measures.pytrec_eval.evaluator([measure], qrels)
        reference = {metric.query_id: metric.value for metric in evaluator.iter_calc(scored)}
        assert values[name] == pytest.approx(reference, abs=1e-9), name
        mean = evaluator.calc_aggregate(scored)[measure]
        assert np.mean(list(values[name].values())) == pytest.approx(mean, abs=1e-9), name


def test_reciprocal_rank_with_a_cutoff_is_ms_marcos():
    import ir_measures

    rng = np.random.default_rng(8)
    qrels = {f"q{q}": {f"d{d}": 1 for d in rng.choice(50, 3, replace=False)} for q in range(30)}
    hits = {q: [(f"d{d}", float(-rank)) for rank, d in enumerate(rng.permutation(50)[:20])] for q in qrels}
    values = evaluate_run(make_run(hits), qrels, ["RR@10"])["RR@10"]
    measure = ir_measures.parse_measure("RR@10")
    for metric in ir_measures.msmarco.iter_calc([measure], qrels, {q: dict(row) for q, row in hits.items()}):
        assert values[metric.query_id] == pytest.approx(metric.value, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("foo@10", "measure not found: foo"),
        ("nDCG@", "cannot be read"),
        ("nDCG@ten", "cannot be read"),
        ("", "cannot be read"),
        ("P", "invalid param cutoff"),
        ("nDCG(colour=1)@10", "unsupported params"),
        ("AP@0", "1 or more"),
        ("NumRet", "no mean over queries"),
        ("alpha_nDCG@10", "no installed program"),
    ],
)
def test_a_bad_name_is_refused_with_examples(name, why):
    with pytest.raises(RecipeError, match=why) as error:
        parse_measures([name])
    assert repr(name) in str(error.value)
    assert "nDCG@10, R@100, RR@10" in str(error.value)


def test_names_are_made_canonical_and_a_second_one_is_refused():
    assert [str(measure) for measure in parse_measures(["MRR@10", "MAP", "NDCG@5"])] == ["RR@10", "AP", "nDCG@5"]
    with pytest.raises(RecipeError, match="'MRR@10' is given twice"):
        parse_measures(["RR@10", "MRR@10"])


def test_depth_and_definitions():
    assert depth_needed(["nDCG@10", "R@100", "AP"]) == 100
    assert depth_needed(["AP"]) == 0
    assert about("P(rel=2)@5").endswith("; first 5 hits; relevant from grade 2")
    assert "2^grade" in about("nDCG(dcg='exp-log2')@10")
    assert about("AP").endswith("all hits that the run holds")
