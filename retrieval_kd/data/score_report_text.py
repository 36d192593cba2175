"""The description of a score file in words, for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from retrieval_kd.data.score_labels import MEASURE

_BAR = 40
_MERGED = 3
"""Bins of the histogram that are one line on a terminal."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LONGEST = 100
_SAID_ELSEWHERE = {"kind", "teacher", "score_kind", "members", "tokens_lost_unit"}
_COUNTED_ELSEWHERE = {"queries", "pairs", "shards", "truncated_pairs", "tokens_lost", "failed_pairs"}
_COUNTS = {
    "windows": "windows of documents were put in order",
    "windows_in_present_order": "windows without a readable answer kept the order they were shown in",
    "malformed_answers": "answers were malformed: repaired, asked for again, or given up",
    "bounded_log_odds": "log-odds are only a bound: one of the two answers was not among the tokens returned",
    "reused_pairs": "pairs were taken over from other score files",
    "repeated_pairs": "pairs of the source repeated another one with the same score",
    "empty_queries": "queries of the source had an empty list of documents and are not in the file",
    "queries_left_out": "queries were left out: not every member has them",
    "pairs_left_out": "pairs of the other queries were left out: not every member scored them",
    "missing_scores": "scores that a member lacks were filled in",
}
"""What a count says; others are called by their names."""
_MANY = 0.1
_ALARMS = {
    "windows_in_present_order": "their ranks are those of the candidates, not the teacher's",
    "malformed_answers": "look at what the model answers, and at the prompt, before you use these scores",
}
"""What more than the share ``_MANY`` of a count means."""


def lines(description: Mapping[str, Any]) -> list[str]:
    """The lines of text that say what `describe_scores` found."""
    parts = [
        _heading(description),
        _table("Teacher", _facts(description)),
        _members(description["details"].get("members")),
        _table("Made from", {name: _input(entry) for name, entry in description["inputs"].items()}),
        [f"Software: {', '.join(f'{name} {version}' for name, version in description['software'].items())}"],
        _failed(description["failed"]),
        _counts(description["counts"]),
        _scores(description),
        histogram_lines(description["histogram"]),
        _queries(description["queries"], description["ties"], description["scores"]["pairs"]),
        _truncation(description["truncation"], description["details"].get("tokens_lost_unit", "tokens")),
        _labels(description["labels"]),
    ]
    return [line for part in parts if part for line in [*part, ""]][:-1]


def histogram_lines(histogram: Mapping[str, Any]) -> list[str]:
    """One line for three bins: its range, a bar and its count; then what lies outside the range shown."""
    edges, counts = histogram["edges"], histogram["counts"]
    if len(counts) == 1:
        return [f"  all scores are {_number(edges[0])}"]
    merged = [sum(counts[i : i + _MERGED]) for i in range(0, len(counts), _MERGED)]
    labels = [f"{low} … {high}" for low, high in pairwise(_aligned(edges[::_MERGED]))]
    found = [
        f"  {label} {bar(count / max(merged)):<{_BAR}} {count:,}" for label, count in zip(labels, merged, strict=True)
    ]
    if histogram["below"] or histogram["above"]:
        found.append(f"  not drawn: {histogram['below']:,} scores below, {histogram['above']:,} above")
    return found


def bar(share: float) -> str:
    """A bar of unicode blocks, ``share`` of the whole width, to an eighth of a character."""
    eighths = round(share * _BAR * 8)
    if share > 0 and eighths == 0:
        eighths = 1  # something is there
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _heading(description: Mapping[str, Any]) -> list[str]:
    pairs, queries = description["scores"]["pairs"], description["queries"]["queries"]
    shards = description["counts"].get("shards", 0)
    return [
        f"{description['path']}: {description['teacher'] or 'unknown'} scores ({description['score_kind']}), "
        f"{pairs:,} pairs of {queries:,} queries",
        f"made {description['created']}, fingerprint {description['fingerprint'][:12]}, "
        f"{shards:,} shard{'' if shards == 1 else 's'}",
    ]


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """Details first, then the recipe's other keys; what is empty is left out."""
    details = {key: _separated(value) for key, value in description["details"].items()}
    facts = {**details, **description["recipe"], **details}
    return {key: value for key, value in facts.items() if key not in _SAID_ELSEWHERE}


def _separated(value: Any) -> Any:
    """A value in which whole numbers are written with separators of thousands."""
    if isinstance(value, dict):
        return {key: _separated(part) for key, part in value.items()}
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    found = _rows(rows, "  ")
    return [title, *found] if found else []


def _rows(rows: Mapping[str, Any], indent: str) -> list[str]:
    """A line for each value, then each mapping as a heading over its own lines. What is empty is left out."""
    plain = {key: value for key, value in rows.items() if not isinstance(value, dict) and value not in (None, [], "")}
    width = max(map(len, plain), default=0)
    found = [f"{indent}{key:<{width}}  {_value(value)}" for key, value in plain.items()]
    for key, value in rows.items():
        if isinstance(value, dict) and (inner := _rows(value, f"{indent}  ")):
            found += [f"{indent}{key}", *inner]
    return found


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _input(entry: Mapping[str, str]) -> str:
    return f"{entry.get('absolute', entry.get('name', 'unnamed'))} ({entry['fingerprint'][:12]})"


def _members(members: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """What an ensemble was made of, a line a member."""
    if not members:
        return []
    found = ["Members"]
    for name, member in members.items():
        revision = f"revision {member['revision']}" if member.get("revision") else None
        fingerprint = f"fingerprint {member['fingerprint'][:12]}" if member.get("fingerprint") else None
        parts = (member.get("score_kind"), member.get("teacher"), member.get("model"), revision, fingerprint)
        found.append(f"  {name}: {', '.join(str(part) for part in parts if part)}")
    return found


def _failed(failed: Mapping[str, Any] | None) -> list[str]:
    if failed is None:
        return []
    examples = [
        f"  query {row['query_id']!r}, document {row['doc_id']!r}: {_value(row['reason'])}" for row in failed["first"]
    ]
    if examples and failed["pairs"] > len(examples):
        examples.append(f"  … and {failed['pairs'] - len(examples):,} more in failed.jsonl")
    return [f"{failed['pairs']:,} pairs could not be scored and are not in the file", *examples]


def _counts(counts: Mapping[str, int]) -> list[str]:
    """Every count that no other line says, and what is too many of it."""
    rest = {name: value for name, value in counts.items() if name not in _COUNTED_ELSEWHERE}
    if not rest:
        return []
    width = max(len(f"{value:,}") for value in rest.values())
    found = [f"  {value:>{width},} {_COUNTS.get(name, name.replace('_', ' '))}" for name, value in rest.items()]
    unit = "windows" if "windows" in counts else "pairs"
    asked = counts.get("windows", counts["pairs"] - counts.get("reused_pairs", 0))
    for name, alarm in _ALARMS.items():
        if counts.get(name, 0) > _MANY * asked:
            share = counts[name] / max(asked, 1)
            found.append(f"  WARNING: {counts[name]:,} for {asked:,} {unit} ({share:.0%}): {alarm}")
    return ["Counts", *found]


def _scores(description: Mapping[str, Any]) -> list[str]:
    scores = description["scores"]
    quantiles = {"min": scores["min"], **scores["quantiles"], "max": scores["max"]}
    return [
        f"Scores ({description['score_kind']}): mean {_number(scores['mean'])}, "
        f"standard deviation {_number(scores['std'])}",
        f"  {_quantiles(quantiles)}",
    ]


def _queries(queries: Mapping[str, Any], ties: Mapping[str, Any], pairs: int) -> list[str]:
    documents, spread = queries["documents"], queries["spread"]
    found = [
        "Within a query",
        f"  documents: {documents['min']:,} to {documents['max']:,}, median {documents['median']:g}",
        f"  spread (highest minus lowest score): mean {_number(spread['mean'])}; {_quantiles(spread['quantiles'])}",
        f"  ties: {ties['pairs']:,} of {pairs:,} scores ({ties['share']:.2%}) are those of another document of the "
        f"query; queries with ties: {ties['queries']:,}",
    ]
    if queries["all_tied"]:
        found.append(f"  queries that teach nothing, because all their documents tie: {queries['all_tied']:,}")
    if queries["one_document"]:
        found.append(f"  queries with a single document: {queries['one_document']:,}")
    if ties["hint"]:
        found.append(f"  {ties['hint']}")
    return found


def _truncation(truncation: Mapping[str, Any], unit: str) -> list[str]:
    if not truncation["known_pairs"]:
        return ["Truncation: the file does not say what was cut"]
    if not truncation["cut_pairs"]:
        return [f"Truncation: none of the {truncation['known_pairs']:,} pairs was cut"]
    share = truncation["cut_pairs"] / truncation["known_pairs"]
    worst = [f"{row['doc_id']!r} ({row['most']:,} in a pair, {row['pairs']:,} pairs)" for row in truncation["worst"]]
    return [
        f"Truncation: {truncation['cut_pairs']:,} of {truncation['known_pairs']:,} pairs ({share:.1%}) were cut, "
        f"{truncation['tokens_lost']:,} {unit} were not read",
        f"  {truncation['cut_documents']:,} documents were cut; most {unit} lost: {', '.join(worst)}",
    ]


def _labels(labels: Mapping[str, Any]) -> list[str]:
    if labels["why_not"]:
        return [f"Labels: not compared ({labels['why_not']})"]
    if not labels["splits"]:
        return [f"Labels: no split of {labels['collection']} judges a query of this file"]
    found = [f"Teacher against the labels of {labels['collection']} (unjudged documents count as not relevant)"]
    for split, values in labels["splits"].items():
        found.append(
            f"  {split}: {values['queries']:,} of {values['judged_queries']:,} judged queries are in the file; "
            f"{values['relevant_scored']:,} of their {values['relevant']:,} relevant documents were scored"
        )
        if values["queries"]:
            found.append(f"    {MEASURE} of the teacher's ranking of the candidates: {values[MEASURE]:.4f}")
        if values["auc_queries"]:
            found.append(
                f"    AUC of relevant against other documents of the query: {values['auc']:.4f} "
                f"(mean of the {values['auc_queries']:,} queries that have both)"
            )
        if split in labels["judged_candidates"]:
            found.append("    its relevant documents were added to the candidates: do not compare this with a search")
    return found


def _quantiles(values: Mapping[str, float]) -> str:
    return " · ".join(f"{'median' if name == '50%' else name} {_number(value)}" for name, value in values.items())


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _aligned(edges: Sequence[float]) -> list[str]:
    """The edges as right-aligned text with as many decimals as tell neighbours apart."""
    step = (edges[-1] - edges[0]) / (len(edges) - 1)
    decimals = next((n for n in range(9) if step * 10**n >= 10), 9)
    texts = [f"{edge:,.{decimals}f}" for edge in edges]
    width = max(map(len, texts))
    return [f"{text:>{width}}" for text in texts]
