"""Running a learned sparse model (SPLADE, inference-free) over texts: the terms of each and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.encoder import Encoder

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder as SparseModel

_LEAST_TOKENS = 8
"""What a text counts at least in a batch's budget: a row of the whole vocabulary is made for the shortest too."""


class SparseVectors(NamedTuple):
    """Text i has the next ``lengths[i]`` of ``terms`` (int32, ascending) and ``weights`` (float32, none of them 0)."""

    lengths: np.ndarray
    terms: np.ndarray
    weights: np.ndarray
    tokens_lost: np.ndarray
    """int32 [n]: tokens that were cut off each text."""


class SparseEncoder(Encoder):
    """Any sentence-transformers ``SparseEncoder``, also one that reads queries another way than documents (Router)."""

    stock = "SparseEncoder"
    model: SparseModel

    def encode(self, texts: Sequence[str], task: str, batch_tokens: int) -> SparseVectors:
        """Sparse vectors of texts that are each a ``query`` or a ``document``.

        A batch, padded to its longest text, has at most ``batch_tokens`` tokens: the network makes a row of the
        whole vocabulary for each of them (30,522 float32 numbers are 0.12 MB), which memory must hold twice. Raises
        `RetrievalKDError` when a weight is not finite.
        """
        reader = self.readers[task]
        lengths = reader.lengths(texts)
        encode = self.model.encode_query if task == "query" else self.model.encode_document
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int32), np.empty(0, np.float32))] * len(texts)
        for batch in token_batches(np.maximum(reader.read(lengths), _LEAST_TOKENS).tolist(), batch_tokens):
            some = [texts[i] for i in batch]
            rows = encode(
                some,
                batch_size=len(some),
                show_progress_bar=False,
                convert_to_sparse_tensor=False,
                save_to_cpu=True,
            )
            dense = rows.float().numpy()
            self.refuse_bad(~np.isfinite(dense).all(axis=1), some, task)
            for i, row in zip(batch, dense, strict=True):
                terms = np.flatnonzero(row)
                found[i] = (terms.astype(np.int32), row[terms])
        return SparseVectors(
            np.array([len(terms) for terms, _ in found], dtype=np.int32),
            np.concatenate([terms for terms, _ in found]),
            np.concatenate([weights for _, weights in found]),
            reader.lost(lengths),
        )
