from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from retrieval_kd.errors import RecipeError
from retrieval_kd.models.layers import keep_layers

KINDS = ["BertModel", "DistilBertModel", "ModernBertModel"]


def network(kind: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "BertModel":
        config = tiny.bert_config(4)
    elif kind == "DistilBertModel":
        config = transformers.DistilBertConfig(vocab_size=68, dim=16, n_layers=4, n_heads=2, hidden_dim=32)
    else:
        config = transformers.ModernBertConfig(
            vocab_size=68,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            global_attn_every_n_layers=2,
            local_attention=4,
            pad_token_id=0,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
        )
    return getattr(transformers, kind)(config).eval()


def stack(model: Any) -> Any:
    for path in ("encoder.layer", "transformer.layer", "layers"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError


def same_weights(one: Any, other: Any) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all((mine[key] == theirs[key]).all() for key in mine)


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_these_layers_in_this_order_and_loads_again(kind: str, tmp_path: Path) -> None:
    import torch

    original, cut = network(kind), network(kind)
    keep_layers(cut, [0, 3])
    assert len(stack(cut)) == cut.config.num_hidden_layers == 2
    assert same_weights(stack(cut)[0], stack(original)[0]) and same_weights(stack(cut)[1], stack(original)[3])
    cut.save_pretrained(tmp_path)
    loaded = type(cut).from_pretrained(tmp_path).eval()
    tokens = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tokens).last_hidden_state, cut(**tokens).last_hidden_state)


def test_modernbert_keeps_each_layers_attention() -> None:
    """Every second layer looks at everything: layer 3 is local, layer 2 is global."""
    model = network("ModernBertModel")
    keep_layers(model, [0, 3, 2])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_modernbert_without_its_first_layer_is_refused() -> None:
    """Its first layer has no norm before attention: what is left could not be loaded again."""
    with pytest.raises(RecipeError, match="keep layer 0 in front"):
        keep_layers(network("ModernBertModel"), [1, 3])


@pytest.mark.parametrize("layers", [[0, 4], [-1], []])
def test_layers_the_model_does_not_have(layers: list[int]) -> None:
    with pytest.raises(RecipeError, match="the model has layers 0 to 3"):
        keep_layers(network("BertModel"), layers)


def test_stack_that_is_not_found() -> None:
    model = network("BertModel")
    model.config.num_hidden_layers = 5
    with pytest.raises(RecipeError, match="cannot tell which part of BertModel is its stack of 5 layers"):
        keep_layers(model, [0])
