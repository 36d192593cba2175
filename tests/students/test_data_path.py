"""From score files to batches: what is read, filtered and counted, and that training on it is deterministic."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_scores

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import Scores
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.models.load import Model
from retrieval_kd.students.base import Groups
from retrieval_kd.students.groups import allowed_negatives
from retrieval_kd.students.training_queries import TrainingQueries, training_queries

Trained = Callable[..., Model]
NAN = float("nan")


def file(out: Path, rows: Mapping[str, Mapping[str, float]], **details: Any) -> Scores:
    """A score file: query → document → score, in shards of at most four pairs."""
    made = [(query_id, list(scored), list(scored.values()), None) for query_id, scored in rows.items()]
    return Scores.load(tiny_scores.make_scores(out, made, **details))


def read(collection: Collection, scores: list[Scores], run: Run | None = None, **groups: Any) -> TrainingQueries:
    return training_queries(collection, "train", Groups.model_validate(groups), scores, run, ["margin-mse", "kl"])


def test_order_and_scores_by_the_teacher(collection: Collection, tmp_path: Path) -> None:
    """The first file's score of d03 stays; a document of the run alone has none and comes last."""
    first = file(tmp_path / "one", {"train-0": {"d03": 1.0, "d01": 5.0}})
    second = file(tmp_path / "two", {"train-0": {"d03": 9.0, "d02": 3.0}, "dev-0": {"d01": 1.0, "d02": 2.0}})
    run = Run.from_hits(["train-0"], [["d09", "d01"]], [np.array([2.0, 1.0])])
    (found,) = read(collection, [first, second], run).queries
    assert (found.query_id, found.text) == ("train-0", "w0 w40")
    assert found.rows.tolist() == [1, 2, 3, 9]
    np.testing.assert_array_equal(found.scores, np.array([5, 3, 1, np.nan], dtype=np.float32))
    assert not found.relevant.any()
    assert (found.rows.dtype, found.scores.dtype) == (np.int32, np.float32)


def test_relevant_documents_join_their_querys_candidates(collection: Collection) -> None:
    run = Run.from_hits(["train-4"], [["d01", "d02"]], [np.array([2.0, 1.0])])
    (found,) = read(collection, [], run, positive="qrels").queries
    assert found.rows.tolist() == [1, 2, 4]
    assert found.relevant.tolist() == [False, False, True]
    assert found.positives.tolist() == [2]


def test_mixed_files_keep_lists_of_their_own(collection: Collection, tmp_path: Path) -> None:
    """Each list has the scores of one file; what only the candidates name belongs to both."""
    first = file(tmp_path / "one", {"train-0": {"d03": 1.0, "d01": 5.0}, "train-1": {"d01": 2.0, "d02": 1.0}})
    second = file(tmp_path / "two", {"train-0": {"d03": 90.0, "d02": 30.0}})
    run = Run.from_hits(["train-0"], [["d09"]], [np.array([2.0])])
    found = read(collection, [first, second], run, mix=[2, 1])
    assert [(query.query_id, query.file) for query in found.queries] == [("train-0", 0), ("train-1", 0), ("train-0", 1)]
    assert [query.rows.tolist() for query in found.queries] == [[1, 3, 9], [1, 2], [3, 2, 9]]
    np.testing.assert_array_equal(found.queries[2].scores, np.array([90, 30, np.nan], dtype=np.float32))
    assert found.counts["queries_without_candidates"] == 28


def test_queries_left_out_are_counted_and_said(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = file(tmp_path / "scores", {"train-0": {"d00": 1.0, "d01": 5.0}, "train-1": {"d01": 1.0}})
    run = Run.from_hits(["train-2"], [["d01", "d02"]], [np.array([2.0, 1.0])])
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        found = read(collection, [scores], run)
    assert [query.query_id for query in found.queries] == ["train-0"]
    assert caplog.messages == [
        "27 of 30 queries of 'train' have no candidates and are left out: 'train-3', 'train-4', 'train-5', …",
        "1 of 30 queries of 'train' have no negative and are left out: 'train-1'",
        "1 of 30 queries of 'train' have no teacher's score and are left out: 'train-2'",
        "groups.documents: 8, but 1 of 1 queries have fewer (the most is 2); empty slots are masked",
    ]
    assert found.counts == {
        "queries_without_candidates": 27,
        "queries_without_negative": 1,
        "queries_without_teacher_score": 1,
        "short_groups": 1,
    }


def test_queries_without_a_negative_by_labels(collection: Collection) -> None:
    run = Run.from_hits(["train-0", "train-1"], [["d00"], ["d05"]], [np.array([1.0]), np.array([1.0])])
    found = read(collection, [], run, positive="qrels")
    assert [query.query_id for query in found.queries] == ["train-1"]
    assert found.counts["queries_without_negative"] == 1


def test_nothing_to_train_on(collection: Collection, candidates: Path) -> None:
    with pytest.raises(
        InputError, match=r"no query of split 'dev' can be trained on \(6 queries: 6 without candidates"
    ):
        training_queries(collection, "dev", Groups(positive="qrels"), [], Run.load(candidates))


def test_scores_of_other_queries_and_empty_rows(collection: Collection, tmp_path: Path) -> None:
    scores = file(tmp_path / "s", {"train-0": {}, "dev-0": {"d00": 1.0, "d01": 2.0}})
    with pytest.raises(InputError, match="30 queries: 30 without candidates"):
        read(collection, [scores])


def test_equal_scores_are_counted_and_said(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = file(tmp_path / "s", {"train-0": {"d00": 1.0, "d01": 1.0}, "train-1": {"d01": 2.0, "d02": 1.0}})
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        found = read(collection, [scores], documents=2)
    assert (
        "1 of 30 queries have one score for all documents, no order for margin-mse, kl to learn: 'train-0'"
        in caplog.messages
    )
    assert found.counts == {"queries_without_candidates": 28, "equal_scores": 1}


def test_scores_that_are_not_finite_are_unknown(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite score would be the positive; NaN and both infinities come last instead, in the file's order."""
    monkeypatch.setattr("retrieval_kd.data.scores._refuse_bad_scores", lambda *_: None)
    inf = float("inf")
    scores = file(tmp_path / "s", {"train-0": {"d00": inf, "d01": 1.0, "d02": NAN, "d03": 2.0, "d04": -inf}})
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        (found,) = read(collection, [scores]).queries
    assert found.rows.tolist() == [3, 1, 0, 2, 4]
    np.testing.assert_array_equal(found.scores, np.array([2, 1, NAN, NAN, NAN], dtype=np.float32))
    assert "3 scores of 1 queries are NaN or infinite and count as unknown: 'train-0'" in caplog.messages


def test_false_negatives_are_counted(collection: Collection, tmp_path: Path) -> None:
    """Margin 1: of train-0's negatives 9.5 goes; train-1 loses its only one; train-2's relevant has no score."""
    rows = {
        "train-0": {"d00": 10.0, "d01": 9.5, "d02": 5.0},
        "train-1": {"d01": 3.0, "d02": 4.0},
        "train-2": {"d05": 3.0, "d06": 4.0},
    }
    rule = {"positive": "qrels", "false_negatives": {"margin": 1}, "documents": 2}
    found = read(collection, [file(tmp_path / "s", rows)], **rule)
    assert [query.query_id for query in found.queries] == ["train-0"]
    assert found.counts == {
        "queries_without_candidates": 27,
        "queries_without_negative": 1,
        "queries_without_scored_positive": 1,
        "false_negatives": 2,
    }


def test_relative_rules_need_a_zero(collection: Collection, tmp_path: Path) -> None:
    """A share of a logit means nothing; a cosine positive of −0.1 cannot judge either and is left out."""
    rows = {"train-0": {"d00": 0.8, "d01": 0.78, "d02": 0.5}, "train-1": {"d01": -0.1, "d02": -0.2}}
    rule = {"positive": "qrels", "false_negatives": {"relative": 0.95}, "documents": 2}
    with pytest.raises(UsageError, match=r"kind 'logit' have no zero.*give groups.false_negatives a margin"):
        read(collection, [file(tmp_path / "logits", rows)], **rule)
    found = read(collection, [file(tmp_path / "cosines", rows, score_kind="cosine")], **rule)
    assert [query.query_id for query in found.queries] == ["train-0"]
    assert (found.counts["false_negatives"], found.counts["queries_without_scored_positive"]) == (1, 1)


def test_small_margins_are_left_out(collection: Collection, tmp_path: Path) -> None:
    """Widest margins 2 and 0.5; at least 1 is asked for."""
    rows = {"train-0": {"d00": 3.0, "d01": 2.9, "d02": 1.0}, "train-1": {"d01": 3.0, "d02": 2.5}}
    found = read(collection, [file(tmp_path / "s", rows)], min_margin=1, documents=2)
    assert [query.query_id for query in found.queries] == ["train-0"]
    assert found.counts == {"queries_without_candidates": 28, "queries_without_margin": 1}


@pytest.fixture(scope="module")
def two_relevant(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Query q with the relevant documents d1 and d3, r with d2; and no more."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "beir" / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "", "text": f"w{i}"} for i in range(5)]
    queries = [{"_id": name, "text": name} for name in "qr"]
    (folder / "beir" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (folder / "beir" / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    lines = ["query-id\tcorpus-id\tscore", "q\td1\t1", "q\td3\t2", "q\td0\t0", "r\td2\t1"]
    (folder / "beir" / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    return make_collection(str(folder / "beir"), folder / "collection")


def test_each_relevant_document_has_its_visit(two_relevant: Collection, tmp_path: Path) -> None:
    scores = file(tmp_path / "s", {"q": {"d1": 4.0, "d0": 3.0, "d3": 2.0}, "r": {"d2": 1.0, "d0": 0.0}})
    found = read(two_relevant, [scores], positive="qrels", positives="all", documents=2).queries
    assert [(query.query_id, query.rows[query.positives].tolist()) for query in found] == [
        ("q", [1]),
        ("q", [3]),
        ("r", [2]),
    ]
    assert found[0].rows is found[1].rows
    one = read(two_relevant, [scores], positive="qrels", documents=2).queries
    assert [query.rows[query.positives].tolist() for query in one] == [[1, 3], [2]]


def test_labels_are_avoided(two_relevant: Collection, tmp_path: Path) -> None:
    """By the teacher d0 is best; of the others d1 and d3 are judged relevant. Without labels they stay."""
    scores = file(tmp_path / "s", {"q": {"d0": 4.0, "d1": 3.0, "d3": 2.0, "d4": 1.0}})
    (avoided,) = read(two_relevant, [scores], labels="avoid", documents=2).queries
    assert avoided.rows[avoided.relevant].tolist() == [1, 3] and avoided.positives.tolist() == [0]
    assert not read(two_relevant, [scores], documents=2).queries[0].relevant.any()
    unseen = file(tmp_path / "unseen", {"q": {"d0": 4.0, "d1": 3.0, "d4": 1.0}})
    (avoided,) = read(two_relevant, [unseen], labels="avoid", documents=2).queries
    assert avoided.rows[avoided.relevant].tolist() == [1, 3], "another query of the batch may bring d3"
    assert avoided.rows[allowed_negatives(avoided, Groups(labels="avoid"), 0)].tolist() == [4]


@pytest.mark.parametrize(
    ("groups", "number", "message"),
    [
        ({}, 0, r"groups.positive: teacher needs --scores \(on labels alone, set groups.positive=qrels\)"),
        ({"positive": "qrels", "negatives": "margin-bins"}, 0, "groups.negatives: margin-bins needs --scores"),
        ({"positive": "qrels", "min_margin": 1}, 0, "groups.min_margin needs --scores"),
        ({"mix": [1, 1, 1]}, 2, "groups.mix has 3 weights for 2 score files; give one each"),
    ],
)
def test_what_the_files_do_not_give(
    groups: dict[str, Any], number: int, message: str, collection: Collection, tmp_path: Path
) -> None:
    rows = {"train-0": {"d00": 3.0, "d01": 2.9}}
    with pytest.raises(UsageError, match=message):
        read(collection, [file(tmp_path / str(i), rows) for i in range(number)], **groups)


@pytest.fixture
def two_files(collection: Collection, tmp_path: Path) -> list[Path]:
    """Two teachers of all training queries that disagree: the second turns the order round."""
    made = []
    for name, sign in (("one", 1.0), ("two", -1.0)):
        rows = {
            f"train-{i}": {f"d{(i + j) % 40:02d}": sign * (3.0 - j + 0.01 * i) for j in range(6)} for i in range(30)
        }
        made.append(file(tmp_path / name, rows, inputs={"collection": collection.ref()}).path)
    return made


def test_mixed_files_reweighted_and_resumed(
    fit: Trained, resumed_equals: Trained, two_files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Killed at the evaluation after step 6 and resumed from step 3: the weights measured after step 2 are kept."""
    values: dict[str, Any] = {
        "inputs": {"scores": two_files},
        "losses": [{"kind": "kl"}],
        "groups": {"documents": 4, "mix": [3, 1], "reweight": {"every": 2, "smoothing": 0, "floor": 0.2}},
        "steps": 8,
        "development": {"against": "qrels", "split": "dev", "times": 3},
    }
    caplog.set_level(logging.INFO, "retrieval_kd")
    resumed = resumed_equals(fit, values, goes_on_from=3)
    mixing = [line for line in caplog.messages if line.startswith("mixing weights")]
    said = mixing[:2]
    assert [line.split(":")[0] for line in said] == ["mixing weights from step 4", "mixing weights from step 6"]
    assert mixing == [*said, *said, said[1]]
    assert 24 <= resumed.manifest.counts["queries"] <= 27  # three of each file were measured on


def test_workers_give_the_same_bytes(fit: Trained, two_files: list[Path]) -> None:
    """Batches made in two processes are those of one; the counts are in the manifest."""
    values: dict[str, Any] = {"inputs": {"scores": two_files}, "losses": [{"kind": "kl"}], "steps": 4}
    groups = {"documents": 8, "mix": [1, 1]}
    alone, together = (fit(**values, groups=groups, workers=workers) for workers in (0, 2))
    name = "model.safetensors"
    assert (together.path / name).read_bytes() == (alone.path / name).read_bytes()
    assert tiny.losses(together.path) == tiny.losses(alone.path)
    assert alone.manifest.counts["short_groups"] == 60


def test_no_label_anywhere(fit: Trained, dense: Path, tmp_path: Path) -> None:
    """A query log without qrels: split ``all``, positives by the teacher; the loss falls below half."""
    beir = tmp_path / "log"
    beir.mkdir()
    rows = [{"_id": f"d{i:02d}", "title": "", "text": tiny.document_text(i)} for i in range(40)]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"_id": f"log-{i}", "text": f"w{i} w{40 + i % 10}"} for i in range(20)]
    (beir / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    collection = make_collection(str(beir), tmp_path / "collection")
    assert collection.splits == []
    scored = {f"log-{i}": {f"d{(i + j) % 40:02d}": float(5 - 2 * j) for j in range(4)} for i in range(20)}
    scores = file(tmp_path / "scores", scored, inputs={"collection": collection.ref()}).path
    model = fit(
        inputs={"collection": collection, "scores": [scores]},
        losses=[{"kind": "kl"}],
        split="all",
        steps=30,
        learning_rate=1e-2,
    )
    log = tiny.losses(model.path)
    assert np.mean(log[-5:]) < np.mean(log[:5]) / 2
    with pytest.raises(InputError, match=r"split 'all' has no qrels.*set groups.labels: ignore"):
        fit(
            inputs={"collection": collection, "scores": [scores]},
            losses=[{"kind": "kl"}],
            split="all",
            groups={"documents": 4, "labels": "avoid"},
        )
