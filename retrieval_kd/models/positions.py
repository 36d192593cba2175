"""How many tokens a transformer can read at most, where it has learned a vector for each position."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("retrieval_kd")


def cap_lengths(model: Any) -> dict[str, int]:
    """The lengths of a sentence-transformers ``model`` that its network cannot reach, now cut to what it can; warned.

    A longer text would end in an index error of torch, but only once there is one.
    """
    import torch
    from sentence_transformers.base.modules import Transformer

    cut: dict[str, int] = {}
    for module in model.modules():
        if not isinstance(module, Transformer):
            continue
        tables = [
            table
            for name, table in module.auto_model.named_modules()
            if name.endswith("position_embeddings") and isinstance(table, torch.nn.Embedding)
        ]
        if not tables:
            continue
        before = 0 if tables[0].padding_idx is None else tables[0].padding_idx + 1  # RoBERTa counts from there
        limit = tables[0].num_embeddings - before
        for name in ("query_length", "document_length"):
            if (getattr(module, name, None) or 0) > limit:
                log.warning(
                    "%s: %d tokens are more than the %d positions of the base; it is %d",
                    name,
                    getattr(module, name),
                    limit,
                    limit,
                )
                setattr(module, name, limit)
                cut[name] = limit
    return cut
