from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
from sentence_transformers.base.modules import Transformer

from retrieval_kd.models.positions import cap_lengths


def test_lengths_end_at_the_last_position(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tiny BERT has 64 positions."""
    network = Transformer(str(tiny.make_transformer(tmp_path / "plain")))
    network.query_length, network.document_length = 64, 100
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        assert cap_lengths(network) == {"document_length": 64}
    assert (network.query_length, network.document_length) == (64, 64)
    assert "100 tokens are more than the 64 positions" in caplog.text
    assert cap_lengths(network) == {}


def test_roberta_counts_positions_from_its_padding(tmp_path: Path) -> None:
    """66 rows, of which the first two are no position."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=68, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.max_position_embeddings = 66
    RobertaModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    network = Transformer(str(tmp_path))
    network.document_length = 66
    assert cap_lengths(network) == {"document_length": 64}
