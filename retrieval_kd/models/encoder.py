"""Running a model over texts: one place for devices, prompts, lengths and what truncation loses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.models.load import ModelSource, find_model

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH_SIZE = 32
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Task → the names its prompt may have; a model's first one is used, as sentence-transformers does."""


@dataclass
class Truncation:
    """How many texts were cut at the model's maximum length and how many tokens were lost."""

    texts: int = 0
    tokens: int = 0

    def to_json(self) -> dict[str, int]:
        """The manifest's two counts."""
        return {"truncated_texts": self.texts, "tokens_lost": self.tokens}


class BadVectorsError(RetrievalKDError):
    """A model gave NaN or infinite values for some ``texts``."""

    def __init__(self, message: str, texts: Sequence[str]) -> None:
        super().__init__(message)
        self.texts = texts


class Reader:
    """What a sentence-transformers model of any kind reads of a text that is a ``query`` or a ``document``."""

    def __init__(self, model: Any, task: str) -> None:
        from sentence_transformers.base.modules import Router
        from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

        self.prompt: str = next((model.prompts[name] for name in PROMPTS[task] if name in model.prompts), None) or ""
        module = model[0]
        if isinstance(module, Router):
            module = module.sub_modules[module._resolve_route(task=task, modality="text")][0]
        self._tokenizer = module.tokenizer
        self._special = not isinstance(module, SparseStaticEmbedding)
        limit: int | None = getattr(module, f"{task}_length", None)
        expansion = getattr(module, "query_expansion", None) if task == "query" else None
        self._least = int(expansion["length"]) if expansion else 0  # ColBERT fills its queries up with [MASK]
        if expansion and (limit or expansion["strategy"] == "fixed"):
            limit = self._least if expansion["strategy"] == "fixed" else max(limit or 0, self._least)
        most = float(limit or getattr(module, "max_seq_length", None) or math.inf)
        self.limit: int | None = int(most) if most < 2**31 else None  # a tokenizer without a length says 1e30
        """The most tokens of a text that are read, special tokens included; None: all."""

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens [n] int64 of each text with prompt and special tokens, before anything is cut."""
        prompted = [self.prompt + text for text in texts]
        return np.asarray(token_lengths(self._tokenizer, prompted, special=self._special), dtype=np.int64)

    def read(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens [n] that the model works on for texts of these lengths."""
        return np.asarray(np.clip(lengths, self._least, self.limit))

    def lost(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens [n] int32 that are cut off texts of these lengths."""
        return np.asarray(lengths - np.minimum(lengths, self.limit or lengths), dtype=np.int32)

    def tokens_lost(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens [n] int32 that are cut off each text; nothing is tokenized where there is no limit."""
        return np.zeros(len(texts), dtype=np.int32) if self.limit is None else self.lost(self.lengths(texts))


class Encoder:
    """A loaded sentence-transformers model of any kind: where it is from and how it reads."""

    stock: ClassVar[str]
    """The name of its class in sentence-transformers."""

    def __init__(self, source: ModelSource, model: Any) -> None:
        self.source = source
        self.model = model
        self.readers = {task: Reader(model, task) for task in PROMPTS}

    @classmethod
    def load(cls, spec: str | Path, *, revision: str | None = None) -> Self:
        """The encoder called ``spec`` (see `find_model`) on the GPU where there is one, else on the CPU.

        Raises `InputError` when the model is of another kind and parts of it would be random.
        """
        source = find_model(spec, revision)
        model = cls._load_stock(source)
        if _saved_as(source.path) != cls.stock:
            # sentence-transformers makes what a directory lacks (a projection, a sparse layer) out of random numbers.
            one, other = _probe(model), _probe(cls._load_stock(source))
            if not np.allclose(one, other, atol=1e-4, equal_nan=True):
                raise InputError(
                    f"model '{source.name}' is not a {cls.stock}: as one it gives another vector each time it is "
                    f"loaded, because it has no trained weights for a part of it (it is a {_saved_as(source.path)})"
                )
        return cls(source, model)

    @classmethod
    def _load_stock(cls, source: ModelSource) -> Any:
        import sentence_transformers

        with quiet_loading():
            return getattr(sentence_transformers, cls.stock)(str(source.path))

    def ref(self) -> InputRef:
        """The model as an artifact's input."""
        return self.source.ref()

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the model: name, revision, tokens it reads of document and query, dtype, prompts."""
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "max_length": self.readers["document"].limit,
            "query_max_length": self.readers["query"].limit,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompts": {task: reader.prompt for task, reader in self.readers.items() if reader.prompt},
        }

    def refuse_bad(self, bad: np.ndarray, texts: Sequence[str], task: str) -> None:
        """Raises `BadVectorsError` when some of ``texts`` (a mask [n]) got NaN or infinite values."""
        if bad.any():
            example = texts[int(np.argmax(bad))][:80]
            raise BadVectorsError(
                f"model '{self.source.name}' gave NaN or infinite vectors for {bad.sum()} of {len(texts)} {task} texts "
                f"(first: {example!r}); try float32 weights or another checkpoint",
                texts=[text for text, is_bad in zip(texts, bad.tolist(), strict=True) if is_bad],
            )


class Encoded(NamedTuple):
    """Vectors [n, d] float32 of texts, and the tokens [n] int32 that were cut off each."""

    vectors: np.ndarray
    tokens_lost: np.ndarray


class DenseEncoder(Encoder):
    """A sentence-transformers bi-encoder: texts in, float32 vectors [n, dimension] out."""

    stock = "SentenceTransformer"
    model: SentenceTransformer

    def __init__(self, source: ModelSource, model: SentenceTransformer) -> None:
        super().__init__(source, model)
        self.truncation = Truncation()

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
        return self.encode(texts, "query").vectors

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Document vectors [n, d] float32, with the model's document prompt and length."""
        return self.encode(texts, "document").vectors

    def encode(self, texts: Sequence[str], task: str) -> Encoded:
        """Vectors of texts that are each a ``query`` or a ``document``, and what was cut off them.

        Raises `RetrievalKDError` when a vector is not finite.
        """
        if not texts:
            return Encoded(np.zeros((0, self.dimension), dtype=np.float32), np.zeros(0, dtype=np.int32))
        lost = self.readers[task].tokens_lost(texts)
        self.truncation.texts += int(np.count_nonzero(lost))
        self.truncation.tokens += int(lost.sum())
        encode = self.model.encode_query if task == "query" else self.model.encode_document
        vectors = encode(list(texts), batch_size=BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True)
        vectors = np.asarray(vectors, dtype=np.float32)
        self.refuse_bad(~np.isfinite(vectors).all(axis=1), texts, task)
        return Encoded(vectors, lost)


def _saved_as(path: Path) -> str:
    """The class of sentence-transformers that saved a directory; ``SentenceTransformer`` where none is named."""
    settings = path / "config_sentence_transformers.json"
    saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return str(saved.get("model_type") or "SentenceTransformer")


def _probe(model: Any) -> np.ndarray:
    """What a model of any kind makes of one text."""
    import torch

    return np.asarray(torch.as_tensor(model.encode_document(["Which texts are alike?"])[0]).cpu().to_dense().float())


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


def token_lengths(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, *, special: bool = True
) -> list[int]:
    """The number of tokens of each text (or text pair), with special tokens unless told otherwise, nothing cut."""
    if not texts:
        return []
    arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
    options = {"truncation": False, "padding": False, "verbose": False, "return_attention_mask": False}
    return [len(ids) for ids in tokenizer(*arguments, add_special_tokens=special, **options)["input_ids"]]
