"""SPLADE's max pooling in the cheaper order: the maximum of a term's logits first, its activation afterwards."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def pool_maxima_first(model: nn.Module) -> int:
    """The number of max poolings of ``model`` that from now on activate maxima instead of all logits.

    log(1 + relu(x)) grows with x, so that its maximum over the tokens is that of the largest logit: the same vectors
    and gradients for [n, V] logarithms instead of [n, S, V], and without keeping these for the backward pass. The
    modules stay those of sentence-transformers and are saved as such.
    """
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    poolings = [m for m in model.modules() if type(m) is SpladePooling and m.pooling_strategy == "max"]
    for pooling in poolings:
        pooling.forward = MethodType(_pool, pooling)
    return len(poolings)


def _pool(pooling: Any, features: dict[str, Any]) -> dict[str, Any]:
    import torch

    if "cu_seq_lens_q" in features:  # texts without padding, one after another
        stock: dict[str, Any] = type(pooling).forward(pooling, features)
        return stock
    logits, padding = features["token_embeddings"], features["attention_mask"] == 0
    if bool(padding.any()):
        logits = logits.masked_fill(padding.unsqueeze(-1), 0.0)
    # The gradient of max needs the places only, that of amax all logits.
    maxima = logits.max(dim=1).values if torch.is_grad_enabled() else logits.amax(dim=1)
    weights = maxima.relu().log1p()
    if pooling.activation_function == "log1p_relu":
        weights = weights.log1p()
    if pooling.embedding_dimension is None:
        pooling.embedding_dimension = weights.shape[1]
    return {**features, "sentence_embedding": weights}
