"""Writes that a crash leaves whole: a file, and a directory that is made as ``OUT.partial`` and renamed to ``OUT``."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval_kd.errors import RetrievalKDError, UsageError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves either the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing_to(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Turns a full disk into a `RetrievalKDError` that names ``out``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RetrievalKDError(
                f"{out}: the disk is full ({error.strerror}); what was there before is untouched; "
                "free some space and run the command again"
            ) from error
        raise


def unfinished(out: Path) -> Path:
    """Where the draft of ``out`` is while it is written."""
    return _sibling(out, ".partial")


def publish(partial: Path, out: Path) -> None:
    """Renames ``partial`` to ``out``; what was there before stays until then, as ``OUT.former``."""
    former = _sibling(out, ".former")
    if out.exists():
        remove(former)  # a crash may have left it, after `out` was complete
        out.rename(former)
    partial.rename(out)
    fsync(out.parent)
    remove(former)


def recover(out: Path) -> None:
    """Puts back the old artifact when a crash fell between the two renames of `publish`."""
    former = _sibling(out, ".former")
    if former.exists() and not out.exists():
        former.rename(out)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(out: Path, suffix: str) -> Path:
    """``OUT<suffix>`` beside ``out``, also when ``out`` is written as ``.`` or ``..``."""
    if out.name in ("", ".."):
        out = out.resolve()
    if not out.name:
        raise UsageError(f"{out}: cannot be an output; name a directory in it")
    return out.with_name(out.name + suffix)
