"""Joining score files of one teacher: the slices of a run that was divided, or runs over different candidates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifact import InputRef, locate_input
from retrieval_kd.data.score_rows import ScoreRows
from retrieval_kd.data.score_writer import ShardWriter, write_failed
from retrieval_kd.data.scores import (
    FAILED,
    ScoredQuery,
    Scores,
    read_shard,
    rows_of,
    shard_name,
    shard_statistics,
    teacher_identity,
    total_counts,
)
from retrieval_kd.errors import ArtifactError, UsageError, first
from retrieval_kd.plan import Plan

_SLICE = "slice"
_SHARED: tuple[str, ...] = ("collection", "model")


def merge_scores(parts: Sequence[str | Path], out: str | Path, *, force: bool = False) -> Scores:
    """The score file that holds what ``parts`` hold together.

    All slices (``--shard i/n``) of a run give the file that the undivided run would have written, fingerprint
    included. Other score files of the same teacher and collection give the union of their pairs, query by query.
    Raises `ArtifactError` for missing slices, pairs with different scores, other teachers or other collections.
    """
    if len(parts) < 2:
        raise UsageError("give at least two score files to merge")
    loaded = [Scores.load(path) for path in parts]
    _refuse_strangers(parts, loaded)
    recipes = [{k: v for k, v in part.manifest.recipe.items() if k != _SLICE} for part in loaded]
    same = all(r == recipes[0] and _inputs(p) == _inputs(loaded[0]) for r, p in zip(recipes, loaded, strict=True))
    if same and all(_SLICE in part.manifest.recipe for part in loaded):
        return _join_slices(parts, loaded, recipes[0], Path(out), force)
    sliced = [str(path) for path, part in zip(parts, loaded, strict=True) if _SLICE in part.manifest.recipe]
    if sliced:
        raise ArtifactError(f"{first(sliced)}: merge the slices of one run first, then the whole runs with one another")
    return _unite(parts, loaded, Path(out), force)


def _join_slices(
    parts: Sequence[str | Path], loaded: Sequence[Scores], recipe: dict[str, Any], out: Path, force: bool
) -> Scores:
    files: dict[str, Path] = {}
    for path, part in zip(parts, loaded, strict=True):
        for shard in part.shards:
            if shard.name in files and files[shard.name].read_bytes() != shard.read_bytes():
                raise ArtifactError(f"{path}: {_first_difference(files[shard.name], shard)}")
            files.setdefault(shard.name, shard)
    shards = int(next(iter(files)).rsplit("-", 1)[1].removesuffix(".parquet"))
    missing = [i for i in range(shards) if shard_name(i, shards) not in files]
    if missing:
        have = ", ".join(sorted({str(part.manifest.recipe[_SLICE]) for part in loaded}))
        raise ArtifactError(
            f"{len(missing)} of {shards} shards are in none of the files: {first(missing)} (here: slices {have}); "
            "score the missing slices, then merge all"
        )
    inputs = {name: _found(loaded[0], name) for name in loaded[0].manifest.inputs}
    plan = Plan("scores", recipe, inputs)
    if not plan.finished(out, force=force):
        with plan.write(out, force=force) as draft:
            for name, shard in sorted(files.items()):
                shutil.copyfile(shard, draft.path / name)
            statistics = [shard_statistics(read_shard(shard)) for _, shard in sorted(files.items())]
            draft.counts.update(total_counts(statistics))
            draft.details.update(_details(loaded))
            write_failed(draft.path, [row for of_shard in statistics for row in of_shard[FAILED]])
    return Scores.load(out)


def _unite(parts: Sequence[str | Path], loaded: Sequence[Scores], out: Path, force: bool) -> Scores:
    teacher = teacher_identity(loaded[0].manifest.recipe)
    inputs = {name: _found(loaded[0], name) for name in _SHARED if name in loaded[0].manifest.inputs}
    inputs |= {("scores" if not i else f"scores_{i + 1}"): part.ref() for i, part in enumerate(loaded)}
    plan = Plan("scores", {**teacher, "candidates": []}, inputs)
    if not plan.finished(out, force=force):
        with plan.write(out, force=force) as draft:
            writer = ShardWriter(draft.path)
            failed = _failed_anywhere(loaded)
            for row in _union(parts, [ScoreRows(part) for part in loaded]):
                writer.add(row)
                for doc_id in row.doc_ids:  # what failed in one file may have a score in another
                    failed.pop((row.query_id, doc_id), None)
            statistics = writer.close()
            draft.counts.update(total_counts(statistics) | {"failed_pairs": len(failed)})
            draft.details.update(_details(loaded))
            write_failed(draft.path, [[*pair, reason] for pair, reason in failed.items()])
    return Scores.load(out)


def _union(parts: Sequence[str | Path], files: Sequence[ScoreRows]) -> Iterator[ScoredQuery]:
    """Each query once, in the order of the files; its documents in that order too."""
    for i, file in enumerate(files):
        for query_id in file:
            if not any(query_id in earlier for earlier in files[:i]):
                rows = [(k, row) for k, other in enumerate(files) if k >= i and (row := other.find(query_id))]
                yield _one_row(parts, files, rows)


def _one_row(
    parts: Sequence[str | Path], files: Sequence[ScoreRows], rows: Sequence[tuple[int, ScoredQuery]]
) -> ScoredQuery:
    start, whole = rows[0]
    if len(rows) == 1:
        return whole
    place = {doc_id: j for j, doc_id in enumerate(whole.doc_ids)}
    doc_ids, scores, lost = list(whole.doc_ids), whole.scores.tolist(), _lost(whole)
    known = all(row.tokens_lost is not None for _, row in rows)
    for k, row in rows[1:]:
        if not files[0].scores.manifest.details.get("independent", True) and row.doc_ids != whole.doc_ids:
            raise ArtifactError(
                f"{parts[k]}: query {row.query_id!r} has another list than in {parts[start]}; "
                "the ranks of a listwise teacher hold within one list only"
            )
        for doc_id, value, tokens in zip(row.doc_ids, row.scores.tolist(), _lost(row), strict=True):
            j = place.get(doc_id)
            if j is None:
                place[doc_id] = len(doc_ids)
                doc_ids.append(doc_id)
                scores.append(value)
                lost.append(tokens)
            elif scores[j] != value:
                raise ArtifactError(
                    f"{parts[k]}: query {row.query_id!r}, document {doc_id!r} has score {value!r}, "
                    f"but {scores[j]!r} in an earlier file. Pairs in both merge only when equal to the last digit, "
                    "which other batches, software or hardware may change: score what is new with --reuse instead"
                )
    tokens_lost = np.array(lost, dtype=np.int32) if known else None
    return ScoredQuery(whole.query_id, doc_ids, np.array(scores, dtype=np.float32), tokens_lost)


def _lost(row: ScoredQuery) -> list[int]:
    """A row's tokens lost; zeros only keep the places of a row that does not know them, and are dropped later."""
    return [0] * len(row.doc_ids) if row.tokens_lost is None else list(row.tokens_lost.tolist())


def _failed_anywhere(loaded: Sequence[Scores]) -> dict[tuple[str, str], str]:
    """Query and document → reason of what failed in one of the files."""
    failed: dict[tuple[str, str], str] = {}
    for part in loaded:
        path = part.path / "failed.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = json.loads(line)
            failed.setdefault((row["query_id"], row["doc_id"]), row["reason"])
    return failed


def _details(loaded: Sequence[Scores]) -> dict[str, Any]:
    """The first file's details, with what all of them have used of an endpoint."""
    details = dict(loaded[0].manifest.details)
    used = [part.manifest.details.get("usage", {}) for part in loaded]
    if all(used):
        sums: dict[str, Any] = {}
        for name in used[0]:
            values = [usage.get(name) for usage in used]
            sums[name] = None if None in values else sum(values)
        models = {name for part in loaded for name in part.manifest.details.get("served_models", ())}
        details |= {"usage": sums, "served_models": sorted(models)}
    return details


def _refuse_strangers(parts: Sequence[str | Path], loaded: Sequence[Scores]) -> None:
    for path, part in zip(parts, loaded, strict=True):
        if part.manifest.details.get("teacher") == "ensemble":
            raise ArtifactError(f"{path}: an ensemble; merge its members, then combine them again")
        if part.manifest.details.get("teacher") == "import":
            raise ArtifactError(f"{path}: imported, so that its teacher is not known; join the files before importing")
    for path, part in zip(parts[1:], loaded[1:], strict=True):
        for name in ("model", "collection"):
            if _inputs(part).get(name) != _inputs(loaded[0]).get(name):
                raise ArtifactError(f"{path}: made with another {name} than {parts[0]}; a merge has one teacher")
        theirs, ours = teacher_identity(part.manifest.recipe), teacher_identity(loaded[0].manifest.recipe)
        differ = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        details = (part.manifest.details, loaded[0].manifest.details)
        differ += [key for key in ("score_kind", "dtype") if details[0].get(key) != details[1].get(key)]
        if differ:
            raise ArtifactError(
                f"{path}: its teacher differs from that of {parts[0]} in {', '.join(differ)}; "
                "combine different teachers with: retrieval-kd scores ensemble"
            )


def _first_difference(one: Path, other: Path) -> str:
    for a, b in zip(rows_of(read_shard(one)), rows_of(read_shard(other)), strict=False):
        if a.query_id != b.query_id or a.doc_ids != b.doc_ids:
            return f"{other.name} has query {b.query_id!r} with other documents than the same shard of an earlier file"
        for doc_id, x, y in zip(a.doc_ids, a.scores.tolist(), b.scores.tolist(), strict=True):
            if x != y:
                return (
                    f"{other.name}: query {a.query_id!r}, document {doc_id!r} has score {y!r}, but {x!r} in an earlier "
                    "file; were they scored with the same software and hardware?"
                )
    return f"{other.name} differs from the same shard of an earlier file"


def _inputs(part: Scores) -> dict[str, str]:
    return {name: entry["fingerprint"] for name, entry in part.manifest.inputs.items()}


def _found(part: Scores, name: str) -> InputRef:
    """An input of a part as an input of the merged file: where it is now, when it is found, else by name."""
    entry = part.manifest.inputs[name]
    if "absolute" in entry:
        try:
            return InputRef(entry["fingerprint"], locate_input(part.path, part.manifest, name), entry.get("name"))
        except ArtifactError:
            return InputRef(entry["fingerprint"], Path(entry["absolute"]), entry.get("name"))
    return InputRef(entry["fingerprint"], name=entry.get("name"))
