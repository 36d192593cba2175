"""Opening whatever makes vectors of texts: a sentence-transformers model of any kind, or an exported one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError
from retrieval_kd.models.load import SETTINGS, ModelSource, find_model
from retrieval_kd.models.vectors_of_texts import Encoded, MultiVectors, SparseVectors, Truncation

EXPORTED = ("onnx", "onnx-int8")


class TextEncoder(Protocol):
    """A model that makes vectors of texts, whatever runs it."""

    @property
    def layout(self) -> str:
        """``dense``, ``sparse`` or ``multi-vector``: what `encode` gives."""

    @property
    def source(self) -> ModelSource:
        """Where the model is."""

    @property
    def similarity(self) -> str:
        """How its vectors are compared: ``cosine``, ``dot``, ``maxsim`` or ``meanmaxsim``."""

    @property
    def truncation(self) -> Truncation:
        """What was cut off all texts so far."""

    @property
    def vocabulary(self) -> Sequence[str | None]:
        """The token of each term of its sparse vectors, None where a term is no token; empty for other layouts."""

    @property
    def stands_for(self) -> set[str]:
        """The fingerprints of the models whose queries it may encode: its own, and the one it was exported from."""

    @property
    def queries_for(self) -> str | None:
        """The fingerprint of the model whose indexes a query tower searches; None for a model that reads documents."""

    def ref(self) -> InputRef:
        """The model as an artifact's input."""

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the model."""

    def encode(self, texts: Sequence[str], task: str) -> Encoded | SparseVectors | MultiVectors:
        """What the model makes of texts that are each a ``query`` or a ``document``."""


def open_encoder(spec: str | Path) -> TextEncoder:
    """The encoder called ``spec`` (see `find_model`), of the kind that its saved model names.

    An exported model runs in onnxruntime and imports no torch. Any other runs on the GPU where there is one; on a CPU
    its linear layers are oneDNN's, which is faster and the same up to rounding, and the model can only encode. Raises
    `InputError` for a model that makes no vectors of texts.
    """
    source = find_model(spec)
    settings = _json(source.path / SETTINGS)
    if settings.get("format") in EXPORTED:
        from retrieval_kd.models.exported import ExportedCrossEncoder, open_exported

        exported = open_exported(source)
        if isinstance(exported, ExportedCrossEncoder):
            raise _no_vectors(source, "cross-encoder")
        return exported
    return _open_torch(source, settings)


def _open_torch(source: ModelSource, settings: dict[str, Any]) -> TextEncoder:
    from retrieval_kd.models.encoder import DenseEncoder, Encoder, saved_as
    from retrieval_kd.models.multi_vector_encoder import MultiVectorEncoder
    from retrieval_kd.models.onednn import use_onednn
    from retrieval_kd.models.sparse_encoder import SparseEncoder

    kinds: dict[str, type[DenseEncoder | SparseEncoder | MultiVectorEncoder]] = {
        kind.stock: kind for kind in (DenseEncoder, SparseEncoder, MultiVectorEncoder)
    }
    stock = saved_as(source.path)
    if stock is None and settings.get("kind", "dense") != "dense":
        raise _no_vectors(source, settings["kind"])
    if (stock or Encoder.default) not in kinds:
        raise _no_vectors(source, str(stock))
    encoder = kinds[stock or Encoder.default].open(source)
    if encoder.model.device.type == "cpu":
        use_onednn(encoder.model)
    return encoder


def _no_vectors(source: ModelSource, kind: str) -> InputError:
    return InputError(
        f"model '{source.name}' is a {kind}: it makes no vectors of texts; "
        "give a dense, sparse or late-interaction model"
    )


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
