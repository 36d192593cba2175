"""What an exported model is made from and compared with: the model in torch, float32 on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.errors import InputError
from retrieval_kd.models.cross_encoder import load_cross_encoder, pair_limit
from retrieval_kd.models.encoder import DenseEncoder, quiet_loading, saved_as
from retrieval_kd.models.load import SETTINGS, ModelSource
from retrieval_kd.models.multi_vector_encoder import MultiVectorEncoder
from retrieval_kd.models.sparse_encoder import SparseEncoder

TorchEncoder = DenseEncoder | SparseEncoder | MultiVectorEncoder
_ENCODERS: dict[str, type[TorchEncoder]] = {
    kind.stock: kind for kind in (DenseEncoder, SparseEncoder, MultiVectorEncoder)
}


class TorchCrossEncoder:
    """A sentence-transformers cross-encoder."""

    layout = "cross-encoder"

    def __init__(self, source: ModelSource) -> None:
        self.model: Any = load_cross_encoder(source, device="cpu")
        if (limit := pair_limit(self.model)) is not None:
            self.model.max_seq_length = limit

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Logits [n] float32 of the pairs (query i, document i)."""
        import torch

        pairs = list(zip(queries, documents, strict=True))
        logits = self.model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return np.asarray(logits, dtype=np.float32)


def open_reference(source: ModelSource) -> TorchEncoder | TorchCrossEncoder:
    """The model of ``source``, of the kind that its files say. Raises `InputError` for what cannot be exported."""
    import sentence_transformers

    path = source.path
    if _json(path / SETTINGS).get("format"):
        raise InputError(f"model '{source.name}' was exported already; export the model that it was made from")
    stock = saved_as(path)
    if stock == "CrossEncoder" or (stock is None and _classifies(path)):
        return TorchCrossEncoder(source)
    if not (path / "modules.json").is_file():
        raise InputError(f"model '{source.name}' has no modules.json: it was not trained to make vectors of texts")
    if (stock or "SentenceTransformer") not in _ENCODERS:
        raise InputError(f"model '{source.name}' is a {stock}, which cannot be exported")
    kind = _ENCODERS[stock or "SentenceTransformer"]
    with quiet_loading():
        model = getattr(sentence_transformers, kind.stock)(str(path), device="cpu")
    return kind(source, model.float().eval())


@contextmanager
def bare(encoder: TorchEncoder) -> Iterator[None]:
    """Keeps an encoder from what follows its network: pruning of sparse vectors, pooling of tokens.

    Both select: where a rounding decides, vectors differ by more than the network does.
    """
    from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling

    pooling = [(m, m.tasks) for m in encoder.model.modules() if isinstance(m, BaseTokenPooling)]
    pruning = (encoder.pruning, encoder.model.max_active_dims) if isinstance(encoder, SparseEncoder) else None
    try:
        for module, _ in pooling:
            module.tasks = []
        if isinstance(encoder, SparseEncoder):
            encoder.pruning, encoder.model.max_active_dims = {}, None
        yield
    finally:
        for module, tasks in pooling:
            module.tasks = tasks
        if isinstance(encoder, SparseEncoder) and pruning:
            encoder.pruning, encoder.model.max_active_dims = pruning


def _classifies(path: Path) -> bool:
    names = _json(path / "config.json").get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
