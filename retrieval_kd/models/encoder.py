"""Running a dense model over texts: one place for devices, prompts, lengths and truncation counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.models.load import ModelSource, find_model

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH_SIZE = 32


@dataclass
class Truncation:
    """How many texts were cut at the model's maximum length and how many tokens were lost."""

    texts: int = 0
    tokens: int = 0

    def count(self, lengths: Sequence[int], limit: int) -> None:
        """Adds texts of these token ``lengths`` (special tokens included) that a model reads up to ``limit``."""
        for length in lengths:
            if length > limit:
                self.texts += 1
                self.tokens += length - limit

    def to_json(self) -> dict[str, int]:
        """The manifest's two counts."""
        return {"truncated_texts": self.texts, "tokens_lost": self.tokens}


class DenseEncoder:
    """A sentence-transformers bi-encoder: texts in, float32 vectors [n, dimension] out."""

    def __init__(self, source: ModelSource, model: SentenceTransformer) -> None:
        self.source = source
        self.model = model
        self.truncation = Truncation()

    @classmethod
    def load(cls, spec: str | Path, *, revision: str | None = None) -> DenseEncoder:
        """The encoder called ``spec`` (see `find_model`) on the GPU where there is one, else on the CPU."""
        source = find_model(spec, revision)
        from sentence_transformers import SentenceTransformer

        with quiet_loading():
            return cls(source, SentenceTransformer(str(source.path)))

    def ref(self) -> InputRef:
        """The model as an artifact's input."""
        return self.source.ref()

    @cached_property
    def similarity(self) -> str:
        """``cosine`` or ``dot``, as the model says it is to be compared."""
        name = str(self.model.similarity_fn_name or "cosine")
        if name not in ("cosine", "dot"):
            raise InputError(f"model '{self.source.name}': similarity '{name}' is not supported (cosine or dot)")
        return name

    @cached_property
    def dimension(self) -> int:
        """The length of a vector."""
        return int(self.model.get_embedding_dimension())

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Query vectors [n, d] float32, with the model's query prompt and length."""
        return self._encode(texts, "query")

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Document vectors [n, d] float32, with the model's document prompt and length."""
        return self._encode(texts, "document")

    def _encode(self, texts: Sequence[str], task: str) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        prompt = (self.model.prompts or {}).get(task) or ""
        self.truncation.count(token_lengths(self.model.tokenizer, [prompt + text for text in texts]), self._limit(task))
        encode = self.model.encode_query if task == "query" else self.model.encode_document
        vectors = encode(list(texts), batch_size=BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True)
        vectors = np.asarray(vectors, dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise RetrievalKDError(
                f"model '{self.source.name}' gave NaN or infinite vectors for {len(bad)} of {len(texts)} {task} texts "
                f"(first: {texts[bad[0]][:80]!r}); try float32 weights or another checkpoint"
            )
        return vectors

    def _limit(self, task: str) -> int:
        first: Any = self.model[0]
        special = getattr(first, f"{task}_length", None)
        return int(special or self.model.max_seq_length or 2**31 - 1)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides the progress bars that transformers draws while it loads or saves weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def token_lengths(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[int]:
    """The number of tokens of each text (or text pair) with special tokens and without truncation."""
    arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
    encoded = tokenizer(*arguments, truncation=False, padding=False, verbose=False, return_attention_mask=False)
    return [len(ids) for ids in encoded["input_ids"]]
