"""Late interaction over a FAISS index of tokens: candidates and their MaxSim, or retrieved tokens alone (XTR)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.errors import UsageError
from retrieval_kd.indexes import faiss_build
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Index, IndexRecipe, Shape, Source, write_rows
from retrieval_kd.indexes.distill_vq.recipe import DistillVQRecipe, Training
from retrieval_kd.indexes.faiss_device import DEVICE, CagraGraph, builder, placement, to_cpu, to_gpus
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.indexes.faiss_search import NativeSearch
from retrieval_kd.indexes.hits import no_hits, ordered
from retrieval_kd.indexes.late_interaction_scoring import (
    Read,
    best_and_ties,
    best_by_maxsim,
    check_queries,
    retrieved_sums,
)
from retrieval_kd.indexes.late_interaction_tokens import Tokens
from retrieval_kd.indexes.stored_vectors import Precision, StoredVectors, StoredVectorsWriter, stored_bytes
from retrieval_kd.plan import Draft
from retrieval_kd.recipe import Section

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

NATIVE = "index.faiss"
OFFSETS = "offsets.npy"
DOCUMENTS = "documents.npy"
_RETRIEVED = 4_194_304
"""Retrieved tokens of a group of queries that memory holds at a time."""


class LateInteractionSearch(Section):
    """What can change after the build; null leaves FAISS's own value."""

    token_candidates: int = Field(default=1024, ge=1)
    """Tokens that each token of a query retrieves."""
    candidates: int | None = Field(default=None, ge=1)
    """``gather``: documents (k at least) whose tokens are read; null: 256, or four times k where that is more."""
    nprobe: int | None = Field(default=None, ge=1)
    ef_search: int | None = Field(default=None, ge=1)
    quantizer_ef_search: int | None = Field(default=None, ge=1)
    k_factor: float | None = Field(default=None, ge=1)
    device: str | None = Field(default=None, pattern=DEVICE)
    """Where tokens are retrieved: ``cpu`` (null), ``cuda:N``, ``all`` GPUs, or ``auto``."""

    def of_faiss(self) -> dict[str, Any]:
        """FAISS's own parameters among them that are set, by our names."""
        return {name: value for name in structure.PARAMETERS if (value := getattr(self, name)) is not None}


class LateInteractionRecipe(IndexRecipe):
    """A FAISS factory string for the tokens, how it is trained, and how documents are scored."""

    kind: Literal["late-interaction"]
    factory: str = Field(min_length=1)
    scoring: Literal["gather", "xtr"] = "gather"
    """``gather`` reads the candidates' tokens and computes MaxSim; ``xtr`` sums what was retrieved and reads none."""
    store: Precision | Literal["codes"] | None = None
    """``gather``: how the tokens that it reads are kept; null: float16. ``codes``: as they are in the token index."""
    train_sample: int = Field(default=262144, ge=1)
    """At most so many tokens, drawn with ``seed``, train centroids and codebooks."""
    seed: int = Field(default=1234, ge=0, lt=2**31)
    threads: int | None = Field(default=None, ge=1)
    """Threads of the build; null: all, but one for a graph, whose links depend on the order threads come in."""
    device: str = Field(default="cpu", pattern=DEVICE)
    """Where the token index is trained and filled: ``cpu``, ``cuda:N``, or ``auto`` (a GPU where there is one)."""
    distill_vq: Training | None = None
    """The keys of Distill-VQ's training, which then learns the codes of ``factory`` from tokens of queries; or null."""
    search: LateInteractionSearch = LateInteractionSearch()

    @model_validator(mode="after")
    def _reads_tokens(self) -> Self:
        if self.distill_vq is not None and self.distill_vq.query_learning_rate not in ("auto", 0):
            raise ValueError("distill_vq.query_learning_rate: the tokens of queries have no map; leave it out")
        if self.scoring == "xtr" and (self.store is not None or self.search.candidates is not None):
            raise ValueError("scoring 'xtr' reads no stored tokens; leave out store and search.candidates")
        return self

    @property
    def precision(self) -> Precision | None:
        """How tokens are stored beside the token index; None when they are not."""
        if self.scoring == "xtr" or self.store == "codes":
            return None
        return self.store or "float16"


class LateInteractionIndex(Index):
    """Late interaction, approximate: the tokens nearest to each token of a query choose the documents.

    ``gather`` (after Santhanam et al., PLAID, 2022): documents are ranked by the tokens that were retrieved, and the
    best of them by exact MaxSim over their stored tokens. ``xtr`` (Lee et al., XTR, 2023) stops before that.
    ``meanmaxsim`` divides by the query's tokens. A document without tokens is no hit.
    """

    Recipe = LateInteractionRecipe
    takes = "multi-vector"
    learns_from: ClassVar[frozenset[str]] = frozenset({"queries"})
    recipe: LateInteractionRecipe

    @classmethod
    def build(cls, recipe: LateInteractionRecipe, source: Source, draft: Draft) -> None:
        """Trains on a seeded sample of tokens, adds all in batches, and stores them as the recipe says.

        The same recipe and vectors give the same bytes. Raises `RecipeError` for a factory string or parameter that
        does not fit, `InputError` for too few tokens or for NaN and infinite values.
        """
        tokens = Tokens.of_documents(source.vectors)
        if recipe.distill_vq is not None:
            index = _distilled(recipe, tokens, source, draft)
            _write(index, tokens, recipe, draft, filled=True)
            return
        if source.queries is not None:
            raise UsageError("queries teach nothing here: give the recipe distill_vq: {}, or leave them out")
        index = structure.new_index(recipe.factory, tokens.dimension)
        structure.set_parameters(index, recipe.factory, recipe.search.of_faiss())
        structure.prepare_training(index, recipe.seed)
        with _threads(index, recipe), faiss_build.faiss_errors(tokens.path):
            gpu = builder(index, recipe.factory, placement(recipe.device))
            training = Tokens.of_documents(source.training)
            sample = {"sample": recipe.train_sample, "seed": recipe.seed}
            faiss_build.train(index, training, recipe.factory, draft.work, **sample, cosine=False, gpu=gpu)
            _write(index, tokens, recipe, draft, gpu=gpu)

    def grow(self, source: Source, draft: Draft) -> None:
        """Writes an index of ``source`` with this one's centroids and codebooks."""
        tokens = Tokens.of_documents(source.vectors)
        index = import_faiss().read_index(str(self.path / NATIVE))
        index.reset()
        with _threads(index, self.recipe), faiss_build.faiss_errors(tokens.path):
            _write(index, tokens, self.recipe, draft)

    @classmethod
    def estimate(cls, recipe: LateInteractionRecipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document (each token's code, stored copy and document) and those of centroids and codebooks."""
        if not isinstance(source, Shape):
            raise UsageError("a late-interaction index is built from vectors")
        index = structure.new_index(recipe.factory, source.dimension)
        structure.set_parameters(index, recipe.factory, recipe.search.of_faiss())
        token = structure.bytes_per_vector(index) + 4
        if recipe.precision is not None:
            token += stored_bytes(source.dimension, recipe.precision)
        return token * source.entries + 8, structure.fixed_bytes(index)

    def open(self, recipe: LateInteractionRecipe, search: LateInteractionSearch) -> None:
        """Reads the token index into memory and memory-maps the rest.

        ``codes`` in inverted lists are found through a table that FAISS makes now: 8 bytes a token, in memory.
        """
        self._index = import_faiss().read_index(str(self.path / NATIVE))
        structure.set_parameters(self._index, recipe.factory, search.of_faiss())
        self._parameters = search
        self._offsets: np.ndarray = np.load(self.path / OFFSETS, mmap_mode="r")
        self._documents: np.ndarray = np.load(self.path / DOCUMENTS, mmap_mode="r")
        self._stored = StoredVectors.open(self.path)
        self._read: Read | None = self._stored.of if self._stored is not None else None
        if recipe.scoring == "gather" and recipe.store == "codes":
            structure.prepare_decoding(self._index)
            self._read = self._index.reconstruct_batch
        where = placement(search.device or "cpu")
        copy = to_gpus(self._index, where, float16=self._read is not None) if where.gpus else None
        self._native = NativeSearch(self._index, copy)
        self._mean = self.manifest.details["metric"] == "meanmaxsim"

    @property
    def dimension(self) -> int:
        """The length of a token's vector."""
        return int(self._index.d)

    def search(
        self, queries: Sequence[np.ndarray], k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of queries that are float32 arrays [tokens, d] each.

        ``gather`` gives the MaxSim of an exact index of the stored tokens, to the last bit; where no more documents
        may be hits than are candidates, all of them are compared. ``xtr`` adds up scores as FAISS computes them.
        With ``allowed``, only tokens of these documents are retrieved. A query without tokens has no hit. Raises
        `UsageError` for queries of another dimension or with NaN or infinite values.
        """
        check_queries(queries, self.dimension)
        scores, rows = no_hits(len(queries), len(self), k, allowed)
        for place, found, sums in self._found(queries, k, allowed):
            query = queries[place]
            if self._read is not None:
                found, sums = best_by_maxsim(query, found, self._offsets, self._read, k)
            final = np.asarray(sums / len(query) if self._mean else sums, dtype=np.float32)
            scores[place], rows[place] = ordered(final, found, self.rank, k)
        return scores, rows

    def _found(
        self, queries: Sequence[np.ndarray], k: int, allowed: np.ndarray | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each query with tokens: its place, and documents with their sums by retrieved tokens (gather: unused)."""
        asked = [place for place, query in enumerate(queries) if len(query)]
        candidates = max(k, self._parameters.candidates or max(256, 4 * k))
        few = None if self._read is None else self._documents_if_few(candidates, allowed)
        if few is not None:
            yield from ((place, few, np.zeros(len(few))) for place in asked)
            return
        tokens_allowed = None if allowed is None else allowed[self._documents]
        there = self._index.ntotal if tokens_allowed is None else int(np.count_nonzero(tokens_allowed))
        number = min(self._parameters.token_candidates, there)
        if not number:
            return
        # What FAISS cannot filter is fetched and left out: as many times more as there are tokens for an allowed one.
        most = _RETRIEVED * there // (self._index.ntotal * number)
        for group in _groups(asked, [len(query) for query in queries], most):
            stacked = np.ascontiguousarray(np.concatenate([queries[place] for place in group]), dtype=np.float32)
            similarities, numbers = self._native.best(stacked, number, tokens_allowed)
            owners = np.where(numbers >= 0, self._documents[numbers], -1).astype(np.int64)
            begin = 0
            for place in group:
                part = slice(begin, begin + len(queries[place]))
                begin = part.stop
                found, sums = retrieved_sums(similarities[part], owners[part])
                best = slice(None) if self._read is None else best_and_ties(sums, candidates)
                yield place, found[best], sums[best]

    def _documents_if_few(self, candidates: int, allowed: np.ndarray | None) -> np.ndarray | None:
        """All documents that may be hits, when no more than ``candidates`` may be."""
        if allowed is None and len(self) - self.manifest.counts["documents_without_tokens"] > candidates:
            return None
        with_tokens = np.diff(self._offsets) > 0
        rows = np.flatnonzero(with_tokens if allowed is None else with_tokens & allowed)
        return rows if len(rows) <= candidates else None

    def problems(self) -> list[str]:
        """Broken rows, or tokens in FAISS, of the documents and in the store that do not fit together."""
        found = super().problems()
        tokens, offsets = self._index.ntotal, self._offsets
        whole = len(offsets) == len(self) + 1 and offsets[0] == 0 and offsets[-1] == tokens
        if not whole or (np.diff(offsets) < 0).any():
            found.append(f"{OFFSETS} does not divide {tokens} tokens into {len(self)} documents")
        elif not np.array_equal(self._documents, np.repeat(np.arange(len(self)), np.diff(offsets))):
            found.append(f"{DOCUMENTS} names other documents than {OFFSETS}")
        if self._stored is not None and len(self._stored) != tokens:
            found.append(f"FAISS has {tokens} tokens but {len(self._stored)} are stored")
        return found


def _distilled(recipe: LateInteractionRecipe, tokens: Tokens, source: Source, draft: Draft) -> Any:
    """A FAISS index of all tokens, whose codes Distill-VQ learned: a token of a query is a query there."""
    from retrieval_kd.indexes.distill_vq.engine import DistillVQIndex

    keys = recipe.model_dump(include={"factory", "train_sample", "seed", "threads", "device"})
    assert recipe.distill_vq is not None
    # tokens that are added later are coded by FAISS's own `add`, which a map of queries would mislead
    training = recipe.distill_vq.model_copy(update={"query_learning_rate": 0.0})
    given = DistillVQRecipe(kind="distill-vq", **keys, training=training)
    inner = Draft(draft.work / "distill-vq", resumed=False)
    inner.path.mkdir()
    queries = None if source.queries is None else Tokens(source.queries)
    whole = None if source.whole is None else Source(vectors=Tokens.of_documents(source.training))
    DistillVQIndex.build(given, Source(vectors=tokens, queries=queries, whole=whole), inner)
    draft.counts.update({name: number for name, number in inner.counts.items() if name != "documents"})
    draft.details["distill_vq"] = inner.details
    index = import_faiss().read_index(str(inner.path / NATIVE))
    structure.set_parameters(index, recipe.factory, recipe.search.of_faiss())
    return index


def _write(
    index: Any,
    tokens: Tokens,
    recipe: LateInteractionRecipe,
    draft: Draft,
    *,
    gpu: Any | None = None,
    filled: bool = False,
) -> None:
    """Adds all tokens to a trained index (or its ``gpu`` copy), if it is not ``filled``, and writes every file."""
    documents = tokens.texts
    store = None
    if recipe.precision is not None:
        store = StoredVectorsWriter(draft.path, (len(tokens), tokens.dimension), recipe.precision)
    at_once = structure.adds_at_once(index) or isinstance(gpu, CagraGraph)
    target = index if gpu is None else gpu
    if not filled:
        faiss_build.add(target, tokens, cosine=False, at_once=at_once, store=store)
    elif store is not None:
        for start in range(0, len(tokens), faiss_build.BATCH):
            store.write(start, np.asarray(tokens.matrix[start : start + faiss_build.BATCH], dtype=np.float32))
    if store is not None:
        draft.details["store_error"] = store.close()
    import_faiss().write_index(index if gpu is None else to_cpu(gpu), str(draft.path / NATIVE))
    np.save(draft.path / OFFSETS, documents.multi_vector.offsets)
    np.save(draft.path / DOCUMENTS, np.repeat(np.arange(len(documents), dtype=np.int32), documents.lengths))
    draft.counts["documents"] = write_rows(draft.path, documents.arrow_ids)
    draft.counts["tokens"] = len(tokens)
    draft.counts["documents_without_tokens"] = int(np.count_nonzero(documents.lengths == 0))
    draft.details.update(metric=documents.similarity, dimension=documents.dimension)


def _threads(index: Any, recipe: LateInteractionRecipe) -> Any:
    return faiss_build.threads(recipe.threads or (1 if structure.is_graph(index) else None))


def _groups(places: Sequence[int], tokens: Sequence[int], most: int) -> Iterator[list[int]]:
    """Queries whose tokens are searched together: at most ``most`` tokens, or one query."""
    group: list[int] = []
    for place in places:
        if group and sum(tokens[i] for i in group) + tokens[place] > most:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
