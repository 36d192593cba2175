"""Score files with given rows, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.score_writer import ShardWriter, write_failed
from retrieval_kd.data.scores import ScoredQuery, Scores, total_counts
from retrieval_kd.plan import Plan

Row = tuple[str, list[str], list[float], list[int] | None]
"""Query, documents, scores, tokens lost."""


def scored(row: Row) -> ScoredQuery:
    query_id, doc_ids, scores, lost = row
    tokens_lost = None if lost is None else np.array(lost, dtype=np.int32)
    return ScoredQuery(query_id, doc_ids, np.array(scores, dtype=np.float32), tokens_lost)


def make_scores(
    out: Path,
    rows: Sequence[Row],
    *,
    inputs: Mapping[str, InputRef] | None = None,
    recipe: Mapping[str, Any] | None = None,
    pairs_per_shard: int = 4,
    failed: Sequence[Sequence[str]] = (),
    **details: Any,
) -> Path:
    """The folder of a score file; its kind of score is a logit unless ``score_kind`` is given."""
    with Plan("scores", {"kind": "made", **(recipe or {})}, inputs or {}).write(out) as draft:
        writer = ShardWriter(draft.path, pairs_per_shard)
        for row in rows:
            writer.add(scored(row))
        write_failed(draft.path, failed)
        draft.counts.update(total_counts(writer.close()) | {"failed_pairs": len(failed)})
        draft.details.update({"score_kind": "logit", "teacher": "made", **details})
    return out


def by_query(scores: Scores) -> dict[str, dict[str, float]]:
    """Query → document → score."""
    return {row.query_id: dict(zip(row.doc_ids, row.scores.tolist(), strict=True)) for row in scores}
