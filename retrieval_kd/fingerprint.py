"""Fingerprints: the SHA-256 of a value, of a file, of a directory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_hashed: dict[tuple[str, int, int], str] = {}


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hashed once per process while its size and modification time stay."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _hashed:
        with path.open("rb") as file:
            _hashed[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashed[key]


def directory_fingerprint(directory: Path) -> str:
    """A fingerprint for a directory that is not an artifact (a stock model): hash over its files' names and bytes."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return digest({path.relative_to(directory).as_posix(): file_sha256(path) for path in sorted(files)})
