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
_SAID_ELSEWHERE = {"teacher", "score_kind"}


def lines(description: Mapping[str, Any]) -> list[str]:
    """The lines of text that say what `describe_scores` found."""
    parts = [
        _heading(description),
        _table("Teacher", _facts(description)),
        _table("Made from", {name: _input(entry) for name, entry in description["inputs"].items()}),
        [f"Software: {', '.join(f'{name} {version}' for name, version in description['software'].items())}"],
        _failed(description["failed"]),
        _scores(description),
        histogram_lines(description["histogram"]),
        _queries(description["queries"], description["ties"], description["scores"]["pairs"]),
        _truncation(description["truncation"]),
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
    return [
        f"{description['path']}: {description['teacher'] or 'unknown'} scores ({description['score_kind']}), "
        f"{pairs:,} pairs of {queries:,} queries",
        f"made {description['created']}, fingerprint {description['fingerprint'][:12]}",
    ]


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """Details first, then the recipe's other keys; what is empty is left out, and mappings are opened one level."""
    details = {key: value for key, value in description["details"].items() if key not in _SAID_ELSEWHERE}
    recipe = {key: value for key, value in description["recipe"].items() if key != "kind" and key not in details}
    facts = {}
    for key, value in {**details, **recipe}.items():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
        facts.update({name: part for name, part in parts.items() if part not in (None, [], {}, "")})
    return facts


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    width = max((len(key) for key in rows), default=0)
    return [title, *(f"  {key:<{width}}  {_value(value)}" for key, value in rows.items())] if rows else []


def _value(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: part for key, part in value.items() if part is not None}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _input(entry: Mapping[str, str]) -> str:
    return f"{entry.get('absolute', entry.get('name', 'unnamed'))} ({entry['fingerprint'][:12]})"


def _failed(failed: Mapping[str, Any] | None) -> list[str]:
    if failed is None:
        return []
    examples = [f"  {_value(example)}" for example in failed["first"]]
    return [f"{failed['pairs']:,} pairs could not be scored and are not in the file", *examples]


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


def _truncation(truncation: Mapping[str, Any]) -> list[str]:
    if not truncation["known_pairs"]:
        return ["Truncation: the file does not say what was cut"]
    if not truncation["cut_pairs"]:
        return [f"Truncation: none of the {truncation['known_pairs']:,} pairs was cut"]
    share = truncation["cut_pairs"] / truncation["known_pairs"]
    worst = [f"{row['doc_id']!r} ({row['most']:,} in a pair, {row['pairs']:,} pairs)" for row in truncation["worst"]]
    return [
        f"Truncation: {truncation['cut_pairs']:,} of {truncation['known_pairs']:,} pairs ({share:.1%}) were cut, "
        f"{truncation['tokens_lost']:,} tokens were not read",
        f"  {truncation['cut_documents']:,} documents were cut; most tokens lost: {', '.join(worst)}",
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
