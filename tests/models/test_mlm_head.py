"""Heads of masked language models: found by their weights, started from word embeddings, divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
import tiny_sparse

from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.models.encoder import new_parts_expected
from retrieval_kd.models.mlm_head import divide_head, has_head, start_head

TEXTS = [tiny.document_text(row) for row in range(20)]


def make_modernbert(folder: Path) -> Path:
    import torch
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=68,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.3,
    )
    ModernBertForMaskedLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def masked(folder: Path) -> Any:
    from transformers import AutoModelForMaskedLM

    with new_parts_expected():
        return AutoModelForMaskedLM.from_pretrained(folder).eval()


def test_a_head_is_found_by_its_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert has_head(tiny_encoders.make_masked_model(tmp_path / "masked"))
    assert has_head(make_modernbert(tmp_path / "modern"))
    assert not has_head(tiny.make_transformer(tmp_path / "plain"))
    assert not has_head(tiny.make_cross_encoder(tmp_path / "other-head"))
    file = tmp_path / "masked" / "model.safetensors"
    weights = load_file(file)
    del weights["cls.predictions.transform.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert not has_head(tmp_path / "masked")


def test_other_files_of_weights(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tiny_encoders.make_masked_model(tmp_path / "masked")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert has_head(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors or pytorch_model\.bin"):
        has_head(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"cls.predictions.transform.dense.weight": 1}}'
    )
    assert has_head(folder)


def test_a_model_that_predicts_the_next_word(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a llama does not predict masked words.*echo: true"):
        has_head(tiny_sparse.make_causal(tmp_path / "llama"))


def test_started_head_is_the_word_embeddings(tmp_path: Path) -> None:
    """A logit is the normalised token vector times the word embedding, less the term's mean and one constant."""
    import torch

    network = masked(tiny.make_transformer(tmp_path / "plain"))
    tokenizer = tiny.tokenizer()
    terms = start_head(network, tokenizer, TEXTS)
    features = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = network.bert(**features).last_hidden_state
        normal = torch.nn.functional.layer_norm(hidden, (16,))
        products = normal @ network.get_input_embeddings().weight.T
        logits = network(**features).logits
    largest = products.masked_fill(features["attention_mask"][:, :, None] == 0, -np.inf).amax(dim=1)
    constant = products + network.get_output_embeddings().bias - logits
    torch.testing.assert_close(constant, torch.zeros_like(constant), atol=1e-4, rtol=0)
    bias = -network.get_output_embeddings().bias.detach() - largest.mean(dim=0)
    torch.testing.assert_close(bias, bias[:1].expand(68), atol=1e-4, rtol=0)
    assert terms == pytest.approx(34, abs=0.5)  # half of 68
    pooled = logits.masked_fill(features["attention_mask"][:, :, None] == 0, -np.inf).amax(dim=1)
    assert float((pooled > 0).sum(dim=1).float().mean()) == pytest.approx(34, abs=0.5)


@pytest.mark.parametrize("make", [tiny_encoders.make_masked_model, make_modernbert])
def test_divided_logits(make: Any, tmp_path: Path) -> None:
    import torch

    folder = make(tmp_path / "model")
    whole, divided = masked(folder), masked(folder)
    divide_head(divided, 16)
    ids = tiny.tokenizer()("w1 w2 w40", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(divided(input_ids=ids).logits * 16, whole(input_ids=ids).logits)
    torch.testing.assert_close(divided.get_input_embeddings().weight, whole.get_input_embeddings().weight)


def test_a_head_of_another_form(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_sparse.make_causal(tmp_path / "llama"))
    with pytest.raises(RecipeError, match="the head of a LlamaForCausalLM is not a square layer"):
        divide_head(network, 2)
