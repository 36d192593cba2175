"""Running an exported model: onnxruntime and `tokenizers` do the work, neither torch nor transformers is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from retrieval_kd.artifact import InputRef, Manifest
from retrieval_kd.data.vectors import VOCABULARY
from retrieval_kd.errors import InputError
from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.encoder import BadVectorsError
from retrieval_kd.models.exported_tokenizer import TextTokenizer, Tokens
from retrieval_kd.models.load import SETTINGS, ModelSource
from retrieval_kd.models.onnx import OnnxSession
from retrieval_kd.models.token_pooling import pooled
from retrieval_kd.models.vectors_of_texts import Encoded, MultiVectors, SparseVectors, Truncation, strongest

FORMATS = ("onnx", "onnx-int8")
BATCH_TOKENS = 1024
"""Padded tokens of a batch: what stays in a CPU's caches."""


class Batch(NamedTuple):
    """What the graph made of some texts: their places, what was fed, and the output."""

    places: np.ndarray
    features: dict[str, np.ndarray]
    output: np.ndarray


class Exported:
    """A model that `export` wrote: where it is from, and how it reads its texts."""

    layout: ClassVar[str]
    least_tokens: ClassVar[int] = 1
    """What a text counts at least in the budget of a batch."""

    def __init__(self, source: ModelSource, settings: Mapping[str, Any]) -> None:
        self.source = source
        self.settings = settings
        self.truncation = Truncation()
        self._tokenizers: dict[str, TextTokenizer] = {}
        self._sessions: dict[str, OnnxSession] = {}

    @property
    def similarity(self) -> str:
        """How vectors are compared: ``cosine``, ``dot``, ``maxsim`` or ``meanmaxsim``."""
        return str(self.settings["similarity"])

    @cached_property
    def vocabulary(self) -> Sequence[str | None]:
        """The token of each term of its sparse vectors, None where a term is no token; empty for other layouts."""
        file = self.source.path / VOCABULARY
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else ()

    @cached_property
    def stands_for(self) -> set[str]:
        """The fingerprints of the models whose queries it may encode.

        Its own, that of the model it was made from and, of an exported query tower, that of the tower's teacher.
        """
        original = Manifest.read(self.source.path).inputs["model"]["fingerprint"]
        return {self.source.fingerprint, original} | ({self.queries_for} if self.queries_for else set())

    @property
    def queries_for(self) -> str | None:
        """The fingerprint of the model whose indexes a query tower searches; None for a model that reads documents."""
        teacher = self.settings.get("queries_for")
        return str(teacher["fingerprint"]) if teacher else None

    def bare(self) -> Self:
        """The same model without what follows the network: pruning of sparse vectors, pooling of tokens."""
        sides = {task: {**self.settings[task], "token_pooling": None} for task in ("query", "document")}
        return type(self)(self.source, {**self.settings, **sides, "pruning": {}, "max_active_dims": None})

    def ref(self) -> InputRef:
        """The model as an artifact's input."""
        return self.source.ref()

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the model: name, tokens it reads of document and query, format, dtype, prompts."""
        query, document = (self.settings.get(side) or self.settings["pair"] for side in ("query", "document"))
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "format": self.settings["format"],
            "max_length": document["max_length"],
            "query_max_length": query["max_length"],
            "dtype": "int8" if self.settings["format"] == "onnx-int8" else "float32",
            "prompts": {
                task: side["prompt"] for task, side in (("query", query), ("document", document)) if side["prompt"]
            },
        }

    def tokenizer(self, side: str) -> TextTokenizer:
        """How the texts of a side (``query``, ``document``; ``pair`` of a cross-encoder) are read."""
        if side not in self._tokenizers:
            self._tokenizers[side] = TextTokenizer(self.source.path, self.settings[side])
        return self._tokenizers[side]

    def batches(self, side: str, tokens: Tokens) -> Iterator[Batch]:
        """What the side's graph makes of texts, in batches of similar length."""
        name = self.settings[side]["graph"]
        if name not in self._sessions:
            self._sessions[name] = OnnxSession(self.source.path / name)
        reader = self.tokenizer(side)
        least = max(self.least_tokens, reader.least)
        for places in token_batches([max(least, len(ids)) for ids in tokens.ids], BATCH_TOKENS):
            features = reader.padded(tokens, places)
            yield Batch(places, features, self._sessions[name](features))

    def count_lost(self, lost: np.ndarray) -> None:
        """Adds texts to the account of what was cut."""
        self.truncation.texts += int(np.count_nonzero(lost))
        self.truncation.tokens += int(lost.sum())

    def refuse_bad(self, bad: np.ndarray, texts: Sequence[str], task: str) -> None:
        """Raises `BadVectorsError` when some of ``texts`` (a mask [n]) got NaN or infinite values."""
        if bad.any():
            wrong = [text for text, is_bad in zip(texts, bad.tolist(), strict=True) if is_bad]
            raise BadVectorsError(
                f"model '{self.source.name}' gave NaN or infinite vectors for {len(wrong)} of {len(texts)} {task} "
                f"texts (first: {wrong[0][:80]!r}); export another checkpoint",
                texts=wrong,
            )


class ExportedDense(Exported):
    """Texts in, float32 vectors [n, dimension] out: pooling and normalisation are in the graph."""

    layout = "dense"

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return int(self.settings["dimension"])

    def encode(self, texts: Sequence[str], task: str) -> Encoded:
        """Vectors of texts that are each a ``query`` or a ``document``, and what was cut off them."""
        tokens = self.tokenizer(task).tokens(texts)
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for batch in self.batches(task, tokens):
            vectors[batch.places] = batch.output
        self.refuse_bad(np.asarray(~np.isfinite(vectors).all(axis=1)), texts, task)
        self.count_lost(tokens.lost)
        return Encoded(vectors, tokens.lost)


class ExportedSparse(Exported):
    """Texts in, terms and weights out; the queries of an inference-free model are looked up in a table."""

    layout = "sparse"
    least_tokens = 8  # a row of the whole vocabulary is made for the shortest text too

    def encode(self, texts: Sequence[str], task: str) -> SparseVectors:
        """Sparse vectors of texts that are each a ``query`` or a ``document``, pruned as the model says."""
        tokens = self.tokenizer(task).tokens(texts)
        found = self._looked_up(task, tokens) if "table" in self.settings[task] else self._computed(task, tokens)
        bad = np.array([not np.isfinite(weights).all() for _, weights in found], dtype=bool)
        self.refuse_bad(bad, texts, task)
        if (most := self.settings["max_active_dims"]) is not None:
            found = [strongest(*vector, top_terms=most) for vector in found]
        if pruning := self.settings["pruning"].get(task):
            found = [strongest(*vector, **pruning) for vector in found]
        self.count_lost(tokens.lost)
        return SparseVectors(
            np.array([len(terms) for terms, _ in found], dtype=np.int32),
            np.concatenate([np.empty(0, np.int32), *(terms for terms, _ in found)]),
            np.concatenate([np.empty(0, np.float32), *(weights for _, weights in found)]),
            tokens.lost,
        )

    def _looked_up(self, task: str, tokens: Tokens) -> list[tuple[np.ndarray, np.ndarray]]:
        table = self._table(self.settings[task]["table"])
        terms = [np.unique(np.asarray(ids, dtype=np.int32)) for ids in tokens.ids]
        terms = [row[table[row] != 0] for row in terms]
        return [(row, table[row]) for row in terms]

    def _computed(self, task: str, tokens: Tokens) -> list[tuple[np.ndarray, np.ndarray]]:
        found = [(np.empty(0, np.int32), np.empty(0, np.float32))] * len(tokens.ids)
        for batch in self.batches(task, tokens):
            for place, row in zip(batch.places, batch.output, strict=True):
                terms = np.flatnonzero(row).astype(np.int32)
                found[place] = terms, row[terms]
        return found

    def _table(self, name: str) -> np.ndarray:
        if not hasattr(self, "_weights"):
            self._weights: np.ndarray = np.load(self.source.path / name)
        return self._weights


class ExportedMultiVector(Exported):
    """Texts in, a vector for each token that counts out: what counts is decided here, not in the graph."""

    layout = "multi-vector"

    @property
    def dimension(self) -> int:
        """The length of a token's vector."""
        return int(self.settings["dimension"])

    def encode(self, texts: Sequence[str], task: str) -> MultiVectors:
        """Token vectors of texts that are each a ``query`` or a ``document``, with expansion, masks and pooling."""
        tokens = self.tokenizer(task).tokens(texts)
        matrices = [np.empty((0, self.dimension), np.float32)] * len(texts)
        pooling = self.settings[task]["token_pooling"]
        for batch in self.batches(task, tokens):
            counted = self._counts(task, batch.features)
            for place, matrix, counts in zip(batch.places, batch.output, counted, strict=True):
                matrices[place] = pooled(matrix[counts], pooling)
        self.refuse_bad(np.array([not np.isfinite(m).all() for m in matrices], dtype=bool), texts, task)
        self.count_lost(tokens.lost)
        return MultiVectors(
            np.array([len(matrix) for matrix in matrices], dtype=np.int32),
            np.concatenate([np.empty((0, self.dimension), np.float32), *matrices]),
            tokens.lost,
        )

    def _counts(self, task: str, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """Which tokens [B, S] have a part in MaxSim: all but padding, less what the model's mask leaves out."""
        counts = features["attention_mask"] == 1
        mask = self.settings[task]["mask"]
        if mask is None:
            return np.asarray(counts)
        counts = (counts | features["filled"]) & ~np.isin(features["input_ids"], mask["skip"])
        return np.asarray(counts & np.isin(features["input_ids"], mask["only"]) if mask["only"] else counts)


class ExportedCrossEncoder(Exported):
    """Pairs of query and document in, raw logits out."""

    layout = "cross-encoder"

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [n] float32 of the pairs (query i, document i), and the tokens [n] int32 that were cut off each."""
        tokens = self.tokenizer("pair").tokens(queries, documents)
        logits = np.zeros(len(queries), dtype=np.float32)
        for batch in self.batches("pair", tokens):
            logits[batch.places] = batch.output[:, 0]
        self.refuse_bad(~np.isfinite(logits), queries, "query")
        self.count_lost(tokens.lost)
        return logits, tokens.lost


AnyExported = ExportedDense | ExportedSparse | ExportedMultiVector | ExportedCrossEncoder
_LAYOUTS: dict[str, type[AnyExported]] = {
    kind.layout: kind for kind in (ExportedDense, ExportedSparse, ExportedMultiVector, ExportedCrossEncoder)
}


def open_exported(source: ModelSource) -> AnyExported:
    """The exported model of ``source``: one that encodes texts or, a cross-encoder, scores pairs.

    Raises `InputError` for a model that was not exported.
    """
    file = source.path / SETTINGS
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if settings.get("format") not in FORMATS:
        raise InputError(f"model '{source.name}' is not an exported one; make one with: retrieval-kd export")
    return _LAYOUTS[settings["layout"]](source, settings)
