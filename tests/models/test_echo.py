"""A causal model that reads twice, against its network run by hand on one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_language_models
import tiny_sparse

from retrieval_kd.errors import InputError
from retrieval_kd.models.echo import EchoTransformer

TEXTS = ["w1 w2 w3", "w5", "w1 w2 w3 w4 w5 w6"]


def sparse(module: EchoTransformer) -> Any:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    return SparseEncoder(modules=[module, SpladePooling("max", embedding_dimension=68)], similarity_fn_name="dot")


def expected(network: Any, words: list[int]) -> np.ndarray:
    """[CLS] w w: the largest of the last half."""
    ids = [5 + word for word in words]
    return np.asarray(tiny_sparse.heads_of(network, [2, *ids, *ids])[1 + len(ids) :].max(axis=0))


def test_only_the_second_copy_is_pooled(tmp_path: Path) -> None:
    module = EchoTransformer.of(str(tiny_sparse.make_causal(tmp_path / "llama")))
    found = sparse(module).encode_document(TEXTS, convert_to_sparse_tensor=False).numpy()
    for row, words in zip(found, ([1, 2, 3], [5], [1, 2, 3, 4, 5, 6]), strict=True):
        np.testing.assert_allclose(row, expected(module.model, words), atol=1e-5)
    assert sparse(module).encode_document([""]).to_dense().abs().max() == 0


def test_the_output_is_tied_and_stays_so(tmp_path: Path) -> None:
    """Stock sentence-transformers loads it when it may run this package's module."""
    from sentence_transformers import SparseEncoder

    module = EchoTransformer.of(str(tiny_sparse.make_causal(tmp_path / "llama")))
    model = sparse(module)
    model.save_pretrained(str(tmp_path / "saved"))
    weights = tiny.weights(tmp_path / "saved")
    assert "lm_head.weight" not in weights
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SparseEncoder(str(tmp_path / "saved"))
    stock = SparseEncoder(str(tmp_path / "saved"), trust_remote_code=True)
    np.testing.assert_array_equal(stock.encode(TEXTS).to_dense(), model.encode(TEXTS).to_dense())
    assert stock[0].model.lm_head.weight is stock[0].model.model.embed_tokens.weight


def test_lengths_and_prompts_are_of_one_copy(tmp_path: Path) -> None:
    """[CLS] and three words fit in 4 tokens; the prompt ``query: `` is two of them."""
    folder = str(tiny_sparse.make_causal(tmp_path / "llama"))
    module = EchoTransformer.of(folder, query_length=4, document_length=3)
    model = sparse(module)

    def encoded(text: str, task: str, prompt: str | None = None) -> np.ndarray:
        encode = model.encode_query if task == "query" else model.encode_document
        return np.asarray(encode([text], prompt=prompt, convert_to_sparse_tensor=False)[0])

    np.testing.assert_allclose(encoded("w1 w2 w3 w4", "query"), expected(module.model, [1, 2, 3]), atol=1e-5)
    np.testing.assert_allclose(encoded("w1 w2 w3 w4", "document"), expected(module.model, [1, 2]), atol=1e-5)
    query, colon = 60, 62
    found = encoded("w1 w2 w3 w4", "query", "query: ")
    np.testing.assert_allclose(found, expected(module.model, [query, colon, 1]), atol=1e-5)


def test_models_with_learned_positions(tmp_path: Path) -> None:
    """Padding on the left does not move a text: GPT-2 gives the same alone and in a batch."""
    folder = tiny_language_models.make_causal(tmp_path / "gpt2", architecture="gpt2")
    model = sparse(EchoTransformer.of(str(folder)))
    together = model.encode(TEXTS, convert_to_sparse_tensor=False)
    for row, text in zip(together, TEXTS, strict=True):
        np.testing.assert_allclose(row, model.encode([text], convert_to_sparse_tensor=False)[0], atol=1e-5)


def test_a_model_that_predicts_no_next_word(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="echo needs a causal language model"):
        EchoTransformer.of(str(tiny_language_models.make_encoder_decoder(tmp_path / "t5")))
