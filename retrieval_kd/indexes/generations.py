"""The generations of an index: a new one is written beside the old, and published by renaming one small file.

``update.json`` is written before anything else and removed last. A process that was killed in between leaves the old
generation or the new one, and what it left besides is removed by the next update.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval_kd.artifact import CURRENT, MANIFEST, Manifest, resolve
from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import ArtifactError, RetrievalKDError
from retrieval_kd.indexes.attributes import ATTRIBUTES
from retrieval_kd.indexes.base import SEGMENTS, Index
from retrieval_kd.plan import Draft, Plan

log = logging.getLogger("retrieval_kd")

RECORD = "update.json"
_LOCK = ".update.lock"
_KEPT = 2
"""Generations that stay: the one that is searched, and the one before it for those who have it open."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the index at ``root`` against other updates, and clears away what one that was killed has left.

    Raises `ArtifactError` for something that is no index, `RetrievalKDError` while another process updates it.
    """
    from filelock import FileLock, Timeout

    if not (root / CURRENT).is_file():
        found = Manifest.read(root).artifact
        raise ArtifactError(f"{root}: not an index that can be updated (its artifact is: {found})")
    lock = FileLock(root / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RetrievalKDError(f"{root}: another process is updating it; wait for it to end") from None
    try:
        _settle(root)
        yield
    finally:
        lock.release()


@contextmanager
def next_generation(root: Path, action: str, plan: Plan) -> Iterator[Draft]:
    """A draft that becomes the current generation of ``root`` when the block ends without an error."""
    former = resolve(root).name
    name = f"gen-{_number(former) + 1:06d}"
    started = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"action": action, "from": former, "to": name, "started": started}
    try:
        write_atomically(root / RECORD, json.dumps(record).encode())
        with plan.write(root / name, force=True) as draft:  # over one that somebody went back from
            yield draft
        write_atomically(root / CURRENT, (name + "\n").encode())
    finally:
        _settle(root)


def link_segments(index: Index, draft: Draft) -> list[str]:
    """The segments of ``index`` (of one piece: itself) as hard links in ``draft``; copies where links cannot be."""
    manifest = index.manifest
    in_pieces = SEGMENTS in manifest.details
    names = manifest.details[SEGMENTS] if in_pieces else ["segment-000001"]
    sources = [*manifest.files, *([] if in_pieces else [MANIFEST])]
    for source in sources:
        if in_pieces and source.split("/")[0] not in names:
            continue
        _link(index, source, draft, source if in_pieces else f"{names[0]}/{source}")
    return list(names)


def link_rows(index: Index, draft: Draft) -> None:
    """The ids, order and attributes of ``index`` in ``draft``, linked or copied: for a change that adds no row."""
    for name in ("ids.arrow", "rank.npy", ATTRIBUTES):
        if name in index.manifest.files:
            _link(index, name, draft, name)


def _link(index: Index, source: str, draft: Draft, target: str) -> None:
    place = draft.path / target
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(index.path / source, place)
    except OSError:
        shutil.copy2(index.path / source, place)  # another file system, or one without links
    else:
        if source in index.manifest.files:
            draft.linked[target] = index.manifest.files[source]


def _settle(root: Path) -> None:
    """Leaves the current generation, the one before it, and no record of an update."""
    if not (root / RECORD).is_file():
        return
    current = _number(resolve(root).name)
    record: dict[str, Any] = json.loads((root / RECORD).read_text())
    for folder in sorted(root.glob("gen-*")):
        number = _number(folder.name)
        unfinished = number > current
        if unfinished or number <= current - _KEPT:
            shutil.rmtree(folder)
            what = f"of an unfinished {record['action']}" if unfinished else "no longer needed"
            log.info("%s: removed %s (%s)", root, folder.name, what)
    (root / RECORD).unlink()


def _number(name: str) -> int:
    found = re.fullmatch(r"gen-(\d+)(\.partial|\.former)?", name)
    if found is None:
        raise ArtifactError(f"{name}: not the name of a generation (gen-NNNNNN)")
    return int(found[1])
