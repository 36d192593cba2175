"""The verb `update_index`: documents are added to an index, deleted from it, and its pieces made one again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from retrieval_kd.artifact import Draft, InputRef, Plan
from retrieval_kd.errors import ArtifactError, InputError, UsageError, did_you_mean, first
from retrieval_kd.indexes.attributes import ATTRIBUTES, attributes_of, joined, write_attributes
from retrieval_kd.indexes.base import DELETED, SEGMENTS, UPDATED_FROM, Index, IndexRecipe, Source, input_names
from retrieval_kd.indexes.generations import link_rows, link_segments, locked, next_generation
from retrieval_kd.indexes.inputs import (
    inputs_of,
    numbered,
    open_collection,
    open_source,
    open_vectors,
    recorded,
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
from retrieval_kd.registry import implementation

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
    kept), ``delete`` takes ``ids``; ``compact`` builds the index anew from the vectors of the documents that are left.
    With ``rebuild`` an ``add`` does that too, and a text index is built anew from ``collection``. Whatever fails or is
    killed leaves the index as it was.

    Raises `InputError` for an id that is there already, or that is to be deleted and is not there; `ArtifactError` for
    vectors by another model and for vectors that are needed and gone; `UsageError` for what the engine cannot do.
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
class _Update:
    """One change of the index at ``root``, which is now ``former``."""

    root: Path
    former: Index
    began: float

    @property
    def engine(self) -> type[Index]:
        engine: type[Index] = implementation("indexes", self.former.recipe.kind)
        return engine

    @property
    def recipe(self) -> IndexRecipe:
        return self.former.recipe

    def delete(self, ids: Sequence[str]) -> None:
        """Marks rows as deleted; every other file is linked."""
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            raise UsageError("nothing to delete: give ids")
        rows = self._rows_of(wanted)
        if len(rows) < len(wanted):
            found = set(self.former.ids_of(rows))
            missing = [doc_id for doc_id in wanted if doc_id not in found]
            raise InputError(f"{self.root}: {len(missing)} of {len(wanted)} ids are not in it: {first(missing)}")
        with next_generation(self.root, "delete", self._plan(self._refs())) as draft:
            link_segments(self.former, draft)
            link_rows(self.former, draft)
            self._finish(draft, self._segments(draft), np.concatenate([self._dead(), rows]))
        if not self.engine.segmentable:
            log.info("%s: scores still count the deleted documents; a rebuild forgets them", self.root)
        log.info("%s: %s documents deleted", self.root, f"{len(rows):,}")

    def add(self, vectors: Vectors | None, collection: Collection | None, *, rebuild: bool) -> None:
        """Adds a segment of ``vectors``, or builds all anew."""
        if self.engine.takes == "text":
            return self._rebuild_text(vectors, collection, rebuild=rebuild)
        if vectors is None:
            raise UsageError("add takes the vectors of the new documents: give --vectors V (see retrieval-kd encode)")
        kind = self.recipe.kind
        if not self.engine.segmentable and not rebuild:
            raise UsageError(
                f"{self.root}: a {kind} index cannot grow, its scores depend on the whole collection; "
                "add --rebuild to build it anew from all vectors"
            )
        source = with_collection(open_source(kind, self.engine, collection, vectors))
        self._check_new(vectors)
        refs = self._refs(source)
        if rebuild:
            parts = [*self._all_vectors(), vectors]
            return self._build_anew("add", parts, self._live_ids() + vectors.ids, source)
        with next_generation(self.root, "add", self._plan(refs)) as draft:
            link_segments(self.former, draft)
            segments = self._segments(draft)
            number = 1 + max(int(segment.path.name.rpartition("-")[2]) for segment in segments)
            first_segment = Index.load(segments[0].path, verify=False)
            segments.append(write_segment(draft, number, self.recipe, replace(source, collection=None), first_segment))
            _check_metric(segments[0], segments[-1], vectors)
            attributes = joined(self.former.attributes, len(self.former), self._new_attributes(source), len(vectors))
            write_all_rows(draft, segments)
            if attributes is not None:
                write_attributes(draft.path / ATTRIBUTES, attributes)
            self._finish(draft, segments, self._dead())
        log.info("%s: %s documents added", self.root, f"{len(vectors):,}")
        if len(segments) >= _MANY_SEGMENTS:
            log.info("%s: has %s segments; `update %s compact` makes them one", self.root, len(segments), self.root)

    def compact(self) -> None:
        """Builds the index anew of the documents that are left."""
        if self.engine.takes == "text":
            raise UsageError(
                f"{self.root}: a {self.recipe.kind} index is compacted by building it from a collection without the "
                f"deleted documents: update {self.root} add --rebuild --collection C"
            )
        self._build_anew("compact", self._all_vectors(), self._live_ids(), None)

    def _rebuild_text(self, vectors: Vectors | None, collection: Collection | None, *, rebuild: bool) -> None:
        if vectors is not None or collection is None or not rebuild:
            raise UsageError(
                f"{self.root}: a {self.recipe.kind} index cannot grow, its scores depend on the whole collection; "
                "build it anew from a collection with all documents: add --rebuild --collection C"
            )
        source = Source(collection)
        plan = self._plan(inputs_of(source))
        with next_generation(self.root, "add", plan) as draft:
            write_index(self.engine, self.recipe, source, draft)
            self._note_origin(draft)
        before, now = set(self._live_ids()), set(collection.documents.ids.to_pylist())
        log.info("%s: built anew: %s documents are new, %s are gone", self.root, len(now - before), len(before - now))

    def _build_anew(self, action: str, parts: list[Vectors], ids: list[str], new: Source | None) -> None:
        """A generation of one piece (or the recipe's shards) of the documents ``ids``, from the last part with each."""
        import pyarrow as pa

        from retrieval_kd.data.vector_rows import gather_vectors, last_rows

        if not ids:
            raise InputError(f"{self.root}: no document is left; an index has at least one")
        part_of, row_of = last_rows(parts, ids)
        if (part_of < 0).any():
            missing = [ids[i] for i in np.flatnonzero(part_of < 0)]
            raise ArtifactError(f"{self.root}: {len(missing)} documents are not in its vectors: {first(missing)}")
        used = [part for i, part in enumerate(parts) if (part_of == i).any()]
        refs = {name: ref for name, ref in self._refs(new).items() if name.partition("_")[0] != "vectors"}
        refs |= numbered("vectors", [part.ref() for part in used])
        table = joined(
            self.former.attributes,
            len(self.former),
            None if new is None else self._new_attributes(new),
            len(ids) - len(self._live_ids()),
        )
        if table is not None:
            alive = np.ones(table.num_rows, dtype=bool)
            alive[self._dead()] = False
            table = table.filter(pa.array(alive))
        with next_generation(self.root, action, self._plan(refs)) as draft:
            whole = len(used) == 1 and used[0].ids == ids
            vectors = used[0] if whole else gather_vectors(draft.work / "vectors", parts, part_of, row_of)
            write_index(self.engine, self.recipe, self._learned_from(vectors), draft, table)
            self._note_origin(draft)
        log.info("%s: built anew of %s documents", self.root, f"{len(ids):,}")

    def _learned_from(self, vectors: Vectors) -> Source:
        """What the index was learned from, with other document vectors."""
        from retrieval_kd.data.scores import Scores

        inputs = self.former.manifest.inputs
        scores = [Scores.load(self.former.locate(name)) for name in input_names(inputs, "scores")]
        queries = open_vectors(self.former.locate("queries")) if "queries" in inputs else None
        return Source(None, vectors, queries, scores)

    def _check_new(self, vectors: Vectors) -> None:
        """Raises unless the vectors are new documents by the index's model."""
        needed = self.former.manifest.inputs["model"]["fingerprint"]
        if vectors.model_ref.fingerprint != needed:
            raise ArtifactError(
                f"{vectors.path}: made by another model (fingerprint {vectors.model_ref.fingerprint[:12]}) than "
                f"{self.root} ({needed[:12]}); encode the new documents with the model of the index"
            )
        if not len(vectors):
            raise InputError(f"{vectors.path}: holds no vectors")
        dimension = self.former.manifest.details["dimension"]
        if vectors.dimension != dimension:
            raise ArtifactError(
                f"{vectors.path}: has {vectors.dimension} dimensions, {self.root} {dimension}; encode again"
            )
        rows = self._rows_of(vectors.ids)
        if len(rows):
            raise InputError(
                f"{self.root}: {len(rows)} of {len(vectors)} new documents are in it already: "
                f"{first(self.former.ids_of(rows[:4]))}; delete them first, or leave them out"
            )

    def _rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of those among ``ids`` that are in the index and not deleted."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.flatnonzero(np.asarray(pc.is_in(self.former.ids, value_set=pa.array(ids, pa.string()))))
        return rows if self.former.live is None else rows[self.former.live[rows]]

    def _all_vectors(self) -> list[Vectors]:
        """The vectors of every document, in the order they were added."""
        from retrieval_kd.data.vectors import Vectors

        found = []
        for name in input_names(self.former.manifest.inputs, "vectors"):
            try:
                found.append(Vectors.load(self.former.locate(name)))
            except ArtifactError as error:
                place = self.former.manifest.inputs[name].get("absolute", "nowhere")
                raise ArtifactError(
                    f"{self.root}: can be built anew only from all its vectors, and those that were at {place} are "
                    "gone or others; put them back, or build another index"
                ) from error
        return found

    def _live_ids(self) -> list[str]:
        import pyarrow as pa

        live = self.former.live
        ids: list[str] = (self.former.ids if live is None else self.former.ids.filter(pa.array(live))).to_pylist()
        return ids

    def _dead(self) -> np.ndarray:
        return np.flatnonzero([] if self.former.live is None else ~self.former.live)

    def _new_attributes(self, source: Source) -> Any:
        found = None
        if source.collection is not None and source.vectors is not None:
            found = attributes_of(source.collection, source.vectors.ids)
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

    def _refs(self, new: Source | None = None) -> dict[str, InputRef]:
        """The former inputs, and the vectors and collection of new documents: the last with an id is the one in use."""
        inputs = self.former.manifest.inputs
        refs = {name: recorded(self.former, name) for name in inputs}
        if new is None or new.vectors is None:
            return refs
        named = {kind: ref for kind, ref in inputs_of(new).items() if kind in ("vectors", "collection")}
        for kind, ref in named.items():
            names = input_names(inputs, kind)
            others = [refs.pop(name) for name in names]
            if kind == "vectors" or ref.fingerprint not in {other.fingerprint for other in others}:
                others = [*(other for other in others if other.fingerprint != ref.fingerprint), ref]
            refs |= numbered(kind, others)
        return refs

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


def _check_metric(first_segment: Index, added: Index, vectors: Vectors) -> None:
    """Raises `ArtifactError` where scores of the two could not be compared."""
    metrics = [segment.manifest.details.get("metric") for segment in (added, first_segment)]
    if metrics[0] != metrics[1]:
        raise ArtifactError(f"{vectors.path}: compares by {metrics[0]}, the index by {metrics[1]}; encode again")
