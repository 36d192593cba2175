import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from retrieval_kd.eval.report import (
    Report,
    comparison_rows,
    report_table,
    sentence,
    significant,
    system_rows,
    write_report,
)
from retrieval_kd.plan import Plan

RECIPE = {
    "kind": "evaluation",
    "k": 100,
    "bootstrap": {"samples": 100, "confidence": 0.95, "seed": 0},
    "skip_query_itself": False,
}
VALUES = {
    "bm25": {"nDCG@10": {"q1": 0.5, "q2": 0.0}, "AP": {"q1": 0.25, "q2": 0.0}},
    "run": {"nDCG@10": {"q1": 1.0, "q2": 0.5}, "AP": {"q1": 1.0, "q2": 0.5}},
}


def make_system(name: str, ndcg: float, ap: float, note: str | None = None, depth: int = 100, **costs: float) -> dict:
    return {
        "name": name,
        "from": "index" if costs else "run",
        "fingerprint": "0123456789abcdef",
        "efficiency": costs or None,
        "note": note,
        "queries_without_hits": 1,
        "queries_not_judged": 2,
        "depth": depth,
        "hits": 1234,
        "tied_hits": 7,
        "means": {"nDCG@10": ndcg, "AP": ap},
        "interval": {"low": ndcg - 0.1, "high": ndcg + 0.1},
    }


def make_metrics() -> dict:
    costs = {
        "milliseconds_per_query": 12.345,
        "timed_queries": 50,
        "bytes_per_document": 1536.4,
        "documents_per_second": None,
    }
    return {
        "collection": {
            "name": "ferry <timetables>",
            "fingerprint": "fedcba9876543210",
            "documents": 5183,
            "split": "test",
            "queries": 2,
            "judgments": 9,
            "relevant": 8,
            "queries_without_relevant": 1,
        },
        "headline": "nDCG@10",
        "measures": {"nDCG@10": "about nDCG", "AP": "about AP"},
        "systems": [
            make_system("bm25", 0.25, 0.125, "built in\n3 s <fast>", **costs),
            make_system("run", 0.75, 0.75, depth=1000),
        ],
        "compared": "nDCG@10",
        "comparisons": [compare("bm25", "run", -0.5, -0.7, -0.25, 0.004)],
        "machine": {"system": "Linux x86_64", "processor": "A Processor", "threads": 2},
        "software": {"python": "3.11.1", "ranx": "0.3.21"},
        "recipe": RECIPE,
    }


def compare(a: str, b: str, difference: float, low: float, high: float, p: float) -> dict:
    return {"a": a, "b": b, "difference": difference, "low": low, "high": high, "p": p / 2, "p_holm": p}


def test_sentences_name_the_better_system_or_say_that_nothing_can_be_shown():
    metrics = make_metrics()
    assert sentence(metrics, metrics["comparisons"][0]) == (
        "run is better than bm25 by 0.5000 nDCG@10 (95% interval +0.2500 to +0.7000, p = 0.004)."
    )
    better = compare("bm25", "run", 0.03124, 0.01, 0.05, 0.0004)
    assert sentence(metrics, better) == (
        "bm25 is better than run by 0.0312 nDCG@10 (95% interval +0.0100 to +0.0500, p < 0.001)."
    )
    unclear = compare("bm25", "run", 0.0021, -0.01, 0.012, 0.41)
    assert sentence(metrics, unclear) == (
        "No difference in nDCG@10 can be shown between bm25 and run: bm25 − run is +0.0021 "
        "(95% interval −0.0100 to +0.0120, p = 0.410)."
    )
    # The level is 1 − confidence and the corrected p decides: .06 is not enough though .03 would have been.
    assert sentence(metrics, compare("bm25", "run", 0.1, 0.01, 0.2, 0.06)).startswith("No difference")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.01234, "0.0123"), (1.25, "1.25"), (12.345, "12.3"), (1536.4, "1,536"), (0.0, "0")],
)
def test_costs_have_three_digits(value, text):
    assert significant(value) == text


def test_rows_and_table():
    metrics = make_metrics()
    assert system_rows(metrics) == [
        ["system", "nDCG@10", "AP", "ms/query", "bytes/doc", "docs/s encoded"],
        ["bm25", "0.2500 [0.150, 0.350]", "0.1250", "12.3", "1,536", "–"],
        ["run", "0.7500 [0.650, 0.850]", "0.7500", "–", "–", "–"],
    ]
    assert comparison_rows(metrics) == [
        ["A", "B", "mean of A − B", "95% interval", "p", "p (Holm)"],
        ["bm25", "run", "−0.5000", "−0.7000 to −0.2500", "0.002", "0.004"],
    ]


def make_report(path: Path, metrics: dict, values: dict) -> Report:
    with Plan("report", RECIPE, {}).write(path) as draft:
        write_report(draft.path, metrics, values)
    return Report.load(path)


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = make_report(tmp_path / "report", make_metrics(), VALUES)
    assert report.metrics == make_metrics()
    assert report.per_query() == VALUES
    assert report.problems() == []
    assert len(report.sentences) == 1
    out = io.StringIO()
    Console(file=out, width=140).print(report_table(report))
    assert "ferry <timetables>, test: 2 judged queries" in out.getvalue()
    assert re.search(r"bm25 .* 0\.2500 \[0\.150, 0\.350\] .* 12\.3 .* 1,536 .* –", out.getvalue())


def test_problems_name_skipped_queries_and_wrong_means(tmp_path):
    metrics = make_metrics()
    metrics["systems"][1]["means"]["AP"] = 0.5
    skipped = {"bm25": {**VALUES["bm25"], "AP": {"q1": 0.25}}, "run": VALUES["run"]}
    assert make_report(tmp_path / "report", metrics, skipped).problems() == [
        "per_query.parquet: bm25 has 1 values of AP, not one a query",
        "metrics.json: the mean AP of run is not that of per_query.parquet",
    ]


class Page(HTMLParser):
    """Collects open tags, links and the text of a page, and fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_other_file(tmp_path):
    page = Page()
    report = make_report(tmp_path / "report", make_metrics(), VALUES)
    page.feed((report.path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.links == []
    assert page.seen.count("svg") == 2
    assert not {"script", "link", "img"} & set(page.seen)
    text = " ".join("".join(page.text).split())
    assert "ferry <timetables>, test" in text and "built in 3 s <fast>" in text
    assert report.sentences[0] in text
    assert "Judged queries without any relevant document: 1; they score 0 and count in every mean" in text
    assert "the median over 50 queries" in text and "A Processor" in text


def test_the_markdown_has_whole_tables_and_the_same_facts(tmp_path):
    report = make_report(tmp_path / "report", make_metrics(), VALUES)
    text = (report.path / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    tables = [block.split("\n") for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table if line}) == 1
        assert re.fullmatch(r"\|(-+:?\|)+", table[1])
    assert "| bm25 | 0.2500 [0.150, 0.350] | 0.1250 | 12.3 | 1,536 | – |" in lines
    assert "- bm25: built in 3 s <fast>" in lines
    assert f"- {report.sentences[0]}" in lines
    assert "- The runs are 100 to 1,000 hits deep: measures without a cutoff favour the deeper." in lines
    assert "- 2 judged queries are few: intervals and tests are rough." in lines
    assert "| run | run | 1,234 | 1,000 | 7 | 1 | 2 | `0123456789ab` |" in lines


def test_one_system_has_nothing_to_compare(tmp_path):
    metrics = make_metrics()
    metrics["systems"], metrics["comparisons"] = metrics["systems"][1:], []
    report = make_report(tmp_path / "report", metrics, {"run": VALUES["run"]})
    for name in ("report.md", "report.html"):
        assert "There is one system: nothing to compare." in (report.path / name).read_text(encoding="utf-8")


def test_nothing_but_numbers_goes_into_the_metrics(tmp_path):
    metrics = make_metrics()
    metrics["systems"][0]["means"]["AP"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, metrics, VALUES)
