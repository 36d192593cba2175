from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_rerankers
import torch

from retrieval_kd.errors import InputError


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return tiny_rerankers.make_base(shared / "prettr-base")


def distilbert(folder: Path) -> Path:
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=68, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64, initializer_range=0.3
    )
    DistilBertModel(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_no_layer_apart_is_an_ordinary_cross_encoder(architecture: str, base: Path, tmp_path: Path) -> None:
    """[CLS] w1 w2 [SEP] at 0 to 3, w3 w1 w5 w6 [SEP] from 8 on with token type 1: the base's own [CLS], linear."""
    from transformers import AutoModel

    path = base if architecture == "bert" else distilbert(tmp_path / "distilbert")
    network = tiny_rerankers.make_prettr(path, layers_apart=0)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[2, 6, 7, 3, 8, 6, 10, 11, 3]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 8, 9, 10, 11, 12]]),
    }
    if architecture == "bert":
        inputs["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 5])
    first = AutoModel.from_pretrained(path).eval()(**inputs).last_hidden_state[:, 0]
    expected = (first @ network.head.weight.T).item()
    found = tiny_rerankers.in_cross_encoder(network).predict([("w1 w2", "w3 w1 w5 w6")])
    assert found.tolist() == pytest.approx([expected], abs=1e-5)
    assert tiny_rerankers.make_prettr(path).scores(
        network.tokenize_queries(["w1 w2"]), network.tokenize_documents(["w3 w1 w5 w6"])
    ).item() != pytest.approx(expected, abs=1e-3)


def test_stored_states_are_those_of_the_document_alone(base: Path) -> None:
    """One layer of the base over ``w3 w1 [SEP]`` at 8, 9 and 10, token type 1."""
    from transformers import BertModel

    first = BertModel.from_pretrained(base, num_hidden_layers=1).eval()
    positions, types = torch.tensor([[8, 9, 10]]), torch.ones(1, 3, dtype=torch.long)
    ids = torch.tensor([[8, 6, 3]])
    expected = first(input_ids=ids, position_ids=positions, token_type_ids=types).last_hidden_state[0]
    states = tiny_rerankers.make_prettr(base).document_states(["w3 w1", "w5 " * 30, ""], batch_size=2)
    torch.testing.assert_close(states[0], expected, atol=1e-5, rtol=1e-4)
    assert [len(state) for state in states] == [3, 16, 1]


@pytest.mark.parametrize("batch_size", [2, 32])
def test_scores_from_stored_states_are_those_from_text(base: Path, batch_size: int) -> None:
    """Equal to 1e-5 in float32, to 1e-3 when stored in float16."""
    network = tiny_rerankers.make_prettr(base)
    query, documents = "w1 w2 w3 w4 w5 w6 w7 w8", [document for _, document in tiny_rerankers.PAIRS]
    expected = tiny_rerankers.in_cross_encoder(network).predict([(query, document) for document in documents])
    states = network.document_states(documents, batch_size=batch_size)
    found = network.score_states(query, states, batch_size=batch_size).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    half = network.document_states(documents, dtype=torch.float16)
    assert {state.dtype for state in half} == {torch.float16}
    np.testing.assert_allclose(network.score_states(query, half).numpy(), expected, atol=1e-3, rtol=0)
    assert np.ptp(expected) > 0.04 and len(network.score_states(query, [])) == 0


def test_padding_changes_nothing(base: Path) -> None:
    model = tiny_rerankers.in_cross_encoder(tiny_rerankers.make_prettr(base))
    together = model.predict(tiny_rerankers.PAIRS)
    alone = [model.predict([pair])[0] for pair in tiny_rerankers.PAIRS]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_networks_that_cannot_be(base: Path, tmp_path: Path) -> None:
    from transformers import ElectraConfig, ElectraModel

    with pytest.raises(InputError, match="layers_apart: 2: of 2 layers, the last must see both"):
        tiny_rerankers.make_prettr(base, layers_apart=2)
    with pytest.raises(InputError, match=r"8 \+ 57 tokens, but the base has 64 positions"):
        tiny_rerankers.make_prettr(base, document_length=57)
    sizes = {"vocab_size": 68, "hidden_size": 16, "embedding_size": 16, "num_attention_heads": 2}
    ElectraModel(ElectraConfig(**sizes, num_hidden_layers=2, intermediate_size=32)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the base is a 'electra'; only bert and distilbert can be read apart"):
        tiny_rerankers.make_prettr(tmp_path)
