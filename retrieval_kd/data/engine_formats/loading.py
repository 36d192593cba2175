"""The artifact of vectors that were exported for a search engine, and its records for a program that loads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.artifact import Artifact
from retrieval_kd.errors import ArtifactError
from retrieval_kd.progress import progress

_BATCH_CHARACTERS = 4_000_000
"""What one request of a client may hold; servers refuse larger ones than some 30 MB."""


class EngineExport(Artifact):
    """Vectors in the files that one search engine loads."""

    kind = "engine-export"

    @property
    def format(self) -> str:
        """The engine that it is for, as ``--format`` calls it."""
        return str(self.manifest.recipe["format"])

    @property
    def parts(self) -> list[Path]:
        """The files with documents, in order."""
        return [self.path / name for name in sorted(self.manifest.details["parts"])]

    def __len__(self) -> int:
        return int(self.manifest.counts["documents"])

    def batches(self) -> Iterator[list[Any]]:
        """The lines of all parts, read as JSON, as many at a time as one request may hold."""
        batch: list[Any] = []
        size = 0
        for part in self.parts:
            with part.open(encoding="utf-8") as lines:
                for line in lines:
                    if batch and size + len(line) > _BATCH_CHARACTERS:
                        yield batch
                        batch, size = [], 0
                    batch.append(json.loads(line))
                    size += len(line)
        if batch:
            yield batch

    def load_with(self, send: Callable[[list[Any]], object]) -> int:
        """The number of lines that ``send`` was given, batch by batch."""
        loaded = 0
        with progress("loading", len(self)) as advance:
            for batch in self.batches():
                send(batch)
                loaded += len(batch)
                advance(len(batch))
        return loaded


def engine_export(path: str | Path, format: str) -> EngineExport:
    """The export at ``path``; `ArtifactError` when it is for another engine."""
    export = EngineExport.load(path)
    if export.format != format:
        raise ArtifactError(f"{path}: an export for {export.format}; one for {format} is needed here")
    return export
