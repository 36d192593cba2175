"""Five documents with and without titles, four queries, and the smallest run of `make_queries`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.sources import make_collection
from retrieval_kd.queries.make import make_queries

DOCUMENTS = {
    "d1": ("Binary search", "Search a sorted list. It halves the list each time. Fast!"),
    "d2": ("", "Stacks grow at one end, e.g. this one. So do w1 w2."),
    "d3": ("binary  Search", "another text about search without a full stop"),
    "d4": ("Heaps", ""),
    "d5": ("", ""),
}
QUERIES = {"q1": "how to search", "q2": "what is a heap", "q3": "nobody judged this", "q4": "HEAPS"}
QRELS = {"train": [("q1", "d1"), ("q2", "d4")], "test": [("q1", "d1"), ("q4", "d4")]}


def make_documents(
    folder: Path, documents: dict[str, tuple[str, str]] | None = None, splits: tuple[str, ...] = ("train", "test")
) -> Collection:
    """A collection of ``documents`` (id → title, text) with these queries and qrels."""
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    rows = [{"_id": i, "title": title, "text": text} for i, (title, text) in (documents or DOCUMENTS).items()]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"_id": query_id, "text": text} for query_id, text in QUERIES.items()]
    (beir / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    for split in splits:
        lines = "".join(f"{query_id}\t{doc_id}\t1\n" for query_id, doc_id in QRELS[split])
        (beir / "qrels" / f"{split}.tsv").write_text(lines)
    return make_collection(str(beir), folder / "collection")


def make(collection: Collection, out: Path, kind: str, query_log: Path | None = None, **keys: Any) -> Collection:
    """A collection with queries of ``kind``, in the split ``made`` unless ``keys`` say otherwise."""
    recipe = tiny.write_recipe(out.with_suffix(".yaml"), {"kind": kind, "split": "made", **keys})
    return make_queries(recipe, collection=collection, out=out, query_log=query_log)


def made_from(made: Collection, split: str = "made") -> dict[str, list[str]]:
    """Query text → the documents (or the line) that it is said to come from."""
    texts = made.queries(split)
    found: dict[str, list[str]] = {text: [] for text in texts.values()}
    for origin in made.origins:
        if origin.split == split:
            found[texts[origin.query_id]].append(origin.doc_id or f"line {origin.line}")
    return found


def noted(made: Collection, *names: str) -> tuple[int, ...]:
    """Counts of the manifest."""
    return tuple(made.manifest.counts.get(name, 0) for name in names)
