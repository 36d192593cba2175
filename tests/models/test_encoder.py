from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.models.encoder import DenseEncoder, token_lengths
from retrieval_kd.models.encoders import open_encoder
from retrieval_kd.models.vectors_of_texts import Truncation

PROMPTS = {"query": "query: ", "document": "passage: "}
TEXTS = ["w1 w41", "w2 w3 w4 w5 w6 w7 w8 w9 w10", "w3"]


def stock(path: Path, texts: list[str], **arguments: object) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return np.asarray(SentenceTransformer(str(path)).encode(texts, show_progress_bar=False, **arguments))


def test_vectors_are_sentence_transformers_own(dense: Path) -> None:
    encoder = DenseEncoder.load(dense)
    expected = stock(dense, TEXTS)
    for vectors in (encoder.encode_queries(TEXTS), encoder.encode_documents(TEXTS)):
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, expected)
    assert (encoder.dimension, encoder.similarity) == (16, "cosine")
    assert encoder.encode_queries([]).shape == (0, 16)


def test_builtin_is_all_minilm() -> None:
    """The published facts of all-MiniLM-L6-v2: 384 dimensions, unit length, 256 tokens; like things are close."""
    encoder = DenseEncoder.load("builtin")
    vectors = encoder.encode_documents(["a cat sleeps", "the kitten is asleep", "stock market prices"])
    assert encoder.dimension == 384 and encoder.model.max_seq_length == 256
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]


def test_prompts_and_lengths(tmp_path: Path) -> None:
    """Query: [CLS] query : w2 w3 [SEP] are 6 tokens; document: [CLS] passage : w2 w3 w4 w5 [SEP] are 8."""
    model = tiny.make_dense(tmp_path / "prompted", prompts=PROMPTS, lengths=(6, 8))
    bare = tmp_path / "prompted-plain"
    encoder = DenseEncoder.load(model)
    texts = ["w2 w3 w4 w5 w6 w7 w8"]
    np.testing.assert_allclose(encoder.encode_queries(texts), stock(bare, ["query: w2 w3"]), atol=1e-6)
    assert encoder.truncation == Truncation(1, (1 + 2 + 7 + 1) - 6)
    np.testing.assert_allclose(encoder.encode_documents(texts), stock(bare, ["passage: w2 w3 w4 w5"]), atol=1e-6)
    assert encoder.truncation == Truncation(2, 5 + (11 - 8))


def test_truncation_at_the_models_length(dense: Path) -> None:
    """32 tokens with [CLS] and [SEP]: 30 words fit, 31 lose one, 40 lose ten."""
    encoder = DenseEncoder.load(dense)
    encoder.encode_documents([" ".join(tiny.WORDS[:n]) for n in (30, 31, 40)])
    assert encoder.truncation.to_json() == {"truncated_texts": 2, "tokens_lost": 11}


def test_token_lengths_of_texts_and_pairs() -> None:
    tokenizer = tiny.tokenizer()
    assert token_lengths(tokenizer, ["", "w1 w2 w3"]) == [2, 5]
    assert token_lengths(tokenizer, ["w1", "w1 w2"], ["w3 w4", "w5"]) == [6, 6]


def test_nan_weights(tmp_path: Path) -> None:
    encoder = DenseEncoder.load(tiny.spoil(tiny.make_dense(tmp_path / "spoilt")))
    assert np.isfinite(encoder.encode_documents(["w1 w2"])).all()
    with pytest.raises(RetrievalKDError, match=r"NaN or infinite vectors for 1 of 2 document texts \(first: 'w2 w7'\)"):
        encoder.encode_documents(["w1", "w2 w7"])


def test_similarity_of_the_model(tmp_path: Path) -> None:
    assert DenseEncoder.load(tiny.make_dense(tmp_path / "dot", similarity="dot")).similarity == "dot"
    with pytest.raises(InputError, match="similarity 'euclidean' is not supported"):
        assert DenseEncoder.load(tiny.make_dense(tmp_path / "euclidean", similarity="euclidean")).similarity


def test_batches_by_length_change_nothing(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts come back in their order, whatever shares a batch with them."""
    texts = [" ".join(tiny.WORDS[: 1 + (7 * n) % 29]) for n in range(40)]
    encoder = DenseEncoder.load(dense)
    expected = stock(dense, texts)
    for budget in (1, 64, 2048):
        monkeypatch.setattr("retrieval_kd.models.encoder.CPU_TOKENS", budget)
        np.testing.assert_allclose(encoder.encode_documents(texts), expected, atol=1e-5)


def test_opened_for_encoding_gives_the_same_vectors() -> None:
    """oneDNN's layers against torch's own, on the real model."""
    texts = ["a cat sleeps", "stock market prices fell sharply " * 20, "x"]
    found = open_encoder("builtin").encode(texts, "document").vectors
    np.testing.assert_allclose(found, DenseEncoder.load("builtin").encode_documents(texts), atol=1e-5)
    assert isinstance(open_encoder("builtin"), DenseEncoder)
