"""The index artifact: loading by kind, ids, and the one order of hits that every kind of index shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import Artifact, published_path
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.plan import Draft
from retrieval_kd.recipe import Recipe, Section, validate
from retrieval_kd.registry import implementation

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.scores import Scores
    from retrieval_kd.data.vectors import Vectors

SEGMENTS = "segments"
"""In the details of an index of several pieces: the folders that hold them, in the order of their rows."""
DELETED = "deleted.npy"
"""The rows [d] int64 of documents that were deleted; no file when none were."""
_STEP = 65536
"""Ids that are compared at a time."""
UPDATED_FROM = "updated_from"
"""In the details of an index that was changed: the generation and fingerprint that it was before."""


class IndexRecipe(Recipe):
    """The base of the index recipes: ``search`` holds what can change after the build."""

    stage: ClassVar[str] = "indexes"

    shards: int = Field(default=1, ge=1)
    """Pieces of equal numbers of documents, built one after the other and searched as one."""
    search: Section = Section()


@dataclass(frozen=True)
class Source:
    """What an index is built from: vectors, or the collection of a text index; a learned one, what it learns from."""

    collection: Collection | None = None
    vectors: Vectors | None = None
    queries: Vectors | None = None
    scores: Sequence[Scores] = ()
    whole: Source | None = None
    """The source of the whole index where this is that of one shard."""

    @property
    def rows(self) -> Vectors | Collection:
        """The artifact with a row for each document of the index: vectors, or the collection of a text index."""
        found = self.collection if self.vectors is None else self.vectors
        assert found is not None, "an index is built from vectors or a collection"
        return found

    @property
    def ids(self) -> Any:
        """The documents' ids: an Arrow array of strings."""
        if self.vectors is not None:
            return self.vectors.arrow_ids
        return None if self.collection is None else self.collection.documents.ids

    @property
    def training(self) -> Vectors | None:
        """The vectors that centroids and codebooks are trained on."""
        return self.vectors if self.whole is None else self.whole.vectors

    def shard(self, start: int, stop: int) -> Source:
        """The documents ``start`` to ``stop``."""
        if self.vectors is None:
            from retrieval_kd.data.collection_rows import CollectionRows

            assert self.collection is not None
            return replace(self, collection=CollectionRows.of_range(self.collection, start, stop), whole=self)
        from retrieval_kd.data.vector_rows import VectorRange

        return replace(self, collection=None, vectors=VectorRange(self.vectors, start, stop), whole=self)


class Shape(NamedTuple):
    """What vectors are like before an index is built of them: how long, and the mean entries of one.

    An entry is a term of a sparse vector, a token of a text, or the one vector of a dense layout.
    """

    dimension: int
    entries: float = 1.0
    bytes_per_number: int = 4


class Index(Artifact):
    """A searchable index on disk. Each engine is a subclass; `Index.load` finds the one that the recipe names."""

    kind = "index"

    Recipe: ClassVar[type[IndexRecipe]] = IndexRecipe
    takes: str = ""
    """What a query is: ``text`` (a string), or the layout of its vectors: ``dense``, ``sparse``, ``multi-vector``."""
    learns_from: ClassVar[frozenset[str]] = frozenset()
    """What a build may be given beside vectors: ``queries`` (their vectors) and ``scores`` (score files)."""
    growable: ClassVar[bool] = True
    """Whether documents can be added, because no score depends on the others, or what depends on them is kept up."""
    deterministic: ClassVar[bool] = True
    """Whether two builds of the same give the same bytes."""
    resumable: ClassVar[bool] = False
    """Whether a build that was killed goes on from what it left in the draft."""

    recipe: IndexRecipe

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True, search: Mapping[str, Any] | None = None) -> Self:
        """The index at ``path``, opened by its kind; ``search`` overrides the recipe's search parameters.

        Raises `ArtifactError` for something else than an index or a damaged one, `RecipeError` for a search
        parameter that the index does not have, `MissingExtraError` when its engine is not installed.
        """
        found = super().load(path, verify=verify)
        directory, manifest = found.path, found.manifest
        engine = implementation("indexes", str(manifest.recipe.get("kind")))
        if not issubclass(engine, cls):
            raise ArtifactError(f"{path}: a {manifest.recipe.get('kind')} index; another kind is needed here")
        index: Any = engine(directory, manifest)
        if SEGMENTS in manifest.details:
            from retrieval_kd.indexes.segments import Segments

            index = Segments(directory, manifest, engine)
        index.recipe = validate(engine.Recipe, manifest.recipe, str(path))
        given = engine.search_overrides(directory, search or {})
        index.open(index.recipe, index.search_parameters(index.recipe, given))
        # Opened now: an update may take this generation away while it is read.
        _ = index.ids, index.rank, index.attributes, index.live
        opened: Self = index
        return opened

    @classmethod
    def without_engine(cls, path: str | Path, *, verify: bool = True) -> Index:
        """The index at ``path`` with its ids, attributes and deletions, which cannot be searched and takes no memory.

        Raises as `load`.
        """
        found = super().load(path, verify=verify)
        index = Index(found.path, found.manifest)
        engine = implementation("indexes", str(index.manifest.recipe.get("kind")))
        index.recipe = validate(engine.Recipe, index.manifest.recipe, str(path))
        return index

    @classmethod
    def build(cls, recipe: Any, source: Source, draft: Draft) -> None:
        """Writes the engine's native files and the rows' ids into ``draft``, and fills its details."""
        raise NotImplementedError

    def grow(self, source: Source, draft: Draft) -> None:
        """Writes an index of ``source`` into ``draft`` with what this one has learned: scores of both can be compared.

        Here nothing is learned, and it is a build with the same recipe.
        """
        type(self).build(self.recipe, source, draft)

    @classmethod
    def join(cls, segments: Sequence[Any], whole: Index) -> Index | None:
        """What searches all opened segments of ``whole`` at once; here None: each is searched, and the hits merged."""
        return None

    @classmethod
    def estimate(cls, recipe: Any, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document and bytes besides, without building, for a text collection or vectors of a shape."""
        raise NotImplementedError

    def open(self, recipe: Any, search: Any) -> None:
        """Opens the native files with these search parameters."""
        raise NotImplementedError

    def search(self, queries: Any, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] float32 and rows [Q, k] int64 in the fixed order; no hit is row -1 with score -inf.

        ``allowed`` [n] bool are the rows that may be hits (None: all): the hits are those that a search for all rows
        would give, without the others.

        ``queries`` are strings for ``takes == "text"``, a float32 array [Q, d] for ``dense``, a
        ``scipy.sparse.csr_array`` [Q, terms] for ``sparse`` and a list of float32 arrays [tokens, d] for
        ``multi-vector``. Safe to call from several threads at once.
        """
        raise NotImplementedError

    @property
    def exact(self) -> bool:
        """Whether the hits are the true best k by the index's own score."""
        return False

    @property
    def search_values(self) -> dict[str, Any]:
        """The search parameters in force, by name."""
        return self._search_values

    @classmethod
    def search_overrides(cls, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
        """The ``given`` search parameters of the generation at ``path``, where an engine has a name for several."""
        return dict(given)

    def search_parameters(self, recipe: IndexRecipe, overrides: Mapping[str, Any]) -> Section:
        """The recipe's search section with ``overrides``; `RecipeError` for an unknown name or a bad value."""
        merged = {**recipe.search.model_dump(exclude_none=True), **overrides}
        section = validate(type(recipe), {**recipe.resolved(), "search": merged}, str(self.path)).search
        self._search_values: dict[str, Any] = section.model_dump(exclude_none=True)
        return section

    @cached_property
    def ids(self) -> Any:
        """The document id of each row: an Arrow array of strings, memory-mapped."""
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self.path / "ids.arrow"))).read_all()["id"]

    def ids_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The document ids of ``rows`` (none may be -1)."""
        rows = np.asarray(rows, dtype=np.int64)
        if self.ids.num_chunks == 1:
            found: list[str] = self.ids.chunk(0).take(rows).to_pylist()
            return found
        # Of several chunks Arrow makes one first: a copy of all ids.
        ids, start = np.empty(len(rows), dtype=object), 0
        for chunk in self.ids.chunks:
            here = (rows >= start) & (rows < start + len(chunk))
            ids[here] = chunk.take(rows[here] - start).to_pylist()
            start += len(chunk)
        return list(ids)

    @cached_property
    def rank(self) -> np.ndarray:
        """The position [n] int32 of each row when ids are sorted descending: equal scores are ordered by it."""
        return np.asarray(np.load(self.path / "rank.npy", mmap_mode="r"))

    @cached_property
    def attributes(self) -> Any:
        """The attributes of each row's document: an Arrow table, memory-mapped; None when there are none."""
        from retrieval_kd.indexes.attributes import ATTRIBUTES, read_attributes

        return read_attributes(self.path / ATTRIBUTES)

    def matching(self, filters: Sequence[str]) -> np.ndarray | None:
        """Whether each row [n] fulfils every filter (``year >= 2020``, ``lang in en,de``); None without filters.

        Raises `UsageError` for an attribute that there is not, or a value that it cannot have.
        """
        from retrieval_kd.indexes.attributes import matching

        return matching(self.attributes, filters, str(published_path(self.path))) if filters else None

    @cached_property
    def live(self) -> np.ndarray | None:
        """Whether each row [n] is a document that is not deleted; None when all are."""
        if not (self.path / DELETED).is_file():
            return None
        live = np.ones(len(self), dtype=bool)
        live[np.load(self.path / DELETED)] = False
        return live

    def __len__(self) -> int:
        """The number of rows, those of deleted documents among them."""
        return int(self.manifest.counts["documents"]) + int(self.manifest.counts.get("deleted", 0))

    def problems(self) -> list[str]:
        """Broken invariants of the rows: counts that differ, ids that repeat, ranks that are no order."""
        import pyarrow as pa

        found = []
        if len(self.ids) != len(self):
            return [f"{len(self)} documents but {len(self.ids)} ids"]
        if self.attributes is not None and self.attributes.num_rows != len(self):
            found.append(f"{len(self)} documents but attributes of {self.attributes.num_rows}")
        ids = self.ids if self.live is None else self.ids.filter(pa.array(self.live))
        if ids.null_count or len(ids.unique()) != len(ids):
            found.append("ids are not unique")
        elif not np.array_equal(descending_rank(self.ids), self.rank):
            found.append("rank.npy is not the descending order of the ids")
        return found


def input_names(inputs: Mapping[str, Any], kind: str) -> list[str]:
    """The inputs ``kind``, ``kind_2``, … of a manifest, in this order: later ones came with updates."""
    names = [name for name in inputs if name == kind or name.startswith(f"{kind}_")]
    return sorted(names, key=lambda name: 1 if name == kind else int(name.rpartition("_")[2]))


def arrow_ids(ids: Any) -> Any:
    """Ids (a list, or Arrow's strings) as Arrow's strings."""
    import pyarrow as pa

    return ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())


def write_rows(folder: Path, ids: Any, *, unique: bool = True) -> int:
    """The number of rows, after writing their ids (``ids.arrow``) and tie order (``rank.npy``) to ``folder``.

    Raises `DataError` when an id repeats: its hits could not be told apart (unless only one of them is alive).
    """

    from retrieval_kd.data.vector_writer import write_ids

    array = arrow_ids(ids)
    order = _descending(array)
    repeated = _repeated(array, order) if unique else 0
    if repeated:
        raise DataError(f"{repeated} document ids repeat; ids must be unique")
    write_ids(folder / "ids.arrow", array)
    np.save(folder / "rank.npy", _rank_of(order))
    return len(array)


def descending_rank(ids: Any) -> np.ndarray:
    """The position [n] int32 of each id in descending order."""
    return _rank_of(_descending(ids))


def _descending(ids: Any) -> np.ndarray:
    """The rows [n] by their ids, descending (Arrow sorts by UTF-8 bytes: the order of Python's str)."""
    import pyarrow.compute as pc

    order: np.ndarray = pc.array_sort_indices(ids, order="descending").to_numpy()
    return order


def _rank_of(order: np.ndarray) -> np.ndarray:
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank


def _repeated(ids: Any, order: np.ndarray) -> int:
    """How many ids equal the one before them in ``order``; compared in blocks, as a set of all would be large."""
    import pyarrow as pa
    import pyarrow.compute as pc

    whole = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) and ids.num_chunks > 1 else ids
    found = 0
    for start in range(0, len(order) - 1, _STEP):
        block = whole.take(pa.array(order[start : start + _STEP + 1]))
        found += pc.sum(pc.equal(block[1:], block[:-1]), min_count=0).as_py()
    return found
