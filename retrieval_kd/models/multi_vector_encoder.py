"""Running a late-interaction model (ColBERT) over texts: a vector for each token, and the MaxSim of two texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.encoder import Encoder
from retrieval_kd.models.vectors_of_texts import MultiVectors

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder as MultiVectorModel

_ELEMENTS = 25_000_000
"""Numbers that the comparison of many pairs may hold at a time (100 MB)."""


class TokenVectors(NamedTuple):
    """A batch: the matrix of text ``places[i]`` is ``matrices[i]``, float32 [tokens, d] on the model's device."""

    places: np.ndarray
    matrices: list[Any]


class MultiVectorEncoder(Encoder):
    """Any sentence-transformers ``MultiVectorEncoder``, with its own prompts, query expansion, masks and skip list."""

    stock = "MultiVectorEncoder"
    layout = "multi-vector"
    comparisons = ("maxsim", "meanmaxsim")
    model: MultiVectorModel

    def batches(
        self, texts: Sequence[str], task: str, lengths: np.ndarray, batch_tokens: int
    ) -> Iterator[TokenVectors]:
        """Token vectors of texts, each a ``query`` or a ``document``, in batches of at most ``batch_tokens`` tokens.

        ``lengths`` are those of the task's reader. Vectors of half-precision weights come as float32 too.
        """
        for batch in token_batches(self.readers[task].read(lengths).tolist(), batch_tokens):
            matrices = self.encoding(task)([texts[i] for i in batch])
            yield TokenVectors(batch, [matrix.float() for matrix in matrices])

    def encode(self, texts: Sequence[str], task: str) -> MultiVectors:
        """Token vectors of texts that are each a ``query`` or a ``document``; a text may have none.

        Raises `RetrievalKDError` when a number is not finite.
        """
        reader = self.readers[task]
        lengths = reader.lengths(texts)
        found = [np.empty((0, 0), np.float32)] * len(texts)
        for places, matrices in self.batches(texts, task, lengths, self.batch_tokens):
            for place, matrix in zip(places, matrices, strict=True):
                found[place] = matrix.cpu().numpy()
        self.refuse_bad(np.array([not np.isfinite(matrix).all() for matrix in found], dtype=bool), texts, task)
        lost = reader.lost(lengths)
        self.count_lost(lost)
        width = max((matrix.shape[1] for matrix in found), default=0)
        return MultiVectors(
            np.array([len(matrix) for matrix in found], dtype=np.int32),
            np.concatenate([matrix.reshape(-1, width) for matrix in found] or [np.empty((0, 0), np.float32)]),
            lost,
        )

    def similarities(self, queries: Sequence[Any], documents: Sequence[Any]) -> np.ndarray:
        """The model's similarity [n] float32 of query i and document i, both matrices of `batches`.

        MaxSim is the sum over query tokens of the greatest dot product with a document token (Khattab and Zaharia,
        ColBERT, 2020); a model may say that it takes the mean (``meanmaxsim``).
        """
        scores = self.model.similarity_pairwise(list(queries), list(documents), chunk_elements=_ELEMENTS)
        return np.asarray(scores.cpu().numpy(), dtype=np.float32)
