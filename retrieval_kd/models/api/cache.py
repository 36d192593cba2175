"""Answers that were paid for, kept in SQLite: one file for each endpoint and model, shared by runs and processes."""

from __future__ import annotations

import json
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock

from retrieval_kd.errors import ArtifactError, RetrievalKDError
from retrieval_kd.models.api.reply import Reply

FORMAT = 1


class AnswerCache:
    """Answers by the key of their request. Safe for several threads and processes; an answer is on disk after `put`."""

    _MEND = (
        "delete it and run the same command again (its answers are asked and paid for again), or give another folder "
        "with --set cache=…"
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._readable():
            self._connection = connect(path)
            weakref.finalize(self, self._connection.close)
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > FORMAT:
                raise ArtifactError(
                    f"{path}: answers of format {version}, newer than this version reads; upgrade retrieval-kd, "
                    "or give another folder with --set cache=…"
                )
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            self._connection.execute(f"PRAGMA user_version = {FORMAT}")

    def get(self, key: str) -> Reply | None:
        """The answer of a request that was answered before."""
        with self._lock, self._readable():
            row = self._connection.execute("SELECT reply FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._decoded(row[0])

    def put(self, key: str, reply: Reply) -> Reply:
        """Keeps an answer; what comes back is the first that was kept, should another process have been faster."""
        with self._lock, self._readable():
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(reply._asdict())))
            (text,) = self._connection.execute("SELECT reply FROM answers WHERE key = ?", (key,)).fetchone()
        return self._decoded(text)

    def _decoded(self, text: str) -> Reply:
        try:
            raw = json.loads(text)
            first = raw["first_token"]
            return Reply(
                content=raw["content"],
                first_token=None if first is None else tuple((token, value) for token, value in first),
                usage=None if raw["usage"] is None else (raw["usage"][0], raw["usage"][1]),
                model=raw["model"],
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._damaged(error) from error

    def _readable(self) -> AbstractContextManager[None]:
        return readable(self.path, "cache of answers", self._MEND)

    def _damaged(self, error: Exception) -> ArtifactError:
        return ArtifactError(f"{self.path}: damaged cache of answers ({error}); {self._MEND}")


@contextmanager
def readable(path: Path | str, what: str, mend: str) -> Iterator[None]:
    """Turns what SQLite complains about into errors that name the file and the mend."""
    try:
        yield
    except sqlite3.OperationalError as error:  # locked, read-only, a full disk
        raise RetrievalKDError(f"{path}: the {what} cannot be used ({error})") from error
    except sqlite3.DatabaseError as error:
        raise ArtifactError(f"{path}: damaged {what} ({error}); {mend}") from error


def connect(path: Path | str) -> sqlite3.Connection:
    """A connection for several threads (one at a time) and processes; every statement is its own transaction.

    A write-ahead log without a sync for each commit: a killed process loses nothing that was committed.
    """
    if path == ":memory:":
        return sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # switching to the log is refused while another process does the same
        connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error:
            connection.close()
            raise
    return connection
