"""What both re-rankers with networks of the package's own do: reading, cutting, saving, being loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_rerankers
import torch

from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.models.cross_encoder import load_cross_encoder
from retrieval_kd.models.load import find_model
from retrieval_kd.models.pair_reranker import split

MAKERS = [tiny_rerankers.make_tk, tiny_rerankers.make_prettr]


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return tiny_rerankers.make_base(shared / "pairs-base")


def test_pairs_are_read_and_split_again(base: Path) -> None:
    """Of w1 … w9 six are read (8 - [CLS] - [SEP]), of 30 words 15: 3 + 15 are lost."""
    network = tiny_rerankers.make_tk(base)
    pairs, lost = network.tokenize_pairs(*zip(*tiny_rerankers.PAIRS, strict=True))
    assert lost.tolist() == [0, 0, 18, 0] and lost.dtype == np.int32
    assert pairs[0]["input_ids"] == [2, 6, 7, 3, 8, 6, 10, 11, 3]
    assert pairs[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    query, document = split(network.preprocess(tiny_rerankers.PAIRS[:2]))
    assert query.ids[query.mask].tolist() == [2, 6, 7, 3, 2, 8, 3]
    assert document.ids[document.mask].tolist() == [8, 6, 10, 11, 3, 12, 3]
    assert query.ids.shape == (2, 4) and document.ids.shape == (2, 5)
    with_prompt = network.preprocess([("w2", "w3")], prompt="w1 ")
    assert with_prompt["input_ids"].tolist() == [[2, 6, 7, 3, 8, 3]]


@pytest.mark.parametrize("make", MAKERS)
def test_stock_sentence_transformers_loads_what_was_saved(make: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    model = tiny_rerankers.in_cross_encoder(make(base))
    model.save_pretrained(str(tmp_path), create_model_card=False)
    expected = model.predict(tiny_rerankers.PAIRS)
    loaded = CrossEncoder(str(tmp_path), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(loaded.predict(tiny_rerankers.PAIRS), expected)
    assert loaded[0].get_config_dict() == model[0].get_config_dict() and loaded.max_seq_length == 24
    own = load_cross_encoder(find_model(tmp_path), device="cpu", dtype="bfloat16", own_networks=True)
    assert own.dtype == torch.bfloat16
    np.testing.assert_allclose(own.predict(tiny_rerankers.PAIRS), expected, atol=0.1)
    with pytest.raises(ValueError, match="trust_remote_code"):
        CrossEncoder(str(tmp_path))
    with pytest.raises(UsageError, match="query_length and document_length"):
        CrossEncoder(str(tmp_path), trust_remote_code=True, max_length=10)


def test_nothing_else_is_trusted(base: Path, tmp_path: Path) -> None:
    """Neither another class, nor an activation that the model's files name, is imported."""
    model = tiny_rerankers.in_cross_encoder(tiny_rerankers.make_tk(base))
    model.save_pretrained(str(tmp_path), create_model_card=False)
    config = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config | {"activation_fn": "nowhere.X"}))
    assert isinstance(load_cross_encoder(find_model(tmp_path), own_networks=True).activation_fn, torch.nn.Identity)
    with pytest.raises(InputError, match="cannot be exported"):
        load_cross_encoder(find_model(tmp_path))
    with pytest.raises(InputError, match=r"omit max_length \(--set max_length=null\)"):
        load_cross_encoder(find_model(tmp_path), own_networks=True, max_length=16)
    modules = (tmp_path / "modules.json").read_text()
    (tmp_path / "modules.json").write_text(modules.replace("retrieval_kd.models.tk.TK", "elsewhere.TK"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_cross_encoder(find_model(tmp_path), own_networks=True)
