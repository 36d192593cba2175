"""A worker process of `score`: ``python -m … JOB.json``, tasks on stdin, outcomes on stdout, a JSON value a line."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.teachers.isolate import Outcome, Task
from retrieval_kd.teachers.shards import BrokenProcessError, ShardScorer


def main(job_file: str) -> None:
    """Answers each task with a line of JSON until stdin ends, which it does when the parent dies."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    logging.basicConfig(level=logging.WARNING, format="worker: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is under way may end in order
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    _die_with_parent(int(job["parent"]))
    try:
        scorer = _scorer(job)
        _say(answers, {"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            if request == "details":
                _say(answers, {"details": describe(scorer)})
            else:
                _say(answers, {"outcome": outcome_to_json(scorer.run(task_from_json(request)))})
    except BrokenProcessError as error:
        logging.getLogger("retrieval_kd").warning("%s", error.__cause__)
        os._exit(1)  # whatever torch would do on the way out needs the GPU
    except RetrievalKDError as error:
        _say(answers, {"error": str(error), "exit_code": error.exit_code})
    except KeyboardInterrupt:
        return


def describe(scorer: ShardScorer) -> dict[str, Any]:
    """What the manifest says of the teacher."""
    return {
        "score_kind": scorer.teacher.score_kind,
        "independent": scorer.teacher.independent,
        **scorer.teacher.details(),
    }


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as JSON."""
    failed = [[i, j, reason] for (i, j), reason in task.failed.items()]
    return {**asdict(task), "failed": failed}


def task_from_json(value: dict[str, Any]) -> Task:
    """The task that `task_to_json` wrote."""
    pieces = value["pieces"]
    return Task(
        value["shard"],
        {(i, j): reason for i, j, reason in value["failed"]},
        value["blamed"],
        None if pieces is None else [[(i, j) for i, j in piece] for piece in pieces],
        value["probe"],
    )


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON."""
    return asdict(outcome)


def outcome_from_json(value: dict[str, Any]) -> Outcome:
    """The outcome that `outcome_to_json` wrote."""
    return Outcome(**{**value, "bad": [(i, j) for i, j in value["bad"]]})


def _scorer(job: dict[str, Any]) -> ShardScorer:
    from filelock import FileLock

    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.recipe import validate
    from retrieval_kd.registry import implementation
    from retrieval_kd.teachers.base import ScoringJob
    from retrieval_kd.teachers.candidates import CandidateTable
    from retrieval_kd.teachers.reuse import KnownScores

    kind = implementation("teachers", job["recipe"]["kind"])
    teacher = kind(validate(kind.Recipe, job["recipe"], "the recipe"))
    collection = Collection.load(job["collection"], verify=False)
    out = Path(job["out"])
    candidates = CandidateTable(Path(job["candidates"]), collection)
    vectors = [Vectors.load(path, verify=False) for path in job["vectors"]]
    work = out / "work"
    with FileLock(work / "prepare.lock"):
        teacher.prepare(ScoringJob(collection, candidates, vectors, work))
    known = KnownScores(job["reuse"], teacher) if job["reuse"] else None
    return ShardScorer(teacher, collection, candidates, [range(*ends) for ends in job["shards"]], out, known)


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when its parent dies, so that no two runs write at once."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
