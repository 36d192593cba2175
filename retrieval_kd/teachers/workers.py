"""Worker processes of a scoring run: started, restarted when they die, each with a GPU where there are any."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.teachers.isolate import Outcome, Task
from retrieval_kd.teachers.worker import outcome_from_json, task_to_json

log = logging.getLogger("retrieval_kd")

_STARTS = 3
_GRACE_SECONDS = 30.0
"""How long a worker that is told to end may take (requests to an endpoint are waited for, they are paid)."""


class Worker:
    """One process, started when it is first needed and again after it died."""

    def __init__(self, job: Path, number: int, workers: int) -> None:
        self.job = job
        self.environment = {**os.environ, **_share(number, workers)}
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def run(self, task: Task) -> Outcome:
        """What came of a task; ``died`` when the process ended over it."""
        answer = self._ask(task_to_json(task))
        return answer if isinstance(answer, Outcome) else outcome_from_json(answer["outcome"])

    def details(self) -> dict[str, Any]:
        """What the manifest says of the teacher."""
        answer = self._ask("details")
        if isinstance(answer, Outcome):
            raise RetrievalKDError(f"the worker died while it described its teacher: {answer.reason}")
        details: dict[str, Any] = answer["details"]
        return details

    def tell_to_end(self) -> None:
        """Tells the process to end in order; nothing is started in its place."""
        self._closed = True
        process = self._process
        if process is not None:
            process.terminate()
            assert process.stdin is not None
            with suppress(OSError, ValueError):  # also ends a process that swallowed the signal
                process.stdin.close()

    def close(self) -> None:
        """Ends the process for good, in order if it was told to and does."""
        self._closed = True
        process = self._process
        if process is not None:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("a worker did not end within %.0f s and is killed", _GRACE_SECONDS)
        self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError, ValueError):  # what was written last may be left in its buffer
                    pipe.close()

    def _ask(self, request: Any) -> dict[str, Any] | Outcome:
        process = self._process or self._started()
        if process.poll() is not None:  # killed while it had nothing to do
            self._stop()
            process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return self._answer(process)
        except (BrokenPipeError, EOFError, ValueError):  # ValueError: a line cut off, or a pipe closed meanwhile
            if self._closed:
                raise RetrievalKDError("scoring was stopped") from None
            return Outcome(self._end(process), died=True)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = RetrievalKDError(answer["error"])
            error.exit_code = answer["exit_code"]
            raise error
        return answer

    def _started(self) -> subprocess.Popen[str]:
        """A process whose teacher is ready. Raises `RetrievalKDError` when it dies before that, three times."""
        for _ in range(_STARTS):
            if self._closed:
                raise RetrievalKDError("scoring was stopped")
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "retrieval_kd.teachers.worker", str(self.job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=self.environment,
            )
            try:
                self._answer(process)
                return process
            except EOFError:
                reason = self._end(process)
                log.warning("a worker died while it started: %s", reason)
        raise RetrievalKDError(
            f"a worker died {_STARTS} times while it loaded its teacher ({reason}); "
            "with fewer --workers there is more memory for each"
        )

    def _end(self, process: subprocess.Popen[str]) -> str:
        code = process.wait()
        self._stop()
        if code >= 0:
            return f"the worker process ended with exit code {code}"
        hint = " (often the system, out of memory)" if -code == signal.SIGKILL else ""
        return f"the worker process was ended by {signal.Signals(-code).name}{hint}"


def over_workers(
    job: Path,
    workers: int,
    shards: Sequence[int],
    finish: Callable[[int, Callable[[Task], Outcome]], Any],
) -> Generator[tuple[int | None, Any]]:
    """Yields (shard, its result) as shards are finished, and last (None, details of the teacher).

    Each thread drives one process with ``finish(shard, run)``. The first error stops all of them.
    """
    fleet = [Worker(job, number, workers) for number in range(min(workers, max(1, len(shards))))]
    todo = iter(shards)
    pool = ThreadPoolExecutor(len(fleet))
    try:
        at_work: dict[Future[Any], tuple[int, Worker]] = {}

        def give(worker: Worker) -> None:
            shard = next(todo, None)
            if shard is not None:
                at_work[pool.submit(finish, shard, worker.run)] = (shard, worker)

        for worker in fleet:
            give(worker)
        while at_work:
            finished, _ = wait(at_work, return_when=FIRST_COMPLETED)
            for future in finished:
                shard, worker = at_work.pop(future)
                yield shard, future.result()
                give(worker)
        yield None, fleet[0].details()
    finally:
        for worker in fleet:
            worker.tell_to_end()
        for worker in fleet:
            worker.close()
        pool.shutdown(wait=True, cancel_futures=True)


def _share(number: int, workers: int) -> dict[str, str]:
    """Environment of one worker of several: its cores, and its GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // workers))
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), "RAYON_NUM_THREADS": threads}
    gpus = _gpus()
    return share | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else None
    count = torch.cuda.device_count()
    return (names or [str(i) for i in range(count)])[:count]
