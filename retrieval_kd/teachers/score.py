"""The verb `score`: a teacher scores candidates into shards, alone or with workers, and goes on where it was."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.atomic import write_atomically
from retrieval_kd.data.score_writer import write_failed
from retrieval_kd.data.scores import BLAMED, FAILED, Scores, shard_name, total_counts, verified_statistics
from retrieval_kd.errors import ArtifactError, RecipeError, RetrievalKDError, UsageError
from retrieval_kd.plan import Draft, Plan
from retrieval_kd.progress import progress
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import implementation
from retrieval_kd.teachers.base import ScoringJob, Teacher, TeacherRecipe
from retrieval_kd.teachers.candidates import CandidateTable, Sources, gather_candidates, plan_shards
from retrieval_kd.teachers.isolate import Failures, Outcome, Task, finish_shard
from retrieval_kd.teachers.reuse import KnownScores, refuse_other_teachers
from retrieval_kd.teachers.shards import ShardScorer, shard_pairs
from retrieval_kd.teachers.worker import describe
from retrieval_kd.teachers.workers import over_workers

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

MAX_FAILED = 10


def score(
    recipe: str,
    *,
    collection: str | Path | Collection,
    candidates: Sequence[str | Path],
    out: str | Path,
    vectors: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    shard: str | None = None,
    workers: int | None = None,
    reuse: Sequence[str | Path] = (),
    max_failed: int = MAX_FAILED,
    force: bool = False,
) -> Scores:
    """The score file of a teacher over the union of candidate runs.

    A candidate source is a run (artifact or TREC file), a score file, or ``qrels:SPLIT``, the relevant documents of a
    split. ``vectors`` made by the same model spare a bi-encoder the encoding. ``shard`` (``2/4``) does a slice of the
    shards, which `merge_scores` joins with the others. ``workers`` are processes on this machine; None scores in this
    one. ``reuse`` are score files of the same teacher, whose pairs are not scored again.

    A document or query that cannot be scored (NaN, an exception, a process that dies over it) is left out and named in
    ``failed.jsonl``; more than ``max_failed`` of them stop the run. Raises `InputError` for unknown ids,
    `RetrievalKDError` when the run stops; finished shards are kept.
    """
    from retrieval_kd.data.sources import open_collection

    if (workers is not None and workers < 1) or max_failed < 0:
        raise UsageError(f"workers is at least 1 and max_failed at least 0 (got {workers} and {max_failed})")
    out = Path(out)
    opened = open_collection(collection)
    loaded = _teacher_recipe(recipe, overrides)
    sources = Sources(opened, candidates)
    teacher: Teacher = implementation("teachers", loaded.kind)(loaded)
    inputs = {"collection": opened.ref(), "model": teacher.ref(), **sources.refs}
    resolved = loaded.identity() | {"candidates": sources.judged}
    refuse_other_teachers(reuse, resolved, {name: ref.fingerprint for name, ref in inputs.items()})
    inputs |= {("reuse" if not i else f"reuse_{i + 1}"): Scores.load(path).ref() for i, path in enumerate(reuse)}
    ready = _ready_vectors(vectors, teacher, opened)
    mine = None if shard is None else _slice(shard)
    plan = Plan("scores", resolved | ({} if shard is None else {"slice": shard}), inputs)
    if plan.finished(out, force=force):
        return Scores.load(out)
    with plan.write(out, force=force, resumable=True) as draft, _nothing_left_without_work(draft):
        table = _gathered(opened, sources, loaded, draft)
        shards = plan_shards(table.lengths, loaded.pairs_per_shard)
        wanted = range(len(shards)) if mine is None else _part(mine, len(shards))
        done = {i: found for i in wanted if (found := _finished_shard(draft.path, i, shards, table)) is not None}
        if done:
            log.info("going on after %d of %d shards", len(done), len(wanted))
        job = ScoringJob(opened, table, ready, draft.work)
        scorer = ShardScorer(teacher, opened, table, shards, draft.path)
        failures = Failures(max_failed)
        for number, statistics in done.items():
            failures.blame(number, statistics[BLAMED])
        todo = [i for i in wanted if i not in done]
        pairs = [int(table.lengths[of_shard.start : of_shard.stop].sum()) for of_shard in shards]

        def finish(i: int, run: Callable[[Task], Outcome]) -> dict[str, Any]:
            return finish_shard(shard_pairs(i, scorer.queries(i), opened, teacher.independent), run, failures)

        total = sum(pairs[i] for i in wanted)
        with progress(f"scoring {total:,} pairs", total, done=sum(pairs[i] for i in done)) as advance:
            if workers is None:
                results = _in_this_process(scorer, job, reuse, todo, finish)
            else:
                job_file = _write_job(job, loaded, shards, draft.path, vectors, reuse)
                results = over_workers(job_file, workers, todo, finish)
            with closing(results):  # an interruption may come while a result is taken: workers end all the same
                for i, result in results:
                    if i is None:
                        draft.details.update(result)
                    else:
                        done[i] = result
                        advance(pairs[i])
        _describe(draft, loaded, [done[i] for i in wanted])
    _warn(draft.counts)
    return Scores.load(out)


def estimate_score(
    recipe: str,
    *,
    collection: str | Path | Collection,
    candidates: Sequence[str | Path],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What `score` would do: queries, pairs, shards, distinct texts, about 1.3 tokens a word, and what these cost."""
    from retrieval_kd.data.sources import open_collection

    opened = open_collection(collection)
    loaded = _teacher_recipe(recipe, overrides)
    with TemporaryDirectory() as folder:
        sources = Sources(opened, candidates).open(opened, loaded.depth)
        table = gather_candidates(opened, sources, Path(folder) / "candidates.arrow")
        candidate = np.zeros(len(opened.documents), dtype=bool)
        query_words = 0
        for query in table:
            candidate[query.rows] = True
            query_words += len(query.text.split()) * len(query.rows)
        distinct = np.flatnonzero(candidate)
        pairs = int(table.lengths.sum())
        sample = distinct[:: max(1, len(distinct) // 1000)]
        words = float(np.mean([len(text.split()) for text in opened.documents.texts(sample)]))
        tokens = int(1.3 * (words * pairs + query_words))
        teacher: Teacher = implementation("teachers", loaded.kind)(loaded)
        if not teacher.independent:  # windows overlap
            tokens = int(tokens * loaded.window / loaded.stride)  # type: ignore[attr-defined]
        price = getattr(loaded, "price_per_million", None)
        return {
            "queries": len(table),
            "pairs": pairs,
            "distinct_documents": len(distinct),
            "shards": len(plan_shards(table.lengths, loaded.pairs_per_shard)),
            "approximate_tokens": tokens,
            **({} if price is None else {"approximate_input_cost": round(tokens * price.input / 1e6, 2)}),
        }


def _teacher_recipe(recipe: str, overrides: Sequence[str]) -> TeacherRecipe:
    loaded = load_recipe(recipe, "teachers", overrides)
    if not isinstance(loaded, TeacherRecipe):
        raise UsageError(
            f"{recipe}: kind '{loaded.kind}' combines score files: retrieval-kd scores ensemble {recipe} …"
        )
    return loaded


@contextmanager
def _nothing_left_without_work(draft: Draft) -> Iterator[None]:
    """After an error before anything was scored, encoded or paid for, another recipe may take the place."""
    try:
        yield
    except RetrievalKDError:
        done = [*draft.path.glob("*.parquet"), *draft.work.glob("*/blocks.json"), *draft.work.glob("usage.sqlite")]
        if not done:
            shutil.rmtree(draft.work)
        raise


def _gathered(collection: Collection, sources: Sources, recipe: TeacherRecipe, draft: Draft) -> CandidateTable:
    """The candidates; a former attempt's file is used as it is, because the draft belongs to the same inputs."""
    path = draft.work / "candidates.arrow"
    try:
        return CandidateTable(path, collection)
    except (OSError, ValueError):  # not there, or cut off by a power cut
        with TemporaryDirectory(dir=draft.work) as folder:
            gathered = Path(folder) / path.name
            gather_candidates(collection, sources.open(collection, recipe.depth), gathered)
            gathered.replace(path)
        return CandidateTable(path, collection)


def _in_this_process(
    scorer: ShardScorer,
    job: ScoringJob,
    reuse: Sequence[str | Path],
    shards: Sequence[int],
    finish: Callable[[int, Callable[[Task], Outcome]], Any],
) -> Generator[tuple[int | None, Any]]:
    scorer.teacher.prepare(job)
    scorer.known = KnownScores(reuse, scorer.teacher) if reuse else None
    for i in shards:
        yield i, finish(i, scorer.run)
    yield None, describe(scorer)


def _write_job(
    job: ScoringJob,
    recipe: TeacherRecipe,
    shards: Sequence[range],
    out: Path,
    vectors: Sequence[str | Path],
    reuse: Sequence[str | Path],
) -> Path:
    """The file that tells a worker what this run is."""
    path = job.work / "job.json"
    values = {
        "parent": os.getpid(),
        "recipe": recipe.resolved(),
        "collection": str(job.collection.path.resolve()),
        "candidates": str((job.work / "candidates.arrow").resolve()),
        "vectors": [str(Path(name).resolve()) for name in vectors],
        "reuse": [str(Path(name).resolve()) for name in reuse],
        "shards": [[of_shard.start, of_shard.stop] for of_shard in shards],
        "out": str(out.resolve()),
    }
    write_atomically(path, json.dumps(values).encode())
    return path


def _describe(draft: Draft, recipe: TeacherRecipe, statistics: Sequence[dict[str, Any]]) -> None:
    """Counts and details of the finished run, and the list of what failed."""
    draft.counts.update(total_counts(statistics))
    if not draft.counts["pairs"]:
        reason = next(row[2] for of_shard in statistics for row in of_shard[FAILED])
        raise RetrievalKDError(f"none of the {draft.counts['failed_pairs']} pairs could be scored: {reason}")
    execution = recipe.model_dump(mode="json", include=set(recipe.execution))
    draft.details.update({"teacher": recipe.kind, **({"execution": execution} if execution else {})})
    write_failed(draft.path, [row for of_shard in statistics for row in of_shard[FAILED]])


def _warn(counts: dict[str, int]) -> None:
    """Says what was cut, left out, or read with difficulty."""
    for name in ("malformed_answers", "windows_in_present_order", "bounded_log_odds"):
        if counts.get(name):
            log.warning("%s: %s", name.replace("_", " "), f"{counts[name]:,}")
    if counts["truncated_pairs"]:
        log.warning(
            "%s pairs were cut at the teacher's length, %s tokens lost",
            f"{counts['truncated_pairs']:,}",
            f"{counts['tokens_lost']:,}",
        )
    if counts["failed_pairs"]:
        log.warning("%s pairs could not be scored and were left out: failed.jsonl", f"{counts['failed_pairs']:,}")


def _slice(text: str) -> tuple[int, int]:
    """``2/4`` as numbers."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text}: write it as i/n with 1 ≤ i ≤ n, such as 2/4")
    return int(match[1]), int(match[2])


def _part(mine: tuple[int, int], shards: int) -> range:
    """The shards of slice i of n: consecutive, as equal as can be."""
    i, n = mine
    if n > shards:
        raise RecipeError(
            f"--shard {i}/{n}: there are only {shards} shards; lower pairs_per_shard, or use fewer slices"
        )
    return range(shards * (i - 1) // n, shards * i // n)


def _ready_vectors(paths: Sequence[str | Path], teacher: Teacher, collection: Collection) -> list[Vectors]:
    from retrieval_kd.data.vectors import Vectors

    ready = [Vectors.load(path) for path in paths]
    for path, vectors in zip(paths, ready, strict=True):
        if vectors.model_ref.fingerprint != teacher.ref().fingerprint:
            raise ArtifactError(f"{path}: these vectors were made by another model than the teacher's")
        if vectors.manifest.inputs["collection"]["fingerprint"] != collection.fingerprint:
            raise ArtifactError(f"{path}: these vectors are of another collection")
    return ready


def _finished_shard(
    folder: Path, shard: int, shards: Sequence[range], candidates: CandidateTable
) -> dict[str, Any] | None:
    """The statistics of a complete shard of a former attempt; None when it is to be scored (again)."""
    path = folder / shard_name(shard, len(shards))
    if not path.is_file():
        return None
    try:
        statistics = verified_statistics(path)
    except ArtifactError as error:
        log.warning("%s: %s; scoring it again", path.name, str(error).removeprefix(f"{path}: "))
        return None
    pairs = int(candidates.lengths[shards[shard].start : shards[shard].stop].sum())
    return statistics if statistics["pairs"] + statistics["failed_pairs"] == pairs else None
