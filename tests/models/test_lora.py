from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_language_models

from retrieval_kd.errors import MissingExtraError, RecipeError
from retrieval_kd.models.lora import Lora, add_lora, merge_lora

TEXTS = ["w1 w2", "w3", "w4 w5 w6 w7"]


def decoder(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    network = Transformer(str(tiny_language_models.make_causal(folder / "decoder")))
    return SentenceTransformer(modules=[network, Pooling(16, pooling_mode="lasttoken"), Dense(16, 8)], device="cpu")


def one_step(model: Any) -> None:
    """A step of gradient descent on the sum of the vectors, in every trainable weight."""
    import torch

    model.train()
    model(model.preprocess(TEXTS))["sentence_embedding"].square().sum().backward()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.grad is not None:
                weights -= 0.01 * weights.grad
    model.eval()


def test_adapters_change_nothing_at_first_and_alone_learn(tmp_path: Path) -> None:
    """B starts as zero, so the vectors stay; after a step the base is as it was, adapters and Dense are not."""
    import torch

    model = decoder(tmp_path)
    before = model.encode(TEXTS)
    start = {name: weights.clone() for name, weights in model.state_dict().items()}
    add_lora(model[0].auto_model, Lora(rank=2, alpha=4, dropout=0))
    assert (model.encode(TEXTS) == before).all()
    one_step(model)
    state = model.state_dict()
    base = {name: name.replace(".base_layer", "") for name in state if "lora_" not in name}
    changed = {base[name] for name in base if not torch.equal(state[name], start[base[name]])}
    assert set(base.values()) == set(start) and changed == {"2.linear.weight", "2.linear.bias"}
    # 7 linear layers in each of 2 layers, A [2, in] and B [out, 2] each
    assert sum("lora_" in name for name in state) == 7 * 2 * 2


def test_merged_by_hand(tmp_path: Path) -> None:
    """W + alpha / rank · B A, and the same vectors as with the adapters."""
    import torch

    model = decoder(tmp_path)
    start = {name: weights.clone() for name, weights in model.state_dict().items()}
    add_lora(model[0].auto_model, Lora(rank=2, alpha=6, dropout=0, modules=["q_proj"]))
    one_step(model)
    state = {name: weights.clone() for name, weights in model.state_dict().items()}
    adapted = model.encode(TEXTS)
    merge_lora(model[0].auto_model)
    merged = model.state_dict()
    assert merged.keys() == start.keys()
    place = next(name for name in start if name.endswith("layers.1.self_attn.q_proj.weight"))
    a, b = (state[place.replace("weight", f"lora_{x}.default.weight")] for x in "AB")
    torch.testing.assert_close(merged[place], start[place] + 3 * b @ a)
    assert not torch.equal(merged[place], start[place])
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), torch.tensor(adapted))
    model.save_pretrained(str(tmp_path / "merged"))
    assert not list((tmp_path / "merged").rglob("adapter*"))


def test_a_new_head_learns_whole(tmp_path: Path) -> None:
    """The classifier is trained without an adapter; the pooler under it is frozen."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(tiny.make_cross_encoder(tmp_path / "cross-encoder")))
    add_lora(model[0].auto_model, Lora(rank=2))
    learning = {name.partition("model.")[2] for name, weights in model.named_parameters() if weights.requires_grad}
    assert {name for name in learning if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
    assert not any("classifier" in name or "pooler" in name for name in learning if "lora_" in name)


def test_no_such_layer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such linear layer \(it has down_proj, gate_proj, k_proj"):
        add_lora(decoder(tmp_path)[0].auto_model, Lora(modules=["query"]))


def test_peft_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"retrieval-kd\[lora\]"):
        add_lora(decoder(tmp_path)[0].auto_model, Lora())
