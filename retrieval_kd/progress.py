"""Progress of long work on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("retrieval_kd")

_LINE_EVERY_SECONDS = 10.0


@contextmanager
def progress(what: str, total: int | None, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(n)``. ``done`` of ``total`` items (None: not known) were finished by a former attempt."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda n: bar.advance(task, n)
        return
    state = {"done": done, "said": time.monotonic()}

    def advance(n: int) -> None:
        state["done"] += n
        if time.monotonic() - state["said"] >= _LINE_EVERY_SECONDS:
            state["said"] = time.monotonic()
            log.info("%s: %s%s", what, f"{int(state['done']):,}", "" if total is None else f" of {total:,}")

    yield advance
