"""The index artifact: loading by kind, ids, and the one order of hits that every kind of index shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from retrieval_kd.artifact import Artifact, Draft, resolve
from retrieval_kd.errors import ArtifactError, DataError, UsageError
from retrieval_kd.recipe import Recipe, Section, validate
from retrieval_kd.registry import implementation

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors


class IndexRecipe(Recipe):
    """The base of the index recipes: ``search`` holds what can change after the build."""

    stage: ClassVar[str] = "indexes"

    search: Section = Section()


@dataclass(frozen=True)
class Source:
    """What an index is built from: vectors, or the collection of a text index."""

    collection: Collection | None = None
    vectors: Vectors | None = None


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
    takes: ClassVar[str] = ""
    """What a query is: ``text`` (a string), or the layout of its vectors: ``dense``, ``sparse``, ``multi-vector``."""

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True, search: Mapping[str, Any] | None = None) -> Self:
        """The index at ``path``, opened by its kind; ``search`` overrides the recipe's search parameters.

        Raises `ArtifactError` for something else than an index or a damaged one, `RecipeError` for a search
        parameter that the index does not have, `MissingExtraError` when its engine is not installed.
        """
        directory = resolve(Path(path))
        manifest = super().load(path, verify=verify).manifest
        engine = implementation("indexes", str(manifest.recipe.get("kind")))
        if not issubclass(engine, cls):
            raise ArtifactError(f"{path}: a {manifest.recipe.get('kind')} index; another kind is needed here")
        index: Self = engine(directory, manifest)
        recipe = validate(engine.Recipe, manifest.recipe, str(path))
        index.open(recipe, index.search_parameters(recipe, search or {}))
        return index

    @classmethod
    def build(cls, recipe: Any, source: Source, draft: Draft) -> None:
        """Writes the engine's native files and the rows' ids into ``draft``, and fills its details."""
        raise NotImplementedError

    @classmethod
    def estimate(cls, recipe: Any, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document and bytes besides, without building, for a text collection or vectors of a shape."""
        raise NotImplementedError

    def open(self, recipe: Any, search: Any) -> None:
        """Opens the native files with these search parameters."""
        raise NotImplementedError

    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] float32 and rows [Q, k] int64 in the fixed order; no hit is row -1 with score -inf.

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
        found: list[str] = self.ids.take(np.asarray(rows, dtype=np.int64)).to_pylist()
        return found

    @cached_property
    def rank(self) -> np.ndarray:
        """The position [n] int32 of each row when ids are sorted descending: equal scores are ordered by it."""
        return np.asarray(np.load(self.path / "rank.npy", mmap_mode="r"))

    def __len__(self) -> int:
        return int(self.manifest.counts["documents"])

    def problems(self) -> list[str]:
        """Broken invariants of the rows: counts that differ, ids that repeat, ranks that are no order."""
        found = []
        if len(self.ids) != len(self):
            found.append(f"{len(self)} documents but {len(self.ids)} ids")
        if self.ids.null_count or len(self.ids.unique()) != len(self.ids):
            found.append("ids are not unique")
        elif not np.array_equal(descending_rank(self.ids), self.rank):
            found.append("rank.npy is not the descending order of the ids")
        return found


def write_rows(folder: Path, ids: Any) -> int:
    """The number of rows, after writing their ids (``ids.arrow``) and tie order (``rank.npy``) to ``folder``.

    Raises `DataError` when an id repeats: its hits could not be told apart.
    """
    import pyarrow as pa

    from retrieval_kd.data.vector_writer import write_ids

    array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())
    if len(array.unique()) != len(array):
        raise DataError(f"{len(array) - len(array.unique())} document ids repeat; ids must be unique")
    write_ids(folder / "ids.arrow", array)
    np.save(folder / "rank.npy", descending_rank(array))
    return len(array)


def descending_rank(ids: Any) -> np.ndarray:
    """The position [n] int32 of each id in descending order (Arrow sorts by UTF-8 bytes: the order of Python's str)."""
    import pyarrow.compute as pc

    order = pc.array_sort_indices(ids, order="descending").to_numpy()
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank


def ordered(scores: np.ndarray, rows: np.ndarray, rank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best ``k`` of one query's candidates, score descending then id descending, padded with -inf and -1."""
    best = np.lexsort((rank[rows], -scores))[:k]
    top_scores = np.full(k, -np.inf, dtype=np.float32)
    top_rows = np.full(k, -1, dtype=np.int64)
    top_scores[: len(best)] = scores[best]
    top_rows[: len(best)] = rows[best]
    return top_scores, top_rows


def best_positive(scores: np.ndarray, rank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best ``k`` of one query's scores [documents], those above 0 only, as `ordered` gives them."""
    found = np.flatnonzero(scores > 0)
    if len(found) > k:
        positive = scores[found]
        boundary = np.partition(positive, len(positive) - k)[len(positive) - k]
        found = found[positive >= boundary]  # a tie at the k-th hit is whole before it is ordered
    return ordered(scores[found], found, rank, k)


def check_k(k: int) -> None:
    """Raises `UsageError` unless ``k`` is a positive number of hits."""
    if k < 1:
        raise UsageError(f"k is the number of hits wanted and at least 1 (got {k})")
