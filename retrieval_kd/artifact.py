"""Artifacts: the directories that stages share, verified when they are read.

An artifact is a directory whose ``manifest.json`` was written last (`retrieval_kd.plan` does it). A directory without
a manifest is not an artifact. An index holds generations (``CURRENT`` names one of ``gen-NNNNNN/``); each generation
is an artifact.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from retrieval_kd.atomic import unfinished
from retrieval_kd.errors import ArtifactError
from retrieval_kd.fingerprint import digest, file_sha256

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
        if checksum != digest(raw):
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

    @property
    def key(self) -> str:
        """The `Plan.key` of what it was made from."""
        inputs = {name: entry["fingerprint"] for name, entry in self.inputs.items()}
        return digest({"artifact": self.artifact, "format": self.format, "recipe": self.recipe, "inputs": inputs})


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


def _named(kind: str) -> str:
    """A kind of artifact with its article."""
    return kind if kind.endswith("s") else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _why_no_manifest(directory: Path) -> str:
    if not directory.exists():
        partial = unfinished(directory)
        if partial.exists():
            return f"{directory}: not finished; run the command that makes it again, it goes on from {partial.name}"
        return f"{directory}: no such file or directory"
    return f"{directory}: not an artifact (no {MANIFEST})"
