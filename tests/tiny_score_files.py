"""Small score artifacts, the same scores in every layout, and what is compared of a file that went there and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.score_formats.convert import convert_scores
from retrieval_kd.data.score_formats.export import Written
from retrieval_kd.data.scores import Scores, write_shard
from retrieval_kd.plan import Plan

Rows = Sequence[tuple[str, Sequence[str], Sequence[float]]]

MAXIMUM, SUBNORMAL = 3.4028234663852886e38, 1.401298464324817e-45
ROWS: Rows = [("q1", ["d3", "d1", "d2"], [0.1, 2.5, -0.0]), ("q2", ["d2", "d4"], [16777216.0, SUBNORMAL])]


def make_scores(out: Path, rows: Rows = ROWS, collection: Collection | None = None, per_shard: int = 1) -> Scores:
    """A score artifact with ``per_shard`` queries a shard."""
    inputs = {} if collection is None else {"collection": collection.ref()}
    parts = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]
    with Plan("scores", {"kind": "made"}, inputs).write(out) as draft:
        for i, part in enumerate(parts):
            ids, doc_ids, scores = zip(*part, strict=True)
            path = draft.path / f"shard-{i:05d}-of-{len(parts):05d}.parquet"
            write_shard(path, ids, doc_ids, [np.array(values, dtype=np.float32) for values in scores], {})
        pairs = sum(len(doc_ids) for _, doc_ids, _ in rows)
        draft.counts.update(queries=len(rows), pairs=pairs, shards=len(parts))
        draft.details.update(score_kind="logit", teacher="made")
    return Scores.load(out)


def bits(scores: Scores) -> dict[str, dict[str, int]]:
    """Query → document → the bits of its score."""
    return {row.query_id: dict(zip(row.doc_ids, row.scores.view(np.uint32).tolist(), strict=True)) for row in scores}


def bits_of(rows: Rows) -> dict[str, dict[str, int]]:
    """The same of rows."""
    return {
        query_id: dict(zip(doc_ids, np.array(scores, dtype=np.float32).view(np.uint32).tolist(), strict=True))
        for query_id, doc_ids, scores in rows
    }


def export(scores: Scores, name: str, out: Path, **options: Any) -> Path:
    """The file that a score artifact was written to."""
    written = convert_scores(scores.path, from_format="retrieval-kd", to_format=name, out=out, **options)
    assert isinstance(written, Written) and written.path == out
    return out


def imported(source: Path, name: str, **options: Any) -> Scores:
    """The score artifact beside a file."""
    out = options.pop("out", source.with_name(source.name + ".scores"))
    found = convert_scores(source, from_format=name, to_format="retrieval-kd", out=out, **options)
    assert isinstance(found, Scores)
    return found


def written(tmp_path: Path, text: str, name: str = "in.jsonl") -> Path:
    """A new text file."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


HOFSTAETTER = "2.5\t0.1\tq1\td1\td3\n2.5\t-0.0\tq1\td1\td2\n1.6777216e+07\t1e-45\tq2\td2\td4\n"
HOFSTAETTER_BY_QRELS = "2.5\t0.1\tq1\td1\td3\n2.5\t-0.0\tq1\td1\td2\n1e-45\t1.6777216e+07\tq2\td4\td2\n"
TREC = (
    "q1 Q0 d1 1 2.5 retrieval-kd\nq1 Q0 d3 2 0.1 retrieval-kd\nq1 Q0 d2 3 -0.0 retrieval-kd\n"
    "q2 Q0 d2 1 1.6777216e+07 retrieval-kd\nq2 Q0 d4 2 1e-45 retrieval-kd\n"
)
PYLATE = (
    '{"query_id": "q1", "document_ids": ["d3", "d1", "d2"], "scores": [0.1, 2.5, -0.0]}\n'
    '{"query_id": "q2", "document_ids": ["d2", "d4"], "scores": [1.6777216e+07, 1e-45]}\n'
)
FLAGEMBEDDING = (
    '{"query": "who sleeps", "pos": ["Cats sleep all day"], "neg": ["Dogs bark", "Empty"], "pos_scores": [2.5], '
    '"neg_scores": [0.1, -0.0], "query_id": "q1", "pos_ids": ["d1"], "neg_ids": ["d3", "d2"]}\n'
    '{"query": "who barks", "pos": ["Empty"], "neg": ["Dogs bark"], "pos_scores": [1.6777216e+07], '
    '"neg_scores": [1e-45], "query_id": "q2", "pos_ids": ["d2"], "neg_ids": ["d4"]}\n'
)
TEVATRON = (
    '{"query_id": "q1", "query": "who sleeps", "positive_passages": '
    '[{"docid": "d1", "title": "Cats", "text": "sleep all day", "score": 2.5}], "negative_passages": '
    '[{"docid": "d3", "title": "", "text": "Dogs bark", "score": 0.1}, '
    '{"docid": "d2", "title": "Empty", "text": "", "score": -0.0}]}\n'
    '{"query_id": "q2", "query": "who barks", "positive_passages": '
    '[{"docid": "d2", "title": "Empty", "text": "", "score": 1.6777216e+07}], "negative_passages": '
    '[{"docid": "d4", "title": "Dogs", "text": "bark", "score": 1e-45}]}\n'
)
SENTENCE_TRANSFORMERS = (
    '{"query": "who sleeps", "positive": "Cats sleep all day", "negative_1": "Dogs bark", "label": [2.5, 0.1]}\n'
    '{"query": "who sleeps", "positive": "Cats sleep all day", "negative_1": "Empty", "label": [2.5, -0.0]}\n'
    '{"query": "who barks", "positive": "Empty", "negative_1": "Dogs bark", "label": [1.6777216e+07, 1e-45]}\n'
)
GOLDEN = {
    "hofstaetter-tsv": ("x.tsv", HOFSTAETTER),
    "trec": ("x.trec", TREC),
    "pylate": ("x.jsonl", PYLATE),
    "flagembedding": ("x.jsonl", FLAGEMBEDDING),
    "tevatron": ("x.jsonl", TEVATRON),
    "sentence-transformers": ("x.jsonl", SENTENCE_TRANSFORMERS),
}
