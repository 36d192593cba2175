"""What a run has used of an endpoint, kept over resumes and shared by processes, and the budget it must not pass."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.models.api.cache import connect, readable
from retrieval_kd.recipe import Section

_COUNTERS = ("requests", "retried", "cached_answers", "estimated", "prompt_tokens", "completion_tokens")
_POLL_S = 0.1
"""How often is looked whether another process has freed something."""
_NOBODY = 0
"""The number under which reservations of an earlier process are kept."""


class BudgetError(RetrievalKDError):
    """The next request could pass the budget; finished answers are kept."""


class Price(Section):
    """What an endpoint charges for a million tokens, in any one currency."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class Budget(NamedTuple):
    """Hard limits of one run; None is no limit."""

    money: float | None = None
    tokens: int | None = None
    price: Price | None = None

    def cost(self, tokens: Tokens) -> float:
        """The price of some tokens, 0 when no price is known."""
        if self.price is None:
            return 0.0
        return (tokens.prompt * self.price.input + tokens.completion * self.price.output) / 1e6

    def allows(self, tokens: Tokens) -> bool:
        """Whether a run may have used ``tokens`` in all."""
        return (self.tokens is None or tokens.prompt + tokens.completion <= self.tokens) and (
            self.money is None or self.cost(tokens) <= self.money
        )


class Tokens(NamedTuple):
    """Tokens of prompts and of answers."""

    prompt: int
    completion: int


class Ledger:
    """Counts of one run in ``path``, for several threads and processes.

    A request's worst case is reserved before it is sent and replaced by what it used, in full even if the endpoint
    went beyond the worst case: a budget is as hard as the endpoint's observance of ``max_tokens``. A process that is
    killed leaves its reservations: they may have been charged, so they count for good, but nobody waits for them.
    ``patience_s`` is how long to wait for those of other processes.
    """

    def __init__(self, path: Path | str, budget: Budget, patience_s: float = 0.0) -> None:
        self.path = path
        self.budget = budget
        self.patience_s = patience_s
        self._pid = os.getpid()
        self._settled = threading.Condition()
        self._in_flight = 0
        columns = ", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in _COUNTERS)
        with self._locked():
            self._connection = connect(path)
            weakref.finalize(self, self._connection.close)
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS usage (id INTEGER PRIMARY KEY, {columns})")
            self._connection.execute("CREATE TABLE IF NOT EXISTS served (model TEXT PRIMARY KEY)")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS reserved (pid INTEGER PRIMARY KEY, prompt INTEGER, completion INTEGER)"
            )
            self._connection.execute("INSERT OR IGNORE INTO usage (id) VALUES (0)")
        with self._transaction():  # an earlier process may have had this one's number
            mine = "FROM reserved WHERE pid = ?"
            for row in self._connection.execute(f"SELECT prompt, completion {mine}", (self._pid,)).fetchall():
                self._hold(_NOBODY, Tokens(*row))
            self._connection.execute(f"DELETE {mine}", (self._pid,))

    def reserve(self, worst: Tokens, *, retried: bool, stopping: threading.Event | None = None) -> None:
        """Counts a request at its worst case, after waiting for others to be settled where it does not fit.

        Raises `BudgetError` when there is nothing to wait for, `CancelledError` when ``stopping`` is set meanwhile.
        """
        end = time.monotonic() + self.patience_s
        with self._settled:
            while not self._reserved(worst, retried):
                if not self._in_flight and not (time.monotonic() < end and self._others_at_work()):
                    raise self._spent(worst)
                self._settled.wait(_POLL_S)
                if stopping is not None and stopping.is_set():
                    raise CancelledError
            self._in_flight += 1

    def settle(self, worst: Tokens, used: Tokens, *, estimated: bool) -> None:
        """Replaces a request's reservation by what it used; ``estimated`` when the endpoint did not say."""
        with self._settled:
            self._in_flight -= 1
            with self._transaction():
                self._hold(self._pid, Tokens(-worst.prompt, -worst.completion))
                self._connection.execute(
                    "UPDATE usage SET prompt_tokens = prompt_tokens + ?, completion_tokens = completion_tokens + ?,"
                    " estimated = estimated + ?",
                    (*used, estimated),
                )
            self._settled.notify_all()

    def note(self, cached_answers: int, models: Iterable[str]) -> None:
        """Counts answers that came from the cache, and remembers the models that have answered."""
        with self._locked():
            self._connection.execute("UPDATE usage SET cached_answers = cached_answers + ?", (cached_answers,))
            self._connection.executemany("INSERT OR IGNORE INTO served VALUES (?)", [(model,) for model in models])

    def models(self) -> list[str]:
        """The models that have answered, as the endpoint calls them."""
        with self._locked():
            rows = self._connection.execute("SELECT model FROM served ORDER BY model").fetchall()
        return [model for (model,) in rows]

    def usage(self) -> dict[str, Any]:
        """The run's requests, tokens and their cost (None without a price), in no currency but the price's own.

        ``requests`` includes the ``retried`` ones. ``estimated`` are those whose tokens the endpoint did not tell,
        counted at their worst case. ``unsettled_tokens``, in the cost but in no other number, are the worst case of
        requests whose process was killed, or is still at work.
        """
        with self._transaction():
            row, used, reserved = self._sums()
        return {
            **row,
            "unsettled_tokens": sum(reserved),
            "cost": None if self.budget.price is None else round(self.budget.cost(_add(used, reserved)), 6),
        }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        mend = "delete it to go on (what the run has used until now is then no longer counted)"
        with self._settled, readable(self.path, "record of what the run has used", mend):
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """No other process changes anything in between."""
        with self._locked(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    def _reserved(self, worst: Tokens, retried: bool) -> bool:
        with self._transaction():
            _, used, reserved = self._sums()
            fits = self.budget.allows(_add(_add(used, reserved), worst))
            if fits:
                self._connection.execute("UPDATE usage SET requests = requests + 1, retried = retried + ?", (retried,))
                self._hold(self._pid, worst)
        return fits

    def _hold(self, pid: int, tokens: Tokens) -> None:
        self._connection.execute(
            "INSERT INTO reserved VALUES (?, ?, ?) ON CONFLICT (pid) DO UPDATE SET"
            " prompt = prompt + excluded.prompt, completion = completion + excluded.completion",
            (pid, *tokens),
        )

    def _others_at_work(self) -> bool:
        """Whether another process that is alive holds a reservation."""
        with self._locked():
            rows = self._connection.execute(
                "SELECT pid FROM reserved WHERE pid NOT IN (?, ?) AND prompt + completion > 0", (_NOBODY, self._pid)
            ).fetchall()
        return any(_alive(pid) for (pid,) in rows)

    def _spent(self, worst: Tokens) -> BudgetError:
        with self._transaction():
            row, used, reserved = self._sums()
        total = _add(used, reserved)
        key, limit = ("budget", self.budget.money)
        spent, asked = f"{self.budget.cost(total):.6g}", f"{self.budget.cost(worst):.6g}"
        if self.budget.tokens is not None and sum(_add(total, worst)) > self.budget.tokens:
            key, limit = "budget_tokens", self.budget.tokens
            spent, asked = f"{sum(total)} tokens", f"{sum(worst)} tokens"
        pending = f", {sum(reserved)} tokens of it held by requests of other processes" if sum(reserved) else ""
        return BudgetError(
            f"the budget is spent: {spent} of {limit} used by {row['requests']} requests{pending}, and the next one "
            f"may take {asked}; finished answers are kept and not paid for again: run the same command again with a "
            f"larger one (--set {key}=…)"
        )

    def _sums(self) -> tuple[dict[str, int], Tokens, Tokens]:
        """The counters, the tokens that were used, and those that are reserved."""
        values = self._connection.execute(f"SELECT {', '.join(_COUNTERS)} FROM usage").fetchone()
        row = dict(zip(_COUNTERS, values, strict=True))
        (prompt, completion) = self._connection.execute(
            "SELECT COALESCE(SUM(prompt), 0), COALESCE(SUM(completion), 0) FROM reserved"
        ).fetchone()
        return row, Tokens(row["prompt_tokens"], row["completion_tokens"]), Tokens(prompt, completion)


def _alive(pid: int) -> bool:
    """Whether a process is there; yes where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _add(a: Tokens, b: Tokens) -> Tokens:
    return Tokens(a.prompt + b.prompt, a.completion + b.completion)
