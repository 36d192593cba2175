"""The verb `scores ensemble`: finished score files of several teachers, combined into one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.score_rows import ScoreRows
from retrieval_kd.data.score_statistics import Moments
from retrieval_kd.data.score_writer import ShardWriter
from retrieval_kd.data.scores import Scores, total_counts
from retrieval_kd.errors import ArtifactError, InputError, UsageError, first
from retrieval_kd.plan import Plan
from retrieval_kd.progress import progress
from retrieval_kd.recipe import load_recipe
from retrieval_kd.teachers.combine import Ensemble, EnsembleRecipe

log = logging.getLogger("retrieval_kd")

__all__ = ["Ensemble", "ensemble_scores"]


def ensemble_scores(
    recipe: str,
    members: Mapping[str, str | Path] | Sequence[str | Path],
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> Scores:
    """The score file that combines ``members``: name → score file, or score files that are named as their folders.

    Queries may be in any order; they come out in that of the first member. Memory holds query ids and a few shards.
    A query that is left without a document is left out and counted. Raises `UsageError` for members or weights that
    do not fit the recipe, `ArtifactError` for scores of different collections, `InputError` for scores that cannot be
    averaged as they are or have nothing in common.
    """
    loaded = load_recipe(recipe, "teachers", overrides)
    if not isinstance(loaded, EnsembleRecipe):
        raise UsageError(f"{recipe}: kind '{loaded.kind}' reads texts; run it with `score`")
    opened = _open(members)
    weights = _weights(loaded, list(opened))
    inputs = _inputs(opened)
    _refuse_incomparable(loaded, opened)
    out = Path(out)
    plan = Plan("scores", loaded.resolved() | {"members": list(opened)}, inputs)
    if plan.finished(out, force=force):
        return Scores.load(out)
    ensemble = Ensemble(loaded, weights, _moments(opened) if loaded.over == "global" else None)
    with plan.write(out, force=force) as draft:
        counts = _write(ensemble, opened, ShardWriter(draft.path, loaded.pairs_per_shard))
        draft.counts.update(counts)
        of_members = all(scores.manifest.details.get("independent", True) for scores in opened.values())
        draft.details.update(
            score_kind="ensemble",
            teacher="ensemble",
            independent=loaded.independent and of_members,
            members=_about(opened),
        )
    if counts["queries_left_out"] or counts["pairs_left_out"]:
        log.warning(
            "%s queries were left out, and %s pairs of the others: not all members scored them",
            f"{counts['queries_left_out']:,}",
            f"{counts['pairs_left_out']:,}",
        )
    return Scores.load(out)


def _write(ensemble: Ensemble, members: Mapping[str, Scores], writer: ShardWriter) -> dict[str, int]:
    """The counts of the combined file after all queries of the members were written."""
    files = [ScoreRows(scores) for scores in members.values()]
    for (name, scores), file in zip(members.items(), files, strict=True):
        if len(list(file)) != len(scores):
            raise ArtifactError(f"{name}: a query has two rows ({scores.path}); make these scores again")
    queries = dict.fromkeys(query_id for file in files for query_id in file)
    with progress(f"combining {len(queries):,} queries", len(queries)) as advance:
        for query_id in queries:
            row = ensemble.combine(query_id, [file.find(query_id) for file in files])
            if row is not None:
                writer.add(row)
            advance(1)
    counts = total_counts(writer.close())
    if not counts["pairs"]:
        raise InputError(
            f"none of the {len(queries):,} queries has a document that all of {', '.join(members)} scored; "
            "score the same candidates, or use join: union with a number as fill"
        )
    left_out = {name: ensemble.counts[name] for name in ("pairs_left_out", "missing_scores")}
    return counts | {"queries_left_out": len(queries) - counts["queries"]} | left_out


def _open(members: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Scores]:
    if not isinstance(members, Mapping):
        names = [Path(path).resolve().name for path in members]
        if len(set(names)) != len(names):
            raise UsageError(f"two of the score files are called the same ({first(names)}); name them: NAME=SCORES")
        members = dict(zip(names, members, strict=True))
    if len(members) < 2:
        raise UsageError(f"an ensemble combines two score files or more (got {len(members)})")
    opened = {name: Scores.load(path) for name, path in members.items()}
    seen: dict[str, str] = {}
    for name, scores in opened.items():
        if scores.fingerprint in seen:
            raise UsageError(
                f"{seen[scores.fingerprint]} and {name} are the same scores; give each once, with a weight"
            )
        seen[scores.fingerprint] = name
    return opened


def _weights(recipe: EnsembleRecipe, names: Sequence[str]) -> np.ndarray:
    weights = recipe.weights
    if weights is None:
        return np.ones(len(names))
    if isinstance(weights, dict):
        if set(weights) != set(names):
            raise UsageError(f"weights are for {', '.join(weights)}, the score files are {', '.join(names)}")
        return np.array([weights[name] for name in names])
    if len(weights) != len(names):
        raise UsageError(f"{len(weights)} weights for {len(names)} score files ({', '.join(names)})")
    return np.array(weights)


def _inputs(members: Mapping[str, Scores]) -> dict[str, InputRef]:
    entries = [scores.manifest.inputs.get("collection") for scores in members.values()]
    prints = [entry["fingerprint"] if entry else "none" for entry in entries]
    for name, fingerprint in zip(members, prints, strict=True):
        if fingerprint != prints[0]:
            raise ArtifactError(
                f"{name} scores another collection than {next(iter(members))} "
                f"(fingerprint {fingerprint[:12]}, not {prints[0][:12]}); score the same one"
            )
    inputs = {f"scores:{name}": scores.ref() for name, scores in members.items()}
    entry = entries[0]
    if entry is not None:
        inputs["collection"] = _collection(next(iter(members.values())), entry)
    return inputs


def _collection(scores: Scores, entry: Mapping[str, str]) -> InputRef:
    path = Path(entry["absolute"]) if "absolute" in entry else None
    try:
        path = scores.locate("collection")
    except ArtifactError:
        log.debug("the collection is not where the scores say; its fingerprint is kept")
    return InputRef(entry["fingerprint"], path, entry.get("name"))


def _refuse_incomparable(recipe: EnsembleRecipe, members: Mapping[str, Scores]) -> None:
    """Ranks are no quantities, and different kinds of scores have no common unit."""
    if recipe.normalise != "none" or recipe.aggregate == "reciprocal-rank":
        return
    kinds = {name: scores.score_kind for name, scores in members.items()}
    if "rank" in kinds.values() or len(set(kinds.values())) > 1:
        raise InputError(
            f"these scores cannot be combined as they are: {', '.join(f'{n} ({kind})' for n, kind in kinds.items())}; "
            "set normalise (min-max, z-score, rank or softmax), or aggregate: reciprocal-rank"
        )


def _moments(members: Mapping[str, Scores]) -> list[Moments]:
    found = []
    for name, scores in members.items():
        found.append(Moments())
        with progress(f"reading {name}", len(scores)) as advance:
            for row in scores:
                found[-1].add(row.scores)
                advance(1)
    return found


def _about(members: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """What the manifest says of each member."""
    about = {}
    for name, scores in members.items():
        details = {key: scores.manifest.details.get(key) for key in ("score_kind", "teacher", "model", "revision")}
        about[name] = details | {"fingerprint": scores.fingerprint}
    return about
