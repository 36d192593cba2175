"""The queries to train on, with their candidates: which can be used, and how many cannot and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from retrieval_kd.errors import InputError, UsageError, first
from retrieval_kd.students.candidate_lists import CandidateLists
from retrieval_kd.students.groups import TrainingQuery, allowed_negatives
from retrieval_kd.students.sampling import Groups

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.run import Run
    from retrieval_kd.data.scores import Scores

log = logging.getLogger("retrieval_kd")

_LACKS = {
    "candidates": "candidates",
    "relevant_document": "relevant document",
    "scored_positive": "positive that the teacher scored (above 0 for a relative rule)",
    "negative": "negative",
    "margin": "margin of min_margin",
    "teacher_score": "teacher's score",
}
"""Why a query is left out: the end of its count's name, and in words."""

_SIGNED_KINDS = ("logit", "log_odds", "rank")
"""Kinds of scores of which a share means nothing: their zero is arbitrary."""


class TrainingQueries(NamedTuple):
    """The lists to train on and what was counted: queries left out by reason, negatives dropped, short groups."""

    queries: list[TrainingQuery]
    counts: dict[str, int]


def check_files(groups: Groups, scores: Sequence[Scores]) -> None:
    """Raises `UsageError` when ``groups`` asks for what these score files do not give."""
    key = groups.needs_scores
    if key is not None and not scores:
        alone = " (on labels alone, set groups.positive=qrels)" if groups.positive == "teacher" else ""
        raise UsageError(f"groups.{key} needs --scores{alone}")
    if groups.mix is not None and len(groups.mix) != len(scores):
        raise UsageError(f"groups.mix has {len(groups.mix)} weights for {len(scores)} score files; give one each")
    for file in scores:
        if (
            groups.false_negatives is not None
            and groups.false_negatives.relative is not None
            and file.score_kind in _SIGNED_KINDS
        ):
            raise UsageError(
                f"{file.path}: scores of the kind '{file.score_kind}' have no zero, so that a share of them means "
                "nothing; in the recipe, give groups.false_negatives a margin in place of relative"
            )


def training_queries(
    collection: Collection,
    split: str,
    groups: Groups,
    scores: Sequence[Scores],
    candidates: Run | None,
    losses: Sequence[str] = (),
) -> TrainingQueries:
    """The queries of ``split`` that can be trained on. What cannot be used is counted and said once.

    Several score files are joined (a later file adds what the former lack), or stay apart where they are mixed.
    Documents that only ``candidates`` names have the score NaN, as scores that are not finite. ``losses`` are those
    that learn from scores. Raises `InputError` when no query is left, `UsageError` for what the files do not give.
    """
    check_files(groups, scores)
    if groups.reads_labels and split not in collection.splits:
        key = "positive: teacher" if groups.positive == "qrels" else "labels: ignore"
        raise InputError(f"{collection.path}: split '{split}' has no qrels; name one that has, or set groups.{key}")
    texts = collection.queries(split)
    apart = [[file] for file in scores] if groups.mix is not None else [list(scores)]
    reader = CandidateLists(collection.documents, list(texts))
    files = [reader.lists(joined, candidates) for joined in apart]
    relevant = reader.relevant(collection.qrels(split)) if groups.reads_labels else {}
    sieve = _Sieve(groups)
    sieve.left_out["candidates"] = [i for i in texts if not any(i in lists for lists in files)]
    found = []
    for number, lists in enumerate(files):
        for query_id, text in texts.items():
            if query_id in lists:
                rows, values = lists.pop(query_id)
                found += sieve.usable(query_id, text, rows, values, relevant.get(query_id, _NO_ROWS), number)
    sieve.say(split, len(texts), reader.not_finite, losses)
    if not found:
        why = ", ".join(f"{len(ids)} without {_LACKS[key]}" for key, ids in sieve.left_out.items() if ids)
        raise InputError(
            f"no query of split '{split}' can be trained on ({len(texts)} queries{why and ': ' + why}); "
            "were scores or candidates made for this split?"
        )
    return TrainingQueries(found, sieve.counts())


def queries_without_documents(collection: Collection, split: str) -> list[TrainingQuery]:
    """The queries of ``split`` for a student that needs no document. Raises `InputError` when there is none."""
    nothing = np.zeros(0, dtype=bool)
    scores = np.zeros(0, dtype=np.float32)
    found = [
        TrainingQuery(query_id, text, _NO_ROWS, scores, nothing) for query_id, text in collection.queries(split).items()
    ]
    if not found:
        raise InputError(f"split '{split}' has no queries to train on")
    return found


_NO_ROWS = np.empty(0, dtype=np.int32)
_BEST = np.zeros(1, dtype=np.int64)


class _Sieve:
    """Decides which lists can be trained on, and counts what cannot."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.unfiltered = groups.model_copy(update={"false_negatives": None})
        self.left_out: dict[str, list[str]] = {reason: [] for reason in _LACKS}
        self.equal: list[str] = []
        self.sizes: list[int] = []
        self.negatives = self.false_negatives = self.positives_left_out = 0

    def usable(
        self, query_id: str, text: str, rows: np.ndarray, values: np.ndarray, relevant: np.ndarray, file: int
    ) -> list[TrainingQuery]:
        """The query as it is visited: not at all, once, or once for each positive."""
        by_labels = self.groups.positive == "qrels"
        if self.groups.reads_labels:  # also where none is drawn: another query's document may be one
            missing = relevant[~np.isin(relevant, rows)]
            rows = np.concatenate([rows, missing])
            values = np.concatenate([values, np.full(len(missing), np.nan, dtype=np.float32)])
        query = TrainingQuery(query_id, text, rows, values, np.isin(rows, relevant), _BEST, file)
        if by_labels:
            query = replace(query, positives=np.flatnonzero(query.relevant))
        query, reason = self._without_useless_positives(query)
        if reason is not None:
            self.left_out[reason].append(query_id)
            return []
        known = values[np.isfinite(values)]
        if len(known) > 1 and known.min() == known.max():
            self.equal.append(query_id)
        if self.groups.positives == "one":
            return [query]
        return [replace(query, positives=query.positives[[i]]) for i in range(len(query.positives))]

    def _without_useless_positives(self, query: TrainingQuery) -> tuple[TrainingQuery, str | None]:
        """The query with the positives that have what the recipe asks for; why there are none."""
        groups, scores = self.groups, query.scores
        if not len(query.positives):
            return query, "relevant_document"
        positives = query.positives
        if groups.false_negatives is not None or groups.min_margin is not None:
            relative = groups.false_negatives is not None and groups.false_negatives.relative is not None
            positives = positives[scores[positives] > (0 if relative else -np.inf)]
            if not len(positives):
                return query, "scored_positive"
        negatives = {int(position): allowed_negatives(query, groups, int(position)) for position in positives}
        if groups.false_negatives is not None:
            self.negatives += (allowed := sum(len(allowed_negatives(query, self.unfiltered, p)) for p in negatives))
            self.false_negatives += allowed - sum(map(len, negatives.values()))
        negatives = {position: others for position, others in negatives.items() if len(others)}
        if not negatives:
            return query, "negative"
        if groups.positive == "teacher" and np.isnan(scores[0]):
            return query, "teacher_score"
        if groups.min_margin is not None:
            kept = {p: others for p, others in negatives.items() if _widest(scores, p, others) >= groups.min_margin}
            if not kept:
                return query, "margin"
            negatives = kept
        self.positives_left_out += len(query.positives) - len(negatives)
        pool = groups.pool if groups.negatives == "top-random" else len(scores)
        self.sizes.append(1 + min(pool, *map(len, negatives.values())))
        return replace(query, positives=np.array(list(negatives))), None

    def counts(self) -> dict[str, int]:
        """What was counted, but for zeros."""
        counts = {f"queries_without_{reason}": len(ids) for reason, ids in self.left_out.items()}
        counts |= {
            "positives_left_out": self.positives_left_out,
            "false_negatives": self.false_negatives,
            "equal_scores": len(self.equal),
            "short_groups": self._short(),
        }
        return {name: count for name, count in counts.items() if count}

    def _short(self) -> int:
        return sum(size < self.groups.documents for size in self.sizes)

    def say(self, split: str, total: int, not_finite: dict[str, int], losses: Sequence[str]) -> None:
        """One line for each thing that was left out or masked."""
        for reason, ids in self.left_out.items():
            if ids:
                of = f"%d of %d queries of '%s' have no {_LACKS[reason]} and are left out: %s"
                log.warning(of, len(ids), total, split, first(ids))
        if not_finite:
            log.warning(
                "%d scores of %d queries are NaN or infinite and count as unknown: %s",
                sum(not_finite.values()),
                len(not_finite),
                first(not_finite),
            )
        if self.positives_left_out:
            log.warning("%d further positives have no score, negative or margin: left out", self.positives_left_out)
        if self.false_negatives:
            log.info(
                "false_negatives: %d of %d negatives are never drawn, by their score",
                self.false_negatives,
                self.negatives,
            )
        if self.equal and losses:
            log.warning(
                "%d of %d queries have one score for all documents, no order for %s to learn: %s",
                len(self.equal),
                total,
                ", ".join(losses),
                first(self.equal),
            )
        if short := self._short():
            log.warning(
                "groups.documents: %d, but %d of %d queries have fewer (the most is %d); empty slots are masked",
                self.groups.documents,
                short,
                len(self.sizes),
                max(self.sizes),
            )


def _widest(scores: np.ndarray, positive: int, negatives: np.ndarray) -> float:
    """The largest margin of a positive to its negatives; -inf where none is scored."""
    known = scores[negatives][np.isfinite(scores[negatives])]
    return float(scores[positive] - known.min()) if len(known) else -np.inf
