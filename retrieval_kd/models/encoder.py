"""Running a model over texts: one place for devices, prompts, lengths and what truncation loses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.load import SETTINGS, ModelSource, find_model
from retrieval_kd.models.vectors_of_texts import PROMPTS, Encoded, Truncation

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Tokens of a batch of texts, padding included: a CPU's caches are small."""

_ECHO = "retrieval_kd.models.echo.EchoTransformer"


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
        self.tokenizer = module.tokenizer
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
        return np.asarray(token_lengths(self.tokenizer, prompted, special=self._special), dtype=np.int64)

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
    layout: ClassVar[str]
    """``dense``, ``sparse`` or ``multi-vector``: what its vectors are."""
    comparisons: ClassVar[tuple[str, ...]]
    """The ways to compare its vectors that indexes know."""
    default: ClassVar[str] = "SentenceTransformer"
    """The class that loads a directory which names none."""

    def __init__(self, source: ModelSource, model: Any) -> None:
        self.source = source
        self.model = model
        self.readers = {task: Reader(model, task) for task in PROMPTS}
        self.truncation = Truncation()

    @classmethod
    def load(cls, spec: str | Path, *, revision: str | None = None) -> Self:
        """The encoder called ``spec`` (see `find_model`) on the GPU where there is one, else on the CPU.

        Raises `InputError` when the model is of another kind and parts of it would be random.
        """
        return cls.open(find_model(spec, revision))

    @classmethod
    def open(cls, source: ModelSource) -> Self:
        """The encoder of a model that was found; see `load`."""
        model = cls._load_stock(source)
        saved = saved_as(source.path) or cls.default
        if saved != cls.stock:
            # sentence-transformers makes what a directory lacks (a projection, a sparse layer) out of random numbers.
            one, other = _probe(model), _probe(cls._load_stock(source))
            if not np.allclose(one, other, atol=1e-4, equal_nan=True):
                raise InputError(
                    f"model '{source.name}' is not a {cls.stock}: as one it gives another vector each time it is "
                    f"loaded, because it has no trained weights for a part of it (it is a {saved})"
                )
        return cls(source, model)

    @classmethod
    def _load_stock(cls, source: ModelSource) -> Any:
        import sentence_transformers

        own = {"trust_remote_code": True} if _holds_own_module(source) else {}
        with quiet_loading():
            return getattr(sentence_transformers, cls.stock)(str(source.path), **own)

    @cached_property
    def similarity(self) -> str:
        """How the model says that its vectors are to be compared; `InputError` where indexes cannot."""
        name = str(self.model.similarity_fn_name or self.comparisons[0])
        if name not in self.comparisons:
            known = " or ".join(self.comparisons)
            raise InputError(f"model '{self.source.name}': similarity '{name}' is not supported ({known})")
        return name

    @property
    def batch_tokens(self) -> int:
        """The tokens of a batch of texts on the model's device, padding included."""
        return CPU_TOKENS if self.model.device.type == "cpu" else GPU_TOKENS

    @property
    def vocabulary(self) -> Sequence[str | None]:
        """The token of each term of sparse vectors; empty for other layouts."""
        return ()

    @property
    def stands_for(self) -> set[str]:
        """The fingerprints of the models whose queries it may encode: its own, and a query tower's teacher."""
        return {self.source.fingerprint} | ({self.queries_for} if self.queries_for else set())

    @cached_property
    def queries_for(self) -> str | None:
        """The fingerprint of the model whose indexes a query tower searches; None for a model that reads documents."""
        file = self.source.path / SETTINGS
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        teacher = settings.get("queries_for")
        return str(teacher["fingerprint"]) if teacher else None

    def ref(self) -> InputRef:
        """The model as an artifact's input."""
        return self.source.ref()

    def encoding(self, task: str) -> Callable[..., Any]:
        """sentence-transformers' function that encodes a list of texts for a task, in one batch."""
        encode = self.model.encode_query if task == "query" else self.model.encode_document
        return lambda texts, **options: encode(texts, batch_size=len(texts), show_progress_bar=False, **options)

    def count_lost(self, lost: np.ndarray) -> None:
        """Adds texts, by the tokens [n] that were cut off each, to the account of what was cut."""
        self.truncation.texts += int(np.count_nonzero(lost))
        self.truncation.tokens += int(lost.sum())

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


class DenseEncoder(Encoder):
    """A sentence-transformers bi-encoder: texts in, float32 vectors [n, dimension] out."""

    stock = "SentenceTransformer"
    layout = "dense"
    comparisons = ("cosine", "dot")
    model: SentenceTransformer

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
        reader = self.readers[task]
        if reader.limit is None:  # nothing is cut; characters stand for tokens, which some tokenizers cannot count
            lengths, lost = np.array([len(text) for text in texts]), np.zeros(len(texts), dtype=np.int32)
        else:
            lengths = reader.lengths(texts)
            lengths, lost = reader.read(lengths), reader.lost(lengths)
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for batch in token_batches(lengths.tolist(), self.batch_tokens):
            vectors[batch] = self.encoding(task)([texts[i] for i in batch], convert_to_numpy=True)
        self.refuse_bad(np.asarray(~np.isfinite(vectors).all(axis=1)), texts, task)
        self.count_lost(lost)
        return Encoded(vectors, lost)


def saved_as(path: Path) -> str | None:
    """The class of sentence-transformers that saved a directory; None where none is named."""
    settings = path / "config_sentence_transformers.json"
    saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return saved.get("model_type")


def _holds_own_module(source: ModelSource) -> bool:
    """Whether the model is an artifact with a module of this package, and no code of anybody else's."""
    listed = source.path / "modules.json"
    if not source.artifact or not listed.is_file():
        return False
    types = {str(module["type"]) for module in json.loads(listed.read_text(encoding="utf-8"))}
    foreign = {name for name in types if not name.startswith("sentence_transformers.")}
    return foreign == {_ECHO}


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


@contextmanager
def new_parts_expected() -> Iterator[None]:
    """Hides the report of weights that transformers did not find: the caller starts a new part on purpose."""
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def token_lengths(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, *, special: bool = True
) -> list[int]:
    """The number of tokens of each text (or text pair), with special tokens unless told otherwise, nothing cut."""
    if not texts:
        return []
    arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
    options = {"truncation": False, "padding": False, "verbose": False, "return_attention_mask": False}
    return [len(ids) for ids in tokenizer(*arguments, add_special_tokens=special, **options)["input_ids"]]
