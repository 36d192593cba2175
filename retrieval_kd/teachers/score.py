"""The verb `score`: a teacher scores candidates into shards, and goes on after the last complete one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.artifact import InputRef, Plan
from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import Scores, read_shard, shard_statistics, write_shard
from retrieval_kd.errors import ArtifactError, InputError, UsageError, first
from retrieval_kd.progress import progress
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import implementation
from retrieval_kd.teachers.base import Candidates, ScoringJob, Teacher, TeacherRecipe

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

JUDGED = "qrels:"
"""Prefix of the pseudo-run that holds a split's judged relevant documents: ``qrels:train``."""


def score(
    recipe: str,
    *,
    collection: str | Path | Collection,
    candidates: Sequence[str | Path],
    out: str | Path,
    vectors: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    force: bool = False,
) -> Scores:
    """The score file of a teacher over the union of candidate runs.

    A candidate source is a run (artifact or TREC file) or ``qrels:SPLIT``, the relevant documents of a split.
    ``vectors`` made by the same model spare a bi-encoder the encoding. Raises `InputError` for unknown ids,
    `RetrievalKDError` when the teacher gives NaN.
    """
    from retrieval_kd.data.sources import open_collection

    out = Path(out)
    opened = open_collection(collection)
    loaded, sources = _open(recipe, overrides, opened, candidates)
    teacher: Teacher = implementation("teachers", loaded.kind)(loaded)
    ready = _ready_vectors(vectors, teacher, opened)
    resolved = loaded.resolved() | {"candidates": [str(c) for c in candidates if str(c).startswith(JUDGED)]}
    plan = Plan("scores", resolved, {"collection": opened.ref(), "model": teacher.ref(), **sources.refs})
    if plan.finished(out, force=force):
        return Scores.load(out)
    queries = gather_candidates(opened, sources.runs)
    shards = plan_shards(queries, loaded.pairs_per_shard)
    pairs = sum(len(query.rows) for query in queries)
    with plan.write(out, force=force, resumable=True) as draft:
        paths = [draft.path / f"shard-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
        done = {i: lost for i, path in enumerate(paths) if (lost := _finished_shard(path, shards[i])) is not None}
        if done:
            log.info("going on after %d of %d shards", len(done), len(shards))
        teacher.prepare(ScoringJob(opened, queries, ready, draft.work))
        lost = teacher.truncation.to_json()
        finished_pairs = sum(len(query.rows) for i in done for query in shards[i])
        with progress(f"scoring {pairs:,} pairs", pairs, done=finished_pairs) as advance:
            for i, shard in enumerate(shards):
                if i not in done:
                    done[i] = _score_shard(teacher, opened, shard, paths[i])
                    advance(sum(len(query.rows) for query in shard))
        lost = {key: value + sum(of_shard[key] for of_shard in done.values()) for key, value in lost.items()}
        draft.counts.update({"queries": len(queries), "pairs": pairs, "shards": len(shards), **lost})
        draft.details.update({"score_kind": teacher.score_kind, "teacher": loaded.kind, **teacher.details()})
    if lost["truncated_texts"]:
        log.warning(
            "%s texts were cut at the teacher's length, %s tokens lost",
            f"{lost['truncated_texts']:,}",
            f"{lost['tokens_lost']:,}",
        )
    return Scores.load(out)


def estimate_score(
    recipe: str,
    *,
    collection: str | Path | Collection,
    candidates: Sequence[str | Path],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What `score` would do: queries, pairs, shards, distinct texts and their words (about 1.3 tokens each)."""
    from retrieval_kd.data.sources import open_collection

    opened = open_collection(collection)
    loaded, sources = _open(recipe, overrides, opened, candidates)
    queries = gather_candidates(opened, sources.runs)
    rows = np.concatenate([query.rows for query in queries])
    sample = np.unique(rows)[:: max(1, len(np.unique(rows)) // 1000)]
    words = float(np.mean([len(text.split()) for text in opened.documents.texts(sample)]))
    query_words = float(np.mean([len(query.text.split()) for query in queries]))
    return {
        "recipe": loaded.resolved(),
        "queries": len(queries),
        "pairs": len(rows),
        "distinct_documents": len(np.unique(rows)),
        "shards": len(plan_shards(queries, loaded.pairs_per_shard)),
        "approximate_tokens": int(1.3 * (words + query_words) * len(rows)),
    }


def gather_candidates(collection: Collection, runs: Sequence[tuple[Run, int | None]]) -> list[Candidates]:
    """Each query of the runs, each taken to its depth, with the union of its candidates, in the order of the runs."""
    texts = collection.queries("all")
    union: dict[str, dict[str, None]] = {}
    for run, depth in runs:
        for query_id, doc_ids, _ in run:
            union.setdefault(query_id, {}).update(dict.fromkeys(doc_ids[:depth]))
    unknown = [query_id for query_id in union if query_id not in texts]
    if unknown:
        raise InputError(
            f"{len(unknown)} queries of the candidates are not in the collection: {first(unknown)}; "
            "were the candidates made from another collection?"
        )
    union = {query_id: doc_ids for query_id, doc_ids in union.items() if doc_ids}
    if not union:
        raise InputError("the candidate runs hold no candidates; search an index over a split first")
    return [
        Candidates(query_id, texts[query_id], collection.documents.rows(list(doc_ids)))
        for query_id, doc_ids in union.items()
    ]


def plan_shards(queries: Sequence[Candidates], pairs_per_shard: int) -> list[list[Candidates]]:
    """Consecutive queries in shards of at most ``pairs_per_shard`` pairs (a query is never divided)."""
    shards: list[list[Candidates]] = []
    pairs = pairs_per_shard + 1
    for query in queries:
        if pairs + len(query.rows) > pairs_per_shard:
            shards.append([])
            pairs = 0
        shards[-1].append(query)
        pairs += len(query.rows)
    return shards


class _Sources:
    """The opened candidate sources: runs to score, and the references of those that are inputs of their own."""

    def __init__(self, collection: Collection, candidates: Sequence[str | Path], depth: int | None) -> None:
        if not candidates:
            raise UsageError("give at least one --candidates RUN (or qrels:SPLIT)")
        self.runs: list[tuple[Run, int | None]] = []
        self.refs: dict[str, InputRef] = {}
        for source in candidates:
            if str(source).startswith(JUDGED):
                self.runs.append((_judged(collection, str(source).removeprefix(JUDGED)), None))
                continue
            run = Run.load(source)
            name = "candidates" if not self.refs else f"candidates_{len(self.refs) + 1}"
            self.refs[name] = run.ref()
            self.runs.append((run, depth))


def _open(
    recipe: str, overrides: Sequence[str], collection: Collection, candidates: Sequence[str | Path]
) -> tuple[TeacherRecipe, _Sources]:
    loaded = load_recipe(recipe, "teachers", overrides)
    if not isinstance(loaded, TeacherRecipe):
        raise UsageError(f"{recipe}: not a teacher's recipe")
    return loaded, _Sources(collection, candidates, loaded.depth)


def _judged(collection: Collection, split: str) -> Run:
    relevant = {
        query_id: [doc_id for doc_id, relevance in judged.items() if relevance > 0]
        for query_id, judged in collection.qrels(split).items()
    }
    ids = [query_id for query_id, doc_ids in relevant.items() if doc_ids]
    return Run.from_hits(ids, [relevant[i] for i in ids], [np.zeros(len(relevant[i]), dtype=np.float32) for i in ids])


def _ready_vectors(paths: Sequence[str | Path], teacher: Teacher, collection: Collection) -> list[Vectors]:
    from retrieval_kd.data.vectors import Vectors

    ready = [Vectors.load(path) for path in paths]
    for path, vectors in zip(paths, ready, strict=True):
        if vectors.model_ref.fingerprint != teacher.ref().fingerprint:
            raise ArtifactError(f"{path}: these vectors were made by another model than the teacher's")
        if vectors.manifest.inputs["collection"]["fingerprint"] != collection.fingerprint:
            raise ArtifactError(f"{path}: these vectors are of another collection")
    return ready


def _finished_shard(path: Path, shard: Sequence[Candidates]) -> dict[str, int] | None:
    """The statistics of a complete shard of a former attempt; None when it is to be scored (again)."""
    if not path.is_file():
        return None
    try:
        table = read_shard(path)
    except ArtifactError as error:
        log.warning("%s; scoring it again", error)
        return None
    return shard_statistics(table) if table["query_id"].to_pylist() == [query.query_id for query in shard] else None


def _score_shard(teacher: Teacher, collection: Collection, shard: Sequence[Candidates], path: Path) -> dict[str, int]:
    before = teacher.truncation.to_json()
    texts = [collection.documents.texts(query.rows) for query in shard]
    scores = teacher.score(shard, texts)
    after = teacher.truncation.to_json()
    statistics = {key: after[key] - before[key] for key in after}
    ids = [collection.documents.ids_of(query.rows) for query in shard]
    write_shard(path, [query.query_id for query in shard], ids, scores, statistics)
    return statistics
