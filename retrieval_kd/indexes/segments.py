"""Several pieces of one engine as one index: the shards it was built in, or what updates added; and how they are made.

Each segment is a whole index artifact in a folder of the generation. A row of the index is a row of its segment plus
the rows of those before it.
"""

from __future__ import annotations

import logging
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifact import Manifest
from retrieval_kd.errors import UsageError
from retrieval_kd.indexes.attributes import ATTRIBUTES, attributes_of, write_attributes
from retrieval_kd.indexes.base import DELETED, SEGMENTS, UPDATED_FROM, Index, IndexRecipe, Source, write_rows
from retrieval_kd.indexes.hits import merged, no_hits
from retrieval_kd.plan import WORK, Draft, Plan
from retrieval_kd.progress import progress

log = logging.getLogger("retrieval_kd")

_OF_ONE_GENERATION = {SEGMENTS, UPDATED_FROM, "build_seconds", "bytes"}


class Segments(Index):
    """An index of segments, less the rows that were deleted. It takes and promises what its engine does."""

    def __init__(self, path: Path, manifest: Manifest, engine: type[Index]) -> None:
        super().__init__(path, manifest)
        self.engine = engine
        self.takes = engine.takes

    def open(self, recipe: Any, search: Any) -> None:
        """Opens every segment; the generation's checksums cover them."""
        names = self.manifest.details[SEGMENTS]
        self.segments = [Index.load(self.path / name, verify=False, search=self.search_values) for name in names]
        self._starts = np.cumsum([0, *(len(segment) for segment in self.segments)]).tolist()
        self._joint = self.engine.join(self.segments, self)

    @property
    def exact(self) -> bool:
        """Whether every segment's hits are the true best."""
        return all(segment.exact for segment in self.segments)

    @property
    def dimension(self) -> int:
        """The length of a vector, where the engine has one."""
        return int(self.manifest.details["dimension"])

    def search(self, queries: Any, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k]: hits of all at once where the engine can, else of each in turn, merged."""
        number = queries.shape[0] if hasattr(queries, "shape") else len(queries)
        scores, rows = no_hits(number, len(self), k, allowed)
        if self.live is not None:
            allowed = self.live if allowed is None else allowed & self.live
        if self._joint is not None:
            return self._joint.search(queries, k, allowed)
        for segment, (start, stop) in zip(self.segments, pairwise(self._starts), strict=True):
            part = None if allowed is None or allowed[start:stop].all() else allowed[start:stop]
            if part is not None and not part.any():
                continue
            found_scores, found_rows = segment.search(queries, k, part)
            found_rows = np.where(found_rows < 0, -1, found_rows + start)
            scores, rows = merged(scores, rows, found_scores, found_rows, self.rank)
        return scores, rows

    def problems(self) -> list[str]:
        """Broken rows, segments that are broken or of other documents, deletions of rows that are not there."""
        found = super().problems()
        if self._starts[-1] != len(self):
            return [*found, f"{len(self)} rows but the segments have {self._starts[-1]}"]
        for segment, (start, stop) in zip(self.segments, pairwise(self._starts), strict=True):
            found += [f"{segment.path.name}: {problem}" for problem in segment.problems()]
            if not self.ids.slice(start, stop - start).equals(segment.ids):
                found.append(f"{segment.path.name}: its ids are not rows {start} to {stop} of the index")
        dead = 0 if self.live is None else int(np.count_nonzero(~self.live))
        if dead != self.manifest.counts.get("deleted", 0):
            found.append(f"{self.manifest.counts.get('deleted', 0)} documents are deleted, {DELETED} has {dead}")
        return found


def write_index(engine: type[Index], recipe: IndexRecipe, source: Source, draft: Draft, attributes: Any = None) -> None:
    """Builds an index of ``source`` into ``draft``, in as many shards as the recipe says, and its attributes.

    They are those in the source's collection, unless a table is given. A shard that a former attempt finished is kept;
    an index of fewer documents than shards (it shrank) has one for each document.
    """
    began = time.perf_counter()
    if recipe.shards == 1:
        engine.build(recipe, source, draft)
    else:
        _write_shards(engine, recipe, source, draft)
    if attributes is None and source.collection is not None:
        attributes = attributes_of(source.collection, None if source.vectors is None else source.vectors.ids)
    if attributes is not None:
        write_attributes(draft.path / ATTRIBUTES, attributes)
    finish_details(draft, began)


def write_all_rows(draft: Draft, segments: list[Index]) -> None:
    """Writes ids and order of the rows of all ``segments`` into ``draft``."""
    import pyarrow as pa

    chunks = [chunk for segment in segments for chunk in segment.ids.chunks]
    write_rows(draft.path, pa.chunked_array(chunks, pa.string()), unique=False)


def describe_segments(draft: Draft, segments: list[Index]) -> None:
    """Notes in ``draft`` the counts of all ``segments`` together, the details they share, and their names."""
    for name in dict.fromkeys(name for segment in segments for name in segment.manifest.counts):
        draft.counts[name] = sum(segment.manifest.counts.get(name, 0) for segment in segments)
    own = segments[0].manifest.details
    draft.details.update({name: value for name, value in own.items() if name not in _OF_ONE_GENERATION})
    draft.details[SEGMENTS] = [segment.path.name for segment in segments]


def write_segment(draft: Draft, number: int, recipe: IndexRecipe, source: Source, first: Index | type[Index]) -> Index:
    """Segment ``number`` of ``source`` in ``draft``: built by an engine, or grown from the first segment.

    One that a former attempt finished is kept. What comes back is not opened: memory holds one segment's engine.
    """
    inputs = {"vectors" if source.vectors is not None else "collection": source.rows.ref()}
    if source.vectors is not None:
        inputs["model"] = source.vectors.model_ref
    plan = Plan("index", recipe.model_copy(update={"shards": 1}).resolved(), inputs)
    place = draft.path / segment_name(number)
    if not plan.finished(place):
        began = time.perf_counter()
        resumable = isinstance(first, type) and first.resumable
        with plan.write(place, resumable=resumable) as part:
            if isinstance(first, type):
                first.build(recipe.model_copy(update={"shards": 1}), source, part)
            else:
                first.grow(source, part)
            finish_details(part, began)
    for left in ("plan.json", ".lock"):  # by a kill right after it was published
        (place / left).unlink(missing_ok=True)
    return Index.without_engine(place, verify=False)


def segment_name(number: int) -> str:
    """The folder of segment ``number``, counted from 1."""
    return f"segment-{number:06d}"


def finish_details(draft: Draft, began: float) -> None:
    """Notes in the draft's details how long it took and how many bytes it has."""
    files = [path for path in draft.path.rglob("*") if path.is_file() and draft.path / WORK not in path.parents]
    size = sum(path.stat().st_size for path in files)
    draft.details.update(build_seconds=round(time.perf_counter() - began, 3), bytes=size)


def shard_bounds(documents: int, shards: int) -> list[int]:
    """Where each shard begins, and the end: contiguous ranges whose sizes differ by one at most."""
    return [documents * shard // shards for shard in range(shards + 1)]


def check_shards(shards: int, documents: int) -> None:
    """Raises `UsageError` for more shards than documents."""
    if shards > max(documents, 1):
        raise UsageError(f"{shards} shards of {documents} documents: a shard has at least one; lower --shards")


def _write_shards(engine: type[Index], recipe: IndexRecipe, source: Source, draft: Draft) -> None:
    documents = len(source.ids)
    shards = min(recipe.shards, max(documents, 1))
    bounds = shard_bounds(documents, shards)
    segments: list[Index] = []
    first: Index | type[Index] = engine
    with progress(f"building {shards} shards", shards) as advance:
        for number, (start, stop) in enumerate(pairwise(bounds), 1):
            segments.append(write_segment(draft, number, recipe, source.shard(start, stop), first))
            if number == 1:
                first = Index.load(segments[0].path, verify=False)
            log.info("shard %s of %s: documents %s to %s", number, shards, f"{start:,}", f"{stop:,}")
            advance(1)
    write_all_rows(draft, segments)
    describe_segments(draft, segments)
