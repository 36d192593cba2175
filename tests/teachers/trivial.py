"""A teacher without a model, for tests of the driver: a score is a hash, and some words in a document bring trouble.

A worker process knows it through a ``sitecustomize.py`` on its path (`register_for_workers`).
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from retrieval_kd import registry
from retrieval_kd.artifact import InputRef
from retrieval_kd.teachers.base import Candidates, Scored, Teacher, TeacherRecipe

ENTRY = registry.Entry("trivial:TrivialTeacher", "for tests")


class TrivialTeacher(Teacher):
    """``w7`` in a document can be made to raise, to give NaN, or to end the process."""

    class Recipe(TeacherRecipe):
        execution: ClassVar[frozenset[str]] = frozenset({"seconds", "log"})

        kind: Literal["trivial"]
        salt: str = ""
        raises: str = "never"
        nan: str = "never"
        kills: str = "never"
        most_pairs: int = 10**9
        listwise: bool = False
        seconds: float = 0.0
        log: str | None = None

    recipe: Recipe

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        self.independent = not recipe.listwise

    @property
    def score_kind(self) -> str:
        return "logit"

    def ref(self) -> InputRef:
        return InputRef(hashlib.sha256(self.recipe.salt.encode()).hexdigest(), name="trivial")

    def details(self) -> dict[str, Any]:
        return {"model": "trivial"}

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        pairs = [(query.query_id, text) for query, of_query in zip(shard, texts, strict=True) for text in of_query]
        if self.recipe.log:
            with Path(self.recipe.log).open("a") as file:
                file.write(f"{os.getpid()} {shard[0].query_id} {len(pairs)}\n")
        time.sleep(self.recipe.seconds)
        if len(pairs) > self.recipe.most_pairs:
            raise MemoryError("too many pairs")
        for _, text in pairs:
            words = text.split()
            if self.recipe.raises in words:
                raise ValueError(f"cannot read {self.recipe.raises}")
            if self.recipe.kills in words:
                os.kill(os.getpid(), signal.SIGKILL)
        self.counts["seen"] += len(pairs)
        scores = [
            np.array([self._value(query.query_id, text) for text in of_query], dtype=np.float32)
            for query, of_query in zip(shard, texts, strict=True)
        ]
        return Scored(scores, [np.arange(len(of_query), dtype=np.int32) for of_query in texts])

    def _value(self, query_id: str, text: str) -> float:
        if self.recipe.nan in text.split():
            return float("nan")
        digest = hashlib.sha256(f"{self.recipe.salt} {query_id} {text}".encode()).digest()
        return int.from_bytes(digest[:4], "little") / 2**32


def register_for_workers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes ``kind: trivial`` known here and in every process started from now on."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "from retrieval_kd import registry\n"
        f"registry.TEACHERS['trivial'] = registry.Entry({ENTRY.target!r}, {ENTRY.summary!r})\n"
    )
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setitem(registry.TEACHERS, "trivial", ENTRY)
