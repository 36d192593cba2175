"""Plans: what an artifact will be made of, and its draft, which is published when it is whole.

A draft is built in ``OUT.partial`` (which survives a crash, so that resumable work goes on), fsynced and renamed to
``OUT``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval_kd.artifact import CURRENT, FORMATS, MANIFEST, InputRef, Manifest, damaged_files, is_artifact, resolve
from retrieval_kd.atomic import fsync, publish, recover, remove, unfinished, write_atomically, writing_to
from retrieval_kd.errors import ArtifactError, OutputExistsError
from retrieval_kd.fingerprint import digest, file_sha256
from retrieval_kd.software import software_versions

WORK = "work"
"""A draft's folder for intermediate files; it is deleted before the draft is published."""

_NOT_CONTENT = {MANIFEST, "plan.json", ".lock"}


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
        return digest(self._identity())

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
        recover(out)
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
        what = "is damaged" if manifest.key == self.key else f"was made from {_difference(manifest, self)}"
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

        partial = unfinished(out)
        with writing_to(out):
            partial.mkdir(parents=True, exist_ok=True)
            lock = FileLock(partial / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise OutputExistsError(f"{partial}: another process is writing it; wait for it to end") from None
            try:
                if not force and self._stands_at(out):
                    remove(partial)
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
                publish(partial, out)  # while it is locked: nobody else may take the draft for unfinished
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
        same = manifest.key == self.key
        return same and not damaged_files(resolve(out), manifest, checksums=False)

    def _publish_sealed(self, out: Path) -> None:
        """Renames a draft of this plan whose manifest is there: nothing was left to do but that."""
        from filelock import FileLock, Timeout

        partial = unfinished(out)
        if not is_artifact(partial):
            return
        try:
            with FileLock(partial / ".lock", timeout=0):
                manifest = Manifest.read(resolve(partial))
                if manifest.key == self.key and not damaged_files(resolve(partial), manifest):
                    publish(partial, out)
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
                fsync(path)
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
            "fingerprint": digest({**identity, "files": content}),
        }
        raw = json.loads(json.dumps(raw))
        raw["checksum"] = digest(raw)
        text = json.dumps(raw, indent=2, ensure_ascii=False)
        write_atomically(draft.path / MANIFEST, text.encode())
        for folder in {path.parent for path in draft.path.rglob("*")}:
            fsync(folder)


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
            remove(path)
