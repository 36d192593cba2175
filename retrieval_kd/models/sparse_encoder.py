"""Running a learned sparse model (SPLADE, inference-free) over texts: the terms of each and their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import InputError
from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.encoder import Encoder
from retrieval_kd.models.load import SETTINGS, ModelSource
from retrieval_kd.models.splade_pooling import pool_maxima_first
from retrieval_kd.models.vectors_of_texts import SparseVectors, strongest

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder as SparseModel

_LEAST_TOKENS = 8
"""What a text counts at least in a batch's budget: a row of the whole vocabulary is made for the shortest too."""


class SparseEncoder(Encoder):
    """Any sentence-transformers ``SparseEncoder``, also one that reads queries another way than documents (Router)."""

    stock = "SparseEncoder"
    layout = "sparse"
    comparisons = ("dot", "cosine")
    model: SparseModel

    def __init__(self, source: ModelSource, model: SparseModel) -> None:
        super().__init__(source, model)
        pool_maxima_first(model)

    @cached_property
    def vocabulary(self) -> list[str | None]:
        """The token of each term; None where a term is no token (an autoencoder's features, unused rows)."""
        from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

        # get_embedding_dimension() is the transformer's for a pooling that was never told the vocabulary's size.
        rows = self.encoding("document")(["a"], convert_to_sparse_tensor=False)
        tokens: list[str | None] = [None] * int(rows.shape[1])
        if not any(isinstance(module, SparseAutoEncoder) for module in self.model.modules()):
            for token, term in self.readers["document"].tokenizer.get_vocab().items():
                if term < len(tokens):
                    tokens[term] = token
        return tokens

    @cached_property
    def pruning(self) -> dict[str, dict[str, Any]]:
        """Task → what the model keeps of a text's terms (``threshold``, ``top_terms``), from its own settings."""
        settings = self.source.path / SETTINGS
        found = json.loads(settings.read_text(encoding="utf-8")).get("pruning") if settings.is_file() else None
        for task, limits in (found or {}).items():
            if task not in self.readers or set(limits) - {"threshold", "top_terms"}:
                raise InputError(
                    f"{settings}: pruning of '{task}' with {sorted(limits)}; "
                    "it has query and document, each with threshold and top_terms"
                )
        return found or {}

    def encode(self, texts: Sequence[str], task: str, batch_tokens: int = 4096) -> SparseVectors:
        """Sparse vectors of texts that are each a ``query`` or a ``document``, pruned as the model says.

        A batch, padded to its longest text, has at most ``batch_tokens`` tokens: the network makes a row of the
        whole vocabulary for each of them (30,522 float32 numbers are 0.12 MB), which memory must hold twice. Raises
        `RetrievalKDError` when a weight is not finite.
        """
        reader = self.readers[task]
        lengths = reader.lengths(texts)
        pruning = self.pruning.get(task)
        nothing = np.empty(0, np.int32), np.empty(0, np.float32)
        found: list[tuple[np.ndarray, np.ndarray]] = [nothing] * len(texts)
        for batch in token_batches(np.maximum(reader.read(lengths), _LEAST_TOKENS).tolist(), batch_tokens):
            some = [texts[i] for i in batch]
            dense = self.encoding(task)(some, convert_to_sparse_tensor=False, save_to_cpu=True).float().numpy()
            self.refuse_bad(~np.isfinite(dense).all(axis=1), some, task)
            for i, row in zip(batch, dense, strict=True):
                terms = np.flatnonzero(row).astype(np.int32)
                found[i] = strongest(terms, row[terms], **pruning) if pruning else (terms, row[terms])
        lost = reader.lost(lengths)
        self.count_lost(lost)
        return SparseVectors(
            np.array([len(terms) for terms, _ in found], dtype=np.int32),
            np.concatenate([nothing[0], *(terms for terms, _ in found)]),
            np.concatenate([nothing[1], *(weights for _, weights in found)]),
            lost,
        )
