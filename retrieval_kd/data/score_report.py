"""The description of a score file: who made it, how the scores lie, what was cut, and how they fit the labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.score_kinds import COUNTED_KINDS
from retrieval_kd.data.score_labels import against_labels
from retrieval_kd.data.score_pictures import refuse_other_formats, write_histogram
from retrieval_kd.data.score_statistics import Moments, Quantiles, Truncation, WithinQueries
from retrieval_kd.data.scores import Scores, read_shard
from retrieval_kd.errors import ArtifactError, InputError
from retrieval_kd.progress import progress

SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 60
MANY_TIES = 0.01
"""The share of tied pairs from which the report says what may be behind them."""

_FAILED = "failed.jsonl"
_EXAMPLES = 3
_CENTRE = (0.005, 0.995)
"""The histogram leaves out what lies beyond these quantiles when outliers would press the rest into few bins."""


class ShardColumns(NamedTuple):
    """A shard as flat arrays; rows without a document are left out."""

    lengths: np.ndarray
    scores: np.ndarray
    known_doc_ids: Any
    """The documents (pyarrow array) of the pairs whose truncation is known, and ``tokens_lost`` of these pairs."""
    tokens_lost: np.ndarray


def describe_scores(
    path: str | Path,
    *,
    collection: str | Path | Collection | None = None,
    split: str | None = None,
    png: str | Path | None = None,
) -> dict[str, Any]:
    """Everything there is to say about the score file at ``path``, as plain values for JSON; `lines` says it in words.

    The shards are read twice and never held together: all numbers are exact at any size. The scores are compared with
    the judgements of ``split`` (every split that the file has queries of, when None) if the collection is found where
    the manifest says or is given. ``png`` is the file to draw the histogram into. Raises `ArtifactError` when the
    collection that is given is another one, `InputError` for an unknown split or a file without scores, `UsageError`
    for a picture that is no PNG.
    """
    if png is not None:
        refuse_other_formats(Path(png))
    scores = Scores.load(path)
    manifest = scores.manifest
    if not manifest.counts.get("pairs"):
        raise InputError(f"{path}: holds no scores")
    labels = _labels(scores, collection, split)
    description = {
        "path": str(path),
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "teacher": manifest.details.get("teacher"),
        "score_kind": scores.score_kind,
        "details": manifest.details,
        "recipe": manifest.recipe,
        "inputs": manifest.inputs,
        "software": manifest.software,
        "counts": manifest.counts,
        "failed": _failed(scores),
        **_distribution(scores),
        "labels": labels,
    }
    if png is not None:
        write_histogram(description, Path(png))
    return description


def shard_columns(path: Path) -> ShardColumns:
    """The columns of the shard at ``path``."""
    import pyarrow.compute as pc

    table = read_shard(path).combine_chunks()
    lengths = pc.list_value_length(table["scores"]).to_numpy().astype(np.int64)
    known = table.filter(pc.is_valid(table["tokens_lost"]))
    return ShardColumns(
        lengths[lengths > 0],
        pc.list_flatten(table["scores"]).to_numpy(),
        pc.list_flatten(known["doc_ids"]).combine_chunks(),
        pc.list_flatten(known["tokens_lost"]).to_numpy(),
    )


def histogram_range(moments: Moments, quantiles: Quantiles) -> tuple[float, float]:
    """The range that the histogram shows: all scores, or the middle 99 % when the whole range is three times theirs."""
    low = max(moments.low, quantiles.roughly(_CENTRE[0])[0])
    high = min(moments.high, quantiles.roughly(_CENTRE[1])[1])
    return (low, high) if 0 < 3 * (high - low) < moments.high - moments.low else (moments.low, moments.high)


def _distribution(scores: Scores) -> dict[str, Any]:
    moments, quantiles, within, truncation = Moments(), Quantiles(SHARES), WithinQueries(), Truncation()
    pairs = scores.manifest.counts["pairs"]
    with progress("reading scores", 2 * pairs) as advance:
        for columns in _columns(scores, advance):
            moments.add(columns.scores)
            quantiles.add(columns.scores)
            within.add(columns.lengths, columns.scores)
            truncation.add(columns.known_doc_ids, columns.tokens_lost)
        low, high = histogram_range(moments, quantiles)
        edges = np.linspace(low, high, BINS + 1) if low < high else np.array([low, high])
        counts = np.zeros(len(edges) - 1, dtype=np.int64)
        below = above = 0
        for columns in _columns(scores, advance):
            quantiles.refine(columns.scores)
            counts += np.histogram(columns.scores.astype(np.float64), edges)[0] if low < high else len(columns.scores)
            below += int((columns.scores < low).sum())
            above += int((columns.scores > high).sum())
    return {
        "scores": {
            "pairs": moments.count,
            "mean": moments.mean,
            "std": moments.std,
            "min": moments.low,
            "max": moments.high,
            "quantiles": _named(quantiles.values()),
        },
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist(), "below": below, "above": above},
        "queries": _queries(within),
        "ties": _ties(within, moments.count, scores.score_kind),
        "truncation": {
            "known_pairs": truncation.known_pairs,
            "cut_pairs": truncation.cut_pairs,
            "tokens_lost": truncation.tokens_lost,
            "cut_documents": truncation.documents().num_rows,
            "worst": truncation.worst(),
        },
    }


def _columns(scores: Scores, advance: Callable[[int], None]) -> Iterator[ShardColumns]:
    for shard in scores.shards:
        columns = shard_columns(shard)
        if len(columns.scores):
            yield columns
        advance(len(columns.scores))


def _queries(within: WithinQueries) -> dict[str, Any]:
    lengths, spreads = within.lengths, within.spreads.astype(np.float64)
    return {
        "queries": len(lengths),
        "documents": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
        "spread": {"mean": float(spreads.mean()), "quantiles": _named(np.quantile(spreads, SHARES).tolist())},
        "one_document": int((lengths == 1).sum()),
        "all_tied": int(((spreads == 0) & (lengths > 1)).sum()),
    }


def _ties(within: WithinQueries, pairs: int, score_kind: str) -> dict[str, Any]:
    """Pairs that share their score with another document of the query, and what may be behind them."""
    share = within.tied_pairs / pairs
    hint = None
    if share >= MANY_TIES and score_kind not in COUNTED_KINDS:
        low_precision = [name for name, every in within.representable.items() if every]
        if within.small_integers:
            hint = "every score is a small whole number, as grades and ranks are: such scores tie by nature"
        elif low_precision:
            hint = (
                f"every score is a {low_precision[0]} number: was the teacher run in low precision? "
                "Then score in float32"
            )
        else:
            hint = (
                "look at both ends of the histogram: a saturated activation ties, and so do documents that are copies"
            )
    return {"pairs": within.tied_pairs, "share": share, "queries": within.queries_with_ties, "hint": hint}


def _named(quantiles: list[float]) -> dict[str, float]:
    return {f"{share:.0%}": value for share, value in zip(SHARES, quantiles, strict=True)}


def _failed(scores: Scores) -> dict[str, Any] | None:
    """How many pairs the teacher could not score, and the first of them; None when the file says nothing of any."""
    path, pairs = scores.path / _FAILED, scores.manifest.counts.get("failed_pairs", 0)
    if not path.is_file():
        return {"pairs": pairs, "first": []} if pairs else None
    with path.open(encoding="utf-8") as file:
        examples = [json.loads(text) for text in islice(file, _EXAMPLES)]
    return {"pairs": pairs, "first": examples}


def _labels(scores: Scores, given: str | Path | Collection | None, split: str | None) -> dict[str, Any]:
    if given is not None:
        from retrieval_kd.data.sources import open_collection

        collection = open_collection(given)
        recorded = scores.manifest.inputs.get("collection")
        if recorded is not None and recorded["fingerprint"] != collection.fingerprint:
            raise ArtifactError(
                f"{given} is not the collection that {scores.ref().path} was made with "
                f"(fingerprint {collection.fingerprint[:12]}, needed {recorded['fingerprint'][:12]})"
            )
    else:
        try:
            collection = Collection.load(scores.locate("collection"))
        except ArtifactError as error:
            return {"collection": None, "splits": {}, "why_not": str(error)}
    splits = against_labels(scores, collection, split)
    judged = [name for name in splits if f"qrels:{name}" in scores.manifest.recipe.get("candidates", ())]
    return {"collection": collection.name, "splits": splits, "judged_candidates": judged, "why_not": None}
