"""The rows of a small BEIR folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

CORPUS: list[dict[str, object]] = [
    {"_id": "d1", "title": "Cats", "text": "sleep all day", "metadata": {}},
    {"_id": "d3", "title": "", "text": "Dogs bark", "year": 2001, "metadata": {}},
    {"_id": "d2", "title": "Empty", "text": "", "year": 2002, "metadata": {}},
    {"_id": "d5", "title": "", "text": "", "metadata": {}},
    {"_id": "d4", "title": "Dogs", "text": "bark", "metadata": {}},
]
QUERIES = [{"_id": "q2", "text": "who barks"}, {"_id": "q1", "text": "who sleeps"}, {"_id": "q3", "text": "unjudged"}]
TEST_QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\nq2\td4\t1\n"
TRAIN_QRELS = "query-id\tcorpus-id\tscore\nq2\td3\t1\n"


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
