"""The API teacher on a local endpoint, and the smallest shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from faulty_server import FaultyServer

from retrieval_kd.data.collection import Collection
from retrieval_kd.models.api.reply import Reply
from retrieval_kd.recipe import validate
from retrieval_kd.teachers.api.recipe import ApiRecipe
from retrieval_kd.teachers.api.teacher import ApiTeacher
from retrieval_kd.teachers.base import Candidates, Scored, ScoringJob

KEY = "sk-very-secret-0123456789"


def made(server: FaultyServer, **values: Any) -> ApiTeacher:
    given = {"prompt": "graded", "key_env": "TINY_KEY", "max_wait_s": 0.01, "timeout_s": 5, "concurrency": 1, **values}
    recipe = {"kind": "api", "base_url": server.base_url, "model": "tiny", **given}
    return ApiTeacher(validate(ApiRecipe, recipe, "test"))


def prepared(teacher: ApiTeacher, collection: Collection, work: Path) -> ApiTeacher:
    work.mkdir(exist_ok=True)
    teacher.prepare(ScoringJob(collection, [], [], work))
    return teacher


def query(n: int = 2, name: str = "q1") -> tuple[list[Candidates], list[list[str]]]:
    """One query and ``n`` documents of one word each."""
    return [Candidates(name, "what", np.arange(n))], [[f"w{i}" for i in range(n)]]


def document(body: dict[str, Any]) -> str:
    """The document in a request of the prompt ``graded``."""
    return str(body["messages"][0]["content"]).split("Document: ")[1].split("\n")[0]


def reply(content: str = "", *first: tuple[str, float]) -> Reply:
    return Reply(content, first or None, None, None)


def assert_scores(scored: Scored, expected: list[list[float]]) -> None:
    assert [values.tolist() for values in scored.scores] == expected
    assert {values.dtype for values in scored.scores} == {np.dtype(np.float32)}
