"""Scores that an earlier run of the same teacher gave: they are taken over instead of being computed again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrieval_kd.data.score_rows import ScoreRows
from retrieval_kd.data.scores import Scores, teacher_identity
from retrieval_kd.errors import ArtifactError
from retrieval_kd.teachers.base import Teacher


class KnownScores:
    """What score files of the same teacher know about a query."""

    def __init__(self, paths: Sequence[str | Path], teacher: Teacher) -> None:
        """Raises `ArtifactError` for scores that were computed in another precision than the teacher's."""
        dtype = teacher.details().get("dtype")
        for path in paths:
            theirs = Scores.load(path).manifest.details.get("dtype")
            if theirs != dtype:
                raise ArtifactError(f"{path}: scored in {theirs}, this run in {dtype}; set precision, or drop --reuse")
        self._files = [ScoreRows(Scores.load(path)) for path in paths]
        self._independent = teacher.independent

    def find(self, query_id: str, doc_ids: Sequence[str]) -> dict[int, tuple[float, int]]:
        """Position in ``doc_ids`` → score and tokens lost. A listwise teacher's scores hold for the same list only."""
        found: dict[int, tuple[float, int]] = {}
        for file in self._files:
            row = file.find(query_id)
            if row is None or row.tokens_lost is None or (not self._independent and row.doc_ids != list(doc_ids)):
                continue
            place = {doc_id: k for k, doc_id in enumerate(row.doc_ids)}
            for j, doc_id in enumerate(doc_ids):
                k = place.get(doc_id)
                if k is not None:
                    found.setdefault(j, (float(row.scores[k]), int(row.tokens_lost[k])))
        return found


def refuse_other_teachers(paths: Sequence[str | Path], recipe: dict[str, object], inputs: dict[str, str]) -> None:
    """Raises `ArtifactError` for a score file of another teacher or collection. ``inputs``: name → fingerprint."""
    for path in paths:
        manifest = Scores.load(path).manifest
        for name in ("model", "collection"):
            if manifest.inputs.get(name, {}).get("fingerprint") != inputs[name]:
                raise ArtifactError(f"{path}: these scores are of another {name}; they cannot be taken over")
        theirs, ours = teacher_identity(manifest.recipe), teacher_identity(recipe)
        differ = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        if differ:
            raise ArtifactError(f"{path}: its teacher's recipe differs in {', '.join(differ)}; score without --reuse")
