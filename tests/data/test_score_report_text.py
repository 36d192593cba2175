from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_scores import Row, make_scores

from retrieval_kd.data.score_report import describe_scores
from retrieval_kd.data.score_report_text import lines

ROWS: list[Row] = [("q1", ["d1", "d3", "d2"], [1.0, 2.0, 1.0], [0, 4, 3]), ("q2", ["d4", "d3"], [5.0, -1.0], [0, 7])]


def section(text: list[str], title: str) -> list[str]:
    """The lines under a title."""
    start = text.index(title) + 1
    return text[start : text.index("", start)]


def described(tmp_path: Path, counts: dict[str, int] | None = None, **values: Any) -> list[str]:
    """The text about a small file; ``counts`` are put into its manifest's."""
    found = describe_scores(make_scores(tmp_path / "scores", ROWS, **values))
    return lines({**found, "counts": {**found["counts"], **(counts or {})}})


def test_counts_in_words(tmp_path: Path) -> None:
    counts = {
        "windows": 1200,
        "malformed_answers": 120,
        "windows_in_present_order": 0,
        "bounded_log_odds": 3,
        "reused_pairs": 2,
        "repeated_pairs": 1,
        "empty_queries": 4,
        "queries_left_out": 5,
        "pairs_left_out": 6,
        "missing_scores": 7,
        "things_seen": 8,
    }
    assert section(described(tmp_path, counts), "Counts") == [
        "  1,200 windows of documents were put in order",
        "    120 answers were malformed: repaired, asked for again, or given up",
        "      0 windows without a readable answer kept the order they were shown in",
        "      3 log-odds are only a bound: one of the two answers was not among the tokens returned",
        "      2 pairs were taken over from other score files",
        "      1 pairs of the source repeated another one with the same score",
        "      4 queries of the source had an empty list of documents and are not in the file",
        "      5 queries were left out: not every member has them",
        "      6 pairs of the other queries were left out: not every member scored them",
        "      7 scores that a member lacks were filled in",
        "      8 things seen",
    ]


def test_no_other_counts_no_section(tmp_path: Path) -> None:
    text = described(tmp_path)
    assert "Counts" not in text
    assert text[1].endswith(", 2 shards")


@pytest.mark.parametrize(
    ("counts", "alarms"),
    [
        ({"windows": 100, "malformed_answers": 10, "windows_in_present_order": 10}, []),
        (
            {"windows": 100, "malformed_answers": 240, "windows_in_present_order": 11},
            [
                "  WARNING: 11 for 100 windows (11%): their ranks are those of the candidates, not the teacher's",
                "  WARNING: 240 for 100 windows (240%): look at what the model answers",
            ],
        ),
        ({"malformed_answers": 1, "reused_pairs": 2}, ["  WARNING: 1 for 3 pairs (33%): look at what the model"]),
        ({"malformed_answers": 0, "reused_pairs": 5}, []),
    ],
)
def test_more_than_a_tenth_is_called_out(counts: dict[str, int], alarms: list[str], tmp_path: Path) -> None:
    found = [line for line in described(tmp_path, counts) if "WARNING" in line]
    assert len(found) == len(alarms)
    assert all(line.startswith(alarm) for line, alarm in zip(found, alarms, strict=True))


def test_members_of_an_ensemble(tmp_path: Path) -> None:
    of_one = {"score_kind": "logit", "teacher": "cross-encoder", "model": "a/" + "long-" * 30 + "name"}
    members = {
        "one": {**of_one, "revision": None, "fingerprint": "0123456789abcdef"},
        "two": {"score_kind": "dot", "teacher": "sparse", "model": "b", "revision": "main", "fingerprint": "f" * 64},
    }
    text = described(tmp_path, members=members, score_kind="ensemble", recipe={"members": ["one", "two"]})
    assert section(text, "Members") == [
        f"  one: logit, cross-encoder, {of_one['model']}, fingerprint 0123456789ab",
        "  two: dot, sparse, b, revision main, fingerprint ffffffffffff",
    ]
    assert not any(line.startswith("  members") for line in text)


def test_nested_details(tmp_path: Path) -> None:
    text = described(
        tmp_path,
        model="m",
        revision=None,
        usage={"requests": 12345, "retried": 0, "cost": 0.25, "none": None},
        execution={"concurrency": 8, "price_per_million": {"input": 0.5, "output": 2.0}, "cache": None},
        recipe={"seed": 20260101, "weights": {"a": 1.0}},
        served_models=[],
        nothing={"at": {"all": None}},
    )
    assert section(text, "Teacher") == [
        "  model  m",
        "  seed   20260101",
        "  usage",
        "    requests  12,345",
        "    retried   0",
        "    cost      0.25",
        "  execution",
        "    concurrency  8",
        "    price_per_million",
        "      input   0.5",
        "      output  2.0",
        "  weights",
        "    a  1.0",
    ]


def test_pairs_that_failed_are_listed(tmp_path: Path) -> None:
    failed = [("q1", f"x{i}", "ValueError: cannot read\nthis") for i in range(5)]
    text = described(tmp_path, failed=failed)
    title = "5 pairs could not be scored and are not in the file"
    assert section(text, title) == [
        *(f"  query 'q1', document 'x{i}': ValueError: cannot read this" for i in range(3)),
        "  … and 2 more in failed.jsonl",
    ]


def test_words_that_were_lost(tmp_path: Path) -> None:
    text = described(tmp_path, tokens_lost_unit="words")
    assert "Truncation: 3 of 5 pairs (60.0%) were cut, 14 words were not read" in text
    assert any("most words lost: 'd3' (7 in a pair, 2 pairs)" in line for line in text)
