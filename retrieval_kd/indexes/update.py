"""The verb `update_index`: documents are added to an index, deleted from it, and its pieces made one again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import ArtifactError, InputError, UsageError, did_you_mean, first
from retrieval_kd.indexes.attributes import ATTRIBUTES, attributes_of, joined, write_attributes
from retrieval_kd.indexes.base import (
    DELETED,
    SEGMENTS,
    UPDATED_FROM,
    Index,
    Source,
    arrow_ids,
)
from retrieval_kd.indexes.former import FormerIndex
from retrieval_kd.indexes.generations import link_rows, link_segments, locked, next_generation
from retrieval_kd.indexes.inputs import (
    numbered,
    open_collection,
    open_source,
    open_vectors,
    with_collection,
)
from retrieval_kd.indexes.segments import (
    describe_segments,
    finish_details,
    segment_name,
    write_all_rows,
    write_index,
    write_segment,
)
from retrieval_kd.plan import Draft, Plan

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

Action = Literal["add", "delete", "compact"]

_MANY_SEGMENTS = 16


def update_index(
    index: str | Path,
    action: Action,
    *,
    vectors: str | Path | Vectors | None = None,
    collection: str | Path | Collection | None = None,
    ids: Sequence[str] = (),
    rebuild: bool = False,
) -> Index:
    """The index at ``index`` after documents were added or deleted, as a new generation that is published at once.

    ``add`` takes ``vectors`` of new documents by the index's model (and their ``collection``, whose attributes are
    kept), or the ``collection`` of new documents of a text index; ``delete`` takes ``ids``; ``compact`` builds the
    index anew from the vectors or texts of the documents that are left. With ``rebuild`` an ``add`` does that too.
    Whatever fails or is killed leaves the index as it was.

    Raises `InputError` for an id that is there already, or that is to be deleted and is not there; `ArtifactError` for
    vectors by another model, and for vectors or collections that are needed and gone; `UsageError` for what the engine
    cannot do.
    """
    root = Path(index)
    if action not in get_args(Action):
        raise UsageError(f"unknown action '{action}'{did_you_mean(action, get_args(Action))}")
    with locked(root):
        update = _Update(root, Index.without_engine(root), time.perf_counter())
        if action == "delete":
            _refuse(action, vectors=vectors, collection=collection, rebuild=rebuild or None)
            update.delete(ids)
        elif action == "compact":
            _refuse(action, vectors=vectors, collection=collection, ids=ids or None, rebuild=rebuild or None)
            update.compact()
        else:
            _refuse(action, ids=ids or None)
            update.add(open_vectors(vectors), open_collection(collection), rebuild=rebuild)
    return Index.load(root, verify=False)  # all was hashed above, or when it was written


@dataclass(frozen=True)
class _Update(FormerIndex):
    """One change of it."""

    began: float

    def delete(self, ids: Sequence[str]) -> None:
        """Marks rows as deleted; every other file is linked."""
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            raise UsageError("nothing to delete: give ids")
        rows = self.rows_of(wanted)
        if len(rows) < len(wanted):
            found = set(self.former.ids_of(rows))
            missing = [doc_id for doc_id in wanted if doc_id not in found]
            raise InputError(f"{self.root}: {len(missing)} of {len(wanted)} ids are not in it: {first(missing)}")
        with next_generation(self.root, "delete", self._plan(self.refs())) as draft:
            link_segments(self.former, draft)
            link_rows(self.former, draft)
            self._finish(draft, self._segments(draft), np.concatenate([self.dead(), rows]))
        if self.engine.takes == "text":
            log.info("%s: scores still count the deleted documents until it is compacted", self.root)
        log.info("%s: %s documents deleted", self.root, f"{len(rows):,}")

    def add(self, vectors: Vectors | None, collection: Collection | None, *, rebuild: bool) -> None:
        """Adds a segment of new documents, or builds all anew."""
        kind = self.recipe.kind
        text = self.engine.takes == "text"
        if text and (vectors is not None or collection is None):
            raise UsageError(f"a {kind} index reads text: give the new documents with --collection C, and no vectors")
        if not text and vectors is None:
            raise UsageError("add takes the vectors of the new documents: give --vectors V (see retrieval-kd encode)")
        if not self.engine.growable and not rebuild:
            raise UsageError(
                f"{self.root}: a {kind} index cannot grow, its scores depend on the whole collection; "
                f"add --rebuild to build it anew from the old {self.inputs_in_words} and the new"
            )
        source = with_collection(open_source(kind, self.engine, collection, vectors))
        self.check_new(source)
        number = len(source.ids)
        refs = self.refs(source)
        if rebuild:
            parts = [*self.parts(), source]
            return self._build_anew("add", parts, self.live_ids() + arrow_ids(source.ids).to_pylist(), source)
        with next_generation(self.root, "add", self._plan(refs)) as draft:
            link_segments(self.former, draft)
            segments = self._segments(draft)
            last = max(int(segment.path.name.rpartition("-")[2]) for segment in segments)
            first_segment = Index.load(segments[0].path, verify=False)
            of_segment = source if text else replace(source, collection=None)
            segments.append(write_segment(draft, last + 1, self.recipe, of_segment, first_segment))
            _check_metric(segments[0], segments[-1], source.rows.path)
            attributes = joined(self.former.attributes, len(self.former), self._new_attributes(source), number)
            write_all_rows(draft, segments)
            if attributes is not None:
                write_attributes(draft.path / ATTRIBUTES, attributes)
            self._finish(draft, segments, self.dead())
        log.info("%s: %s documents added", self.root, f"{number:,}")
        if len(segments) >= _MANY_SEGMENTS:
            log.info("%s: has %s segments; `update %s compact` makes them one", self.root, len(segments), self.root)

    def compact(self) -> None:
        """Builds the index anew of the documents that are left."""
        self._build_anew("compact", self.parts(), self.live_ids(), None)

    def _build_anew(self, action: str, parts: list[Source], ids: list[str], new: Source | None) -> None:
        """A generation of one piece (or the recipe's shards) of the documents ``ids``, from the last part with each."""
        import pyarrow as pa

        from retrieval_kd.data.vector_rows import last_rows

        if not ids:
            raise InputError(f"{self.root}: no document is left; an index has at least one")
        part_of, row_of = last_rows([part.ids for part in parts], ids)
        if (part_of < 0).any():
            missing = [ids[i] for i in np.flatnonzero(part_of < 0)]
            raise ArtifactError(
                f"{self.root}: {len(missing)} documents are not in its {self.inputs_in_words}: {first(missing)}"
            )
        used = [part for i, part in enumerate(parts) if (part_of == i).any()]
        refs = {name: ref for name, ref in self.refs(new).items() if name.partition("_")[0] != self.read_from}
        refs |= numbered(self.read_from, [part.rows.ref() for part in used])
        table = joined(
            self.former.attributes,
            len(self.former),
            None if new is None else self._new_attributes(new),
            len(ids) - len(self.live_ids()),
        )
        if table is not None:
            alive = np.ones(table.num_rows, dtype=bool)
            alive[self.dead()] = False
            table = table.filter(pa.array(alive))
        with next_generation(self.root, action, self._plan(refs)) as draft:
            whole = len(used) == 1 and arrow_ids(used[0].ids).to_pylist() == ids
            source = used[0] if whole else _gathered(draft.work / "vectors", parts, part_of, row_of)
            write_index(self.engine, self.recipe, self.with_teachers(source), draft, table)
            self._note_origin(draft)
        log.info("%s: built anew of %s documents", self.root, f"{len(ids):,}")

    def _new_attributes(self, source: Source) -> Any:
        found = None
        if source.collection is not None:
            found = attributes_of(source.collection, None if source.vectors is None else source.vectors.ids)
        if found is None and self.former.attributes is not None:
            log.warning(
                "%s: the new documents have no attributes, so that no filter finds them; "
                "if they have some, give their --collection C",
                self.root,
            )
        return found

    def _segments(self, draft: Draft) -> list[Index]:
        names = self.former.manifest.details.get(SEGMENTS, [segment_name(1)])
        return [Index.without_engine(draft.path / name, verify=False) for name in names]

    def _plan(self, refs: Mapping[str, InputRef]) -> Plan:
        return Plan("index", self.recipe.resolved(), refs)

    def _finish(self, draft: Draft, segments: list[Index], dead: np.ndarray) -> None:
        """Writes which rows are deleted, and what the manifest says of a generation of segments."""
        describe_segments(draft, segments)
        if len(dead):
            np.save(draft.path / DELETED, np.sort(dead).astype(np.int64))
            draft.counts["documents"] -= len(dead)
            draft.counts["deleted"] = len(dead)
        finish_details(draft, self.began)
        self._note_origin(draft)

    def _note_origin(self, draft: Draft) -> None:
        draft.details[UPDATED_FROM] = {"generation": self.former.path.name, "fingerprint": self.former.fingerprint}


def _refuse(action: str, **given: object) -> None:
    """Raises `UsageError` for arguments that an action has no use for."""
    unused = [f"--{name}" for name, value in given.items() if value is not None]
    if unused:
        raise UsageError(f"update … {action} does not take {' and '.join(unused)}")


def _gathered(folder: Path, parts: Sequence[Source], part_of: np.ndarray, row_of: np.ndarray) -> Source:
    """Row i is row ``row_of[i]`` of ``parts[part_of[i]]``: texts where they are, vectors copied into ``folder``."""
    if parts[0].vectors is None:
        from retrieval_kd.data.collection_rows import CollectionRows

        collections = [part.collection for part in parts if part.collection is not None]
        return Source(CollectionRows(collections, part_of, row_of))
    from retrieval_kd.data.vector_rows import gather_vectors

    vectors = [part.vectors for part in parts if part.vectors is not None]
    return Source(vectors=gather_vectors(folder, vectors, part_of, row_of))


def _check_metric(first_segment: Index, added: Index, path: Path) -> None:
    """Raises `ArtifactError` where scores of the two could not be compared."""
    metrics = [segment.manifest.details.get("metric") for segment in (added, first_segment)]
    if metrics[0] != metrics[1]:
        raise ArtifactError(f"{path}: compares by {metrics[0]}, the index by {metrics[1]}; encode again")
