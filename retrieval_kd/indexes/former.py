"""What an index is before an update: its documents, what they were read from, and whether new ones fit it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import ArtifactError, InputError, first
from retrieval_kd.indexes.base import Index, IndexRecipe, Source, arrow_ids, input_names
from retrieval_kd.indexes.inputs import inputs_of, numbered, open_collection, open_vectors, recorded
from retrieval_kd.registry import implementation

if TYPE_CHECKING:
    from retrieval_kd.data.vectors import Vectors


@dataclass(frozen=True)
class FormerIndex:
    """The generation ``former`` of the index at ``root``, opened without its engine."""

    root: Path
    former: Index

    @property
    def engine(self) -> type[Index]:
        """The class of its kind of index."""
        engine: type[Index] = implementation("indexes", self.former.recipe.kind)
        return engine

    @property
    def recipe(self) -> IndexRecipe:
        """The recipe it was built by."""
        return self.former.recipe

    def rows_of(self, ids: Any) -> np.ndarray:
        """The rows of those among ``ids`` that are in the index and not deleted."""
        import pyarrow.compute as pc

        rows = np.flatnonzero(np.asarray(pc.is_in(self.former.ids, value_set=arrow_ids(ids))))
        return rows if self.former.live is None else rows[self.former.live[rows]]

    @property
    def read_from(self) -> str:
        """The name of the inputs that every document is read from."""
        return "collection" if self.engine.takes == "text" else "vectors"

    @property
    def inputs_in_words(self) -> str:
        """The same in the plural."""
        return "collections" if self.read_from == "collection" else self.read_from

    def parts(self) -> list[Source]:
        """The vectors, or the collections, of every document in the order they were added."""
        found = []
        text = self.read_from == "collection"
        for name in input_names(self.former.manifest.inputs, self.read_from):
            try:
                place = self.former.locate(name)
                found.append(Source(open_collection(place)) if text else Source(vectors=open_vectors(place)))
            except ArtifactError as error:
                was = self.former.manifest.inputs[name].get("absolute", "nowhere")
                raise ArtifactError(
                    f"{self.root}: can be built anew only from all its {self.inputs_in_words}, and those that were at "
                    f"{was} are gone or others; put them back, or build another index"
                ) from error
        return found

    def live_ids(self) -> list[str]:
        """The ids of the documents that are not deleted, in the order of their rows."""
        import pyarrow as pa

        live = self.former.live
        ids: list[str] = (self.former.ids if live is None else self.former.ids.filter(pa.array(live))).to_pylist()
        return ids

    def dead(self) -> np.ndarray:
        """The rows [d] of deleted documents."""
        return np.flatnonzero([] if self.former.live is None else ~self.former.live)

    def with_teachers(self, source: Source) -> Source:
        """``source`` with the queries and scores that the index was learned from."""
        from retrieval_kd.data.scores import Scores

        inputs = self.former.manifest.inputs
        scores = [Scores.load(self.former.locate(name)) for name in input_names(inputs, "scores")]
        queries = open_vectors(self.former.locate("queries")) if "queries" in inputs else None
        return replace(source, queries=queries, scores=scores)

    def check_new(self, source: Source) -> None:
        """Raises `InputError` unless the documents are new, `ArtifactError` unless their vectors fit the index."""
        if source.vectors is not None:
            self._check_vectors(source.vectors)
        rows = self.rows_of(source.ids)
        if len(rows):
            raise InputError(
                f"{self.root}: {len(rows)} of {len(source.ids)} new documents are in it already: "
                f"{first(self.former.ids_of(rows[:4]))}; delete them first, or leave them out"
            )

    def _check_vectors(self, vectors: Vectors) -> None:
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

    def refs(self, new: Source | None = None) -> dict[str, InputRef]:
        """The former inputs, and the vectors and collection of new documents: the last with an id is the one in use."""
        inputs = self.former.manifest.inputs
        refs = {name: recorded(self.former, name) for name in inputs}
        if new is None:
            return refs
        named = {kind: ref for kind, ref in inputs_of(new).items() if kind in ("vectors", "collection")}
        for kind, ref in named.items():
            names = input_names(inputs, kind)
            others = [refs.pop(name) for name in names]
            if kind == self.read_from or ref.fingerprint not in {other.fingerprint for other in others}:
                others = [*(other for other in others if other.fingerprint != ref.fingerprint), ref]
            refs |= numbered(kind, others)
        return refs
