"""Tiny re-rankers with networks of the package's own, and pairs of different lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

LENGTHS = {"query_length": 8, "document_length": 16}
PAIRS = [
    ("w1 w2", "w3 w1 w5 w6"),
    ("w3", "w7"),
    ("w1 w2 w3 w4 w5 w6 w7 w8 w9", "w1 " * 30),  # 9 of 6 words, 30 of 15
    ("w44 w2 w10", ""),
]


def tokenizer(base: Path) -> Any:
    """That of ``base``."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def make_tk(base: Path, **changes: Any) -> Any:
    """A random TK of 16 dimensions."""
    import torch

    from retrieval_kd.models.tk import TK

    torch.manual_seed(1)
    return TK(tokenizer(base), **{"dimension": 16, "heads": 2, "feed_forward": 20, **LENGTHS, **changes}).eval()


def make_prettr(base: Path, **changes: Any) -> Any:
    """A PreTTR around ``base``, whose first layer reads the texts apart."""
    import torch
    from transformers import AutoModel

    from retrieval_kd.models.prettr import PreTTR

    torch.manual_seed(1)
    values = {"layers_apart": 1, **LENGTHS, **changes}
    return PreTTR(tokenizer(base), AutoModel.from_pretrained(base), **values).eval()


def make_base(folder: Path) -> Path:
    """Two layers without dropout, 64 positions."""
    return tiny.make_transformer(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def in_cross_encoder(network: Any) -> Any:
    """The ``CrossEncoder`` of one network, with raw scores."""
    import torch
    from sentence_transformers import CrossEncoder

    return CrossEncoder(modules=[network], activation_fn=torch.nn.Identity(), device="cpu")
