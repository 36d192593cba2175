import json
import math
from pathlib import Path

import pytest
from scipy import stats

import retrieval_kd.eval.efficiency as efficiency
from retrieval_kd.artifact import Manifest, resolve
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import ArtifactError, InputError, OutputExistsError, RecipeError, UsageError
from retrieval_kd.eval.evaluate import evaluate
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.update import update_index
from retrieval_kd.models.encode import encode

DOCUMENTS = {
    "d1": "apples",
    "d2": "pears",
    "d3": "bananas pears",
    "d4": "cherries",
    "d5": "dates",
    "q4": "cherries",
}
QUERIES = {"q1": "apples", "q2": "bananas pears", "q3": "quinces", "q4": "cherries"}
QRELS = {"q1": {"d1": 1}, "q2": {"d3": 2, "d2": 1}, "q3": {"d5": 1}, "q4": {"d4": 1}}
GOOD = "q1 Q0 d1 1 2 x\nq2 Q0 d3 1 3 x\nq2 Q0 d2 2 2 x\nq3 Q0 d5 1 1 x\nq4 Q0 d4 1 1 x\n"
POOR = "q1 Q0 d2 1 2 x\nq1 Q0 d1 2 2 x\nq9 Q0 d1 1 1 x\n"  # a tie: d2 comes first; q2, q3 and q4 are missing
SMALL = ["bootstrap.samples=200", "latency_queries=2"]


def write_beir(folder: Path, documents: dict[str, str] = DOCUMENTS) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": doc_id, "title": "", "text": text}) for doc_id, text in documents.items()]
    (folder / "corpus.jsonl").write_text("\n".join(corpus) + "\n")
    queries = [json.dumps({"_id": query_id, "text": text}) for query_id, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    rows = [f"{query_id}\t{doc_id}\t{grade}" for query_id, row in QRELS.items() for doc_id, grade in row.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a collection, its BM25 index and two TREC runs."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_collection(str(write_beir(folder / "beir")), folder / "collection")
    build_index("bm25", collection=folder / "collection", out=folder / "bm25")
    (folder / "good.trec").write_text(GOOD)
    (folder / "poor.trec").write_text(POOR)
    return folder


def run_evaluation(place: Path, out: Path, *overrides: str, **arguments):
    given = {"runs": {"good": place / "good.trec", "poor": place / "poor.trec"}} | arguments
    return evaluate(
        "default", collection=place / "collection", split="test", out=out, overrides=[*SMALL, *overrides], **given
    )


@pytest.fixture(scope="module")
def report(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report"
    return run_evaluation(place, out, indexes={"bm25": place / "bm25"}, notes={"good": "by hand"})


def test_measures_by_hand(report):
    second = 1 / math.log2(3)
    expected = {
        # q4 finds d4 and q4, whose scores are the same: the later id, q4, is first, so d4 is second.
        "bm25": {"nDCG@10": [1, 1, 0, second], "R@100": [1, 1, 0, 1], "RR@10": [1, 1, 0, 0.5], "AP": [1, 1, 0, 0.5]},
        "good": {"nDCG@10": [1, 1, 1, 1], "R@100": [1, 1, 1, 1], "RR@10": [1, 1, 1, 1], "AP": [1, 1, 1, 1]},
        "poor": {"nDCG@10": [second, 0, 0, 0], "R@100": [1, 0, 0, 0], "RR@10": [0.5, 0, 0, 0], "AP": [0.5, 0, 0, 0]},
    }
    per_query = report.per_query()
    assert {system: list(measures) for system, measures in per_query.items()} == {
        system: list(measures) for system, measures in expected.items()
    }
    for system, measures in expected.items():
        for name, values in measures.items():
            row = per_query[system][name]
            assert list(row) == ["q1", "q2", "q3", "q4"]
            assert list(row.values()) == pytest.approx(values), (system, name)
    means = {system["name"]: system["means"] for system in report.metrics["systems"]}
    assert means["bm25"]["nDCG@10"] == pytest.approx((2 + second) / 4)
    assert means["poor"]["AP"] == 0.125
    assert report.problems() == []


def test_what_was_found_and_what_was_not_is_counted(report):
    facts = {system["name"]: system for system in report.metrics["systems"]}
    counted = ["from", "hits", "depth", "tied_hits", "queries_without_hits", "queries_not_judged", "note"]
    assert [facts["bm25"][name] for name in counted] == ["index", 5, 2, 2, 1, 0, None]
    assert [facts["good"][name] for name in counted] == ["run", 5, 2, 0, 0, 0, "by hand"]
    assert [facts["poor"][name] for name in counted] == ["run", 2, 2, 2, 3, 1, None]
    collection = report.metrics["collection"]
    assert (collection["documents"], collection["queries"]) == (6, 4)
    assert (collection["judgments"], collection["relevant"], collection["queries_without_relevant"]) == (5, 5, 0)


def test_comparisons_are_scipys_corrected_for_three(report):
    values = {name: list(row["nDCG@10"].values()) for name, row in report.per_query().items()}
    pairs = [("bm25", "good"), ("bm25", "poor"), ("good", "poor")]
    found = report.metrics["comparisons"]
    assert [(one["a"], one["b"]) for one in found] == pairs
    for one in found:
        assert one["p"] == pytest.approx(stats.ttest_rel(values[one["a"]], values[one["b"]]).pvalue)
        assert one["low"] <= one["difference"] <= one["high"]
    smallest = min(one["p"] for one in found)
    assert min(one["p_holm"] for one in found) == pytest.approx(3 * smallest)
    assert report.sentences[0].startswith("No difference in nDCG@10 can be shown between bm25 and good")
    assert report.sentences[2].startswith("good is better than poor by ")


def test_costs_stand_beside_indexes_only(report, place):
    manifest = Manifest.read(resolve(place / "bm25"))
    size = sum(file["bytes"] for name, file in manifest.files.items() if name not in {"ids.arrow", "rank.npy"})
    bm25, good, poor = (system["efficiency"] for system in report.metrics["systems"])
    assert bm25["bytes_per_document"] == size / 6
    assert bm25["documents_per_second"] is None
    assert bm25["timed_queries"] == 2
    assert bm25["milliseconds_per_query"] > 0
    assert good is None and poor is None


def test_the_run_of_an_index_is_kept(report):
    assert sorted(path.name for path in (report.path / "runs").iterdir()) == ["bm25.trec"]
    run = Run.load(report.path / "runs" / "bm25.trec")
    assert {query_id: run.hits(query_id)[0] for query_id in run.query_ids} == {
        "q1": ["d1"],
        "q2": ["d3", "d2"],
        "q4": ["q4", "d4"],
    }


def test_it_binds_to_its_inputs_and_is_done_once(report, place):
    assert list(report.manifest.inputs) == ["collection", "index:bm25", "run:good", "run:poor"]
    assert report.manifest.recipe["split"] == "test"
    written = (report.path / "metrics.json").stat().st_mtime_ns
    again = run_evaluation(place, report.path, indexes={"bm25": place / "bm25"})
    assert (again.path / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(OutputExistsError, match="run:poor"):
        run_evaluation(place, report.path, indexes={"bm25": place / "bm25"}, runs={"good": place / "good.trec"})


def test_only_times_differ_between_two_reports(report, place, tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "_median_milliseconds", lambda *_: 7.0)
    notes = {"good": "by hand"}
    again = run_evaluation(place, tmp_path / "again", indexes={"bm25": place / "bm25"}, notes=notes).metrics
    report.metrics["systems"][0]["efficiency"]["milliseconds_per_query"] = 7.0
    assert again == report.metrics


def test_a_baseline_another_measure_and_other_queries(place, tmp_path):
    options = ["compare.baseline=poor", "compare.measure=MRR@10", "measures=[nDCG@10,RR@10,P@1]", "k=10"]
    report = run_evaluation(place, tmp_path / "report", *options)
    (one,) = report.metrics["comparisons"]
    assert (one["a"], one["b"], report.metrics["compared"]) == ("good", "poor", "RR@10")
    assert one["difference"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert list(report.metrics["systems"][1]["means"]) == ["nDCG@10", "RR@10", "P@1"]


def test_a_document_with_the_querys_id_can_be_left_out(place, tmp_path):
    (tmp_path / "own.trec").write_text("q4 Q0 q4 1 9 x\nq4 Q0 d4 2 8 x\n")
    given = {"indexes": {"bm25": place / "bm25"}, "runs": {"own": tmp_path / "own.trec"}}
    options = ["skip_query_itself=true", "k=1", "measures=[RR@1]"]
    report = run_evaluation(place, tmp_path / "report", *options, **given)
    # Without it the first hit of q4 would be the document q4; one hit is left although one was taken out.
    assert report.per_query()["bm25"]["RR@1"] == {"q1": 1, "q2": 1, "q3": 0, "q4": 1}
    assert report.per_query()["own"]["RR@1"] == {"q1": 0, "q2": 0, "q3": 0, "q4": 1}


def test_another_collection_is_refused(place, tmp_path):
    write_beir(tmp_path / "beir", {**DOCUMENTS, "d6": "figs"})
    other = make_collection(str(tmp_path / "beir"), tmp_path / "collection")
    arguments = {"collection": other, "split": "test", "out": tmp_path / "report"}
    with pytest.raises(ArtifactError, match=r"bm25: was made from another collection \(fingerprint \w{12}\)"):
        evaluate("default", indexes={"bm25": place / "bm25"}, **arguments)
    assert not (tmp_path / "report").exists()


def test_an_index_that_was_updated(place, collection, dense, tmp_path):
    """It is of two collections now; 46 documents less the one that was deleted are found."""
    build_index("flat", model=dense, collection=collection, out=tmp_path / "index")
    encode(dense, place / "collection", tmp_path / "more")
    update_index(tmp_path / "index", "add", vectors=tmp_path / "more")
    update_index(tmp_path / "index", "delete", ids=["d3"])
    report = run_evaluation(place, tmp_path / "report", indexes={"flat": tmp_path / "index"}, runs={})
    hits = [line.split()[2] for line in (report.path / "runs" / "flat.trec").read_text().splitlines()]
    assert len(hits) == 4 * 45 and "d3" not in hits and "d2" in hits and "d00" in hits
    (system,) = report.metrics["systems"]
    size = Index.load(tmp_path / "index").manifest.files["segment-000001/index.faiss"]["bytes"]
    assert size / 45 < system["efficiency"]["bytes_per_document"] < size / 30
    (tmp_path / "other").mkdir()
    write_beir(tmp_path / "other" / "beir", {**DOCUMENTS, "d6": "figs"})
    make_collection(str(tmp_path / "other" / "beir"), tmp_path / "other" / "collection")
    with pytest.raises(ArtifactError, match=r"from another collection \(fingerprint \w{12} or \w{12}\)"):
        run_evaluation(tmp_path / "other", tmp_path / "refused", indexes={"flat": tmp_path / "index"}, runs={})


@pytest.mark.parametrize(
    ("arguments", "overrides", "error", "message"),
    [
        ({"runs": {}}, [], UsageError, "at least one index or run"),
        ({"indexes": {"good": "bm25"}}, [], UsageError, "'good': an index and a run have the same name"),
        ({"runs": {"a/b": "good.trec"}}, [], UsageError, "system name 'a/b'"),
        ({"notes": {"goood": "x"}}, [], UsageError, r"'goood', which is not a system \(did you mean 'good'\?\)"),
        ({}, ["compare.baseline=goof"], RecipeError, r"'goof' is not a system \(did you mean 'good'\?\)"),
        ({}, ["compare.measure=P@5"], RecipeError, "compare.measure 'P@5' is not one of nDCG@10, R@100"),
        ({}, ["compare.measure=foo"], RecipeError, "measure not found: foo"),
        ({}, ["measures=[foo@3]"], RecipeError, "default.yaml: measures: measure 'foo@3' cannot be read"),
        ({}, ["measures=[]"], RecipeError, "measures: "),
        ({}, ["k=50"], RecipeError, "look at 100 hits, k is 50; raise k"),
        ({}, ["sampels=3"], RecipeError, "unknown key 'sampels'"),
        ({}, ["bootstrap.sampels=3"], RecipeError, "did you mean 'samples'"),
        ({"runs": {"other": "other.trec"}}, [], InputError, "none of the 4 judged queries, but 'q8'"),
        ({"indexes": {"c": "collection"}}, [], ArtifactError, "this is a collection artifact; an index is needed"),
    ],
)
def test_bad_arguments_are_named(place, tmp_path, arguments, overrides, error, message):
    (place / "other.trec").write_text("q8 Q0 d1 1 1 x\n")
    for name in ("indexes", "runs"):
        if name in arguments:
            arguments = arguments | {name: {key: place / path for key, path in arguments[name].items()}}
    with pytest.raises(error, match=message):
        run_evaluation(place, tmp_path / "report", *overrides, **arguments)
    assert not (tmp_path / "report").exists()


def test_a_split_without_judgments_is_refused(place, tmp_path):
    with pytest.raises(InputError, match="train"):
        evaluate(
            "default",
            collection=place / "collection",
            split="train",
            out=tmp_path / "report",
            runs={"good": place / "good.trec"},
        )


def test_the_beir_recipe_runs(place, tmp_path):
    report = evaluate(
        "eval/beir",
        collection=Collection.load(place / "collection"),
        split="test",
        out=tmp_path / "report",
        runs={"good": place / "good.trec"},
        overrides=SMALL,
    )
    assert list(report.metrics["measures"]) == ["nDCG@10", "R@100", "RR@10", "AP@100", "R@1000"]
    assert report.metrics["recipe"]["k"] == 1000
    assert report.metrics["recipe"]["skip_query_itself"] is True
    assert report.metrics["comparisons"] == []
