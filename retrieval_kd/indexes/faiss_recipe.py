"""The recipe of a FAISS index: how it is built, and what can change when it is searched."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from retrieval_kd.indexes.base import IndexRecipe
from retrieval_kd.indexes.faiss_device import DEVICE, Sharing
from retrieval_kd.indexes.faiss_structure import PARAMETERS
from retrieval_kd.indexes.stored_vectors import Precision
from retrieval_kd.recipe import Section


class FaissSearch(Section):
    """What can change after the build; null leaves FAISS's own value."""

    nprobe: int | None = Field(default=None, ge=1)
    ef_search: int | None = Field(default=None, ge=1)
    quantizer_ef_search: int | None = Field(default=None, ge=1)
    k_factor: float | None = Field(default=None, ge=1)
    candidates: int | None = Field(default=None, ge=1)
    """With ``rerank``: so many of FAISS's best hits (k when that is more) are scored again; null: 100."""
    memory_map: bool | None = None
    """Read what a search touches, when it does, instead of the whole file at the start."""
    device: str | None = Field(default=None, pattern=DEVICE)
    """``cpu`` (null), ``cuda:N``, ``all`` GPUs, or ``auto``: a GPU pays for many queries at once."""
    shard: Sharing | None = None
    """What several GPUs hold: the whole index each (null: ``replicated``) or a part of it (``sharded``)."""
    tuned: bool | None = None
    """Of a search alone: start from what `tune_index` found for this index; others that are given go before it."""

    def of_faiss(self) -> dict[str, Any]:
        """FAISS's own parameters among them that are set, by our names."""
        return {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None}


class Rerank(Section):
    """Exact re-ranking: the vectors are stored on disk and the best candidates are scored with them."""

    store: Precision = "float16"
    """``float16``, ``int8`` with a scale a vector, or ``float32``: what was encoded."""


class FaissRecipe(IndexRecipe):
    """A FAISS factory string, how it is trained, and its search parameters."""

    kind: Literal["faiss"]
    factory: str = Field(min_length=1)
    metric: Literal["auto", "inner_product", "cosine"] = "auto"
    """``auto``: the vectors' own similarity. ``cosine`` normalises documents when added and queries when searched."""
    train_sample: int = Field(default=262144, ge=1)
    """At most so many documents, drawn with ``seed``, train centroids and codebooks."""
    seed: int = Field(default=1234, ge=0, lt=2**31)
    ef_construction: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """Threads of the build; null: all, but one for a graph, whose links depend on the order threads come in."""
    device: str = Field(default="cpu", pattern=DEVICE)
    """Where it is trained and filled: ``cpu``, ``cuda:N``, or ``auto`` (a GPU where there is one)."""
    rerank: Rerank | None = None
    search: FaissSearch = FaissSearch()

    @model_validator(mode="after")
    def _check_keys_together(self) -> FaissRecipe:
        if self.search.tuned:
            raise ValueError("search.tuned is no key of a recipe: tune the index, then search with --set tuned=true")
        if self.rerank is None and self.search.candidates is not None:
            raise ValueError("search.candidates needs rerank: {store: float16}, vectors to score them with")
        if self.rerank is not None and self.factory == "Flat":
            raise ValueError("factory 'Flat' compares whole vectors already; leave out rerank")
        return self
