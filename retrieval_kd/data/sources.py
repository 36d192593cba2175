"""Names of collections, as users write them, and the collections they stand for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_kd.artifact import is_artifact
from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import ArtifactError, InputError, did_you_mean

if TYPE_CHECKING:
    from retrieval_kd.data.collection_writer import Source

log = logging.getLogger("retrieval_kd")

PYDOCS = "pydocs"
IRDS = "irds:"


def make_collection(source: str, out: str | Path, *, sample: int | None = None, force: bool = False) -> Collection:
    """The collection artifact at ``out`` of ``source``: ``pydocs``, a BEIR folder, or ``irds:`` and ir_datasets ids.

    ``sample`` keeps that many documents (those with the smallest id hash), the queries that keep a relevant one, and
    their qrels. Raises `InputError` for an unknown source, `DataError` for wrong content.
    """
    from retrieval_kd.data.collection_writer import write_collection

    return write_collection(find_source(source), Path(out), sample=sample, force=force)


def open_collection(spec: str | Path | Collection) -> Collection:
    """The collection that ``spec`` stands for: an artifact's directory, or anything `make_collection` takes.

    What is not an artifact yet becomes one in the user's cache directory and is reused while its source stays the same.
    """
    if isinstance(spec, Collection):
        return spec
    path = Path(spec)
    if str(spec) != PYDOCS and not str(spec).startswith(IRDS) and not _is_beir(path):
        if not path.exists() and not path.with_name(path.name + ".partial").exists():
            raise _unknown(str(spec))
        return Collection.load(path)
    return _cached(str(spec))


def find_source(spec: str) -> Source:
    """The reader of a source; `InputError` when the name means nothing."""
    if spec == PYDOCS:
        from retrieval_kd.data.pydocs import PydocsSource

        return PydocsSource()
    if spec.startswith(IRDS):
        from retrieval_kd.data.irds import IrdsSource

        return IrdsSource(spec.removeprefix(IRDS))
    if _is_beir(Path(spec)):
        from retrieval_kd.data.beir import BeirSource

        return BeirSource(Path(spec))
    raise _unknown(spec)


def cache_directory() -> Path:
    """Where collections are kept that were opened without having been made."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "retrieval-kd" / "collections"


def _cached(spec: str) -> Collection:
    from filelock import FileLock

    from retrieval_kd.data.collection_writer import write_collection

    source = find_source(spec)
    key = hashlib.sha256(json.dumps(_cache_key(spec, source)).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name.removeprefix(IRDS))[:60]
    out = cache_directory() / f"{name}-{key}"
    _make_writable(out.parent)
    with FileLock(out.with_name(out.name + ".lock")):
        if is_artifact(out):
            try:
                # Only sizes: the source is at hand, and hashing a large collection at every command takes minutes.
                return Collection.load(out, verify=False)
            except ArtifactError as error:
                log.warning("%s; making it again", error)
        log.info("making the collection %s in %s", spec, out)
        return write_collection(source, out, force=True)


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error}); set XDG_CACHE_HOME to a place that can") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: cannot be written; set XDG_CACHE_HOME to a place that can")


def _cache_key(spec: str, source: Source) -> list[object]:
    """What a cached collection depends on, without reading large files."""
    if spec == PYDOCS or spec.startswith(IRDS):
        return [source.name, source.ref().fingerprint]
    folder = Path(spec).resolve()
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jsonl", ".tsv"))
    return [str(folder), *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)]


def _is_beir(path: Path) -> bool:
    return (path / "corpus.jsonl").is_file() and not is_artifact(path)


def _unknown(spec: str) -> InputError:
    path = Path(spec)
    if is_artifact(path):
        return InputError(f"{spec}: is an artifact already; a collection is made from pydocs, a BEIR folder or irds:ID")
    if path.is_dir():
        return InputError(f"{spec}: neither a collection artifact nor a BEIR folder (it has no corpus.jsonl)")
    hint = did_you_mean(spec, [PYDOCS]) if "/" not in spec else ""
    return InputError(f"{spec}: no such directory{hint}; give a collection artifact, a BEIR folder, irds:ID or pydocs")
