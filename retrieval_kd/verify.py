"""The verb `check`: what is wrong with an artifact on disk, in words."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from retrieval_kd.artifact import Artifact, Manifest, damaged_files, is_artifact, locate_input, resolve
from retrieval_kd.errors import InputError

READERS = {
    "collection": "retrieval_kd.data.collection:Collection",
    "run": "retrieval_kd.data.run:Run",
    "scores": "retrieval_kd.data.scores:Scores",
    "vectors": "retrieval_kd.data.vectors:Vectors",
    "model": "retrieval_kd.models.load:Model",
    "index": "retrieval_kd.indexes.base:Index",
    "engine-export": "retrieval_kd.data.engine_formats.loading:EngineExport",
    "report": "retrieval_kd.eval.report:Report",
}
"""Kind of artifact → the class that reads it and knows its invariants."""


def check(path: str | Path) -> list[str]:
    """The problems of the artifact at ``path``: manifest, checksums, invariants of its kind. Empty when all is well.

    A plain TREC run file is read and validated too. Raises `MissingExtraError` when reading it needs a package that
    is not installed.
    """
    path = Path(path)
    if path.is_file():
        return _broken_invariants("run", path)
    try:
        directory = resolve(path)
        manifest = Manifest.read(directory)
    except InputError as error:
        return [str(error)]
    damage = [f"{directory}: {problem}" for problem in damaged_files(directory, manifest)]
    # A reader refuses damaged files too: its complaint would repeat the first one.
    return damage or _broken_invariants(manifest.artifact, path)


def lost_inputs(path: str | Path) -> list[str]:
    """What the artifact at ``path`` was made from and is no longer found, in words.

    That is no damage: what stands on its own still works, and ``--model`` or ``--collection`` name a new place.
    """
    path = Path(path)
    if path.is_file():
        return []
    directory = resolve(path)
    manifest = Manifest.read(directory)
    lost = []
    for name, entry in manifest.inputs.items():
        places = [directory / entry["relative"], Path(entry["absolute"])] if "absolute" in entry else []
        if not places or any(place.exists() and not is_artifact(place) for place in places):
            continue  # a model from the hub, a stock model directory or a TREC file: there is no manifest to compare
        try:
            locate_input(directory, manifest, name)
        except InputError as error:
            lost.append(str(error))
    return lost


def reader(kind: str) -> Any:
    """The class that reads artifacts of ``kind``, imported now."""
    module, _, name = READERS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def _broken_invariants(kind: str, path: Path) -> list[str]:
    try:
        loaded = reader(kind).load(path)
    except InputError as error:
        return [str(error)]
    return loaded.problems() if isinstance(loaded, Artifact) else []
