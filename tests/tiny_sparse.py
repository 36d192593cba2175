"""Bases of sparse students and what their vectors are, worked out apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny


def make_causal(folder: Path, *, tied: bool = False) -> Path:
    """A random Llama of 16 dimensions over the 68 words, ``[CLS]`` in front of a text; its output is not tied."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = tiny.tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", model_max_length=64
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=68,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def heads_of(network: Any, ids: list[int]) -> np.ndarray:
    """log(1 + relu) of a network's logits for one unpadded row of ids [tokens, V]."""
    import torch

    with torch.no_grad():
        logits = network(input_ids=torch.tensor([ids])).logits[0]
    return np.asarray(logits.relu().log1p())


def write_table(path: Path, table: dict[str, Any]) -> Path:
    """An ``idf.json``."""
    path.write_text(json.dumps(table))
    return path
