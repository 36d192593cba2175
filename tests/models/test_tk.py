from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import tiny_rerankers
import torch

from retrieval_kd.errors import InputError
from retrieval_kd.models.tk import MU, KernelPooling, sinusoids, word_embeddings


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return tiny_rerankers.make_base(shared / "tk-base")


def test_kernels_of_two_query_and_three_document_tokens() -> None:
    """By hand: exp(-(cos - mu)² / 0.02), added over the document's tokens, times alpha, log, added over the query's."""
    pooling = KernelPooling()
    pooling.alpha.data[1] = 3.0
    cosine = torch.tensor([[[1.0, 0.9, 0.2], [0.5, -0.1, 1.0]]])
    everything = pooling(cosine, torch.ones(1, 2), torch.ones(1, 3))[0]
    at_one = math.log(1 + math.exp(-0.5) + math.exp(-32)) + math.log(math.exp(-12.5) + math.exp(-60.5) + 1)
    at_nine_tenths = math.log(3 * (math.exp(-0.5) + 1 + math.exp(-24.5))) + math.log(
        3 * (math.exp(-8) + math.exp(-50) + math.exp(-0.5))
    )
    assert everything[0].item() == pytest.approx(at_one, rel=1e-5)
    assert everything[1].item() == pytest.approx(at_nine_tenths, rel=1e-5)
    assert everything[10].item() == pytest.approx(2 * math.log(1e-10), rel=1e-5)  # nothing near -0.9 but e^-32 and less
    masked = pooling(cosine, torch.tensor([[True, False]]), torch.tensor([[True, True, False]]))[0]
    assert masked[0].item() == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-5)
    assert masked[3].item() == pytest.approx(math.log(math.exp(-12.5) + math.exp(-8)), rel=1e-5)
    assert MU == (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)


def test_sinusoids() -> None:
    """sin and cos of p / 10000^(2i/d): for d = 4 the rates are 1 and 1/100."""
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in (0, 1, 2)]
    torch.testing.assert_close(sinusoids(3, 4), torch.tensor(expected))
    torch.testing.assert_close(sinusoids(1, 4, first=2), torch.tensor(expected[2:]))


def test_scores_without_context_count_exact_matches(base: Path) -> None:
    """Words are unit vectors, the mix is all words, the one kernel at 1: the sum of log counts of the query's words.

    [CLS] and [SEP] of both texts are equal, but do not count.
    """
    network = tiny_rerankers.make_tk(base, dimension=68)
    network.embeddings.weight.data = torch.eye(68)
    network.mix.data.fill_(1.0)
    network.weights.data = torch.tensor([1.0] + [0.0] * 10)
    model = tiny_rerankers.in_cross_encoder(network)
    found = model.predict([("w1 w2", "w1 w2 w1"), ("w1", "w3 w1 w1 w1"), ("w1 w2", "w1"), ("", "w1")])
    expected = [math.log(2) + math.log(1), math.log(3), math.log(1e-10), 0.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_context_is_a_transformer_of_each_text_alone(base: Path) -> None:
    """Against the layers with batch_first, on words and their positions; documents' positions begin at 500."""
    network = tiny_rerankers.make_tk(base)
    ids = torch.tensor([[5 + 3, 5 + 1, 5 + 7, 3]])
    words = network.embeddings(ids)
    states = words + sinusoids(4, 16, 500)
    for layer in network.context.layers:
        first = torch.nn.TransformerEncoderLayer(16, 2, 20, dropout=0.0, batch_first=True)
        first.load_state_dict(layer.state_dict())
        states = first(states)
    network.mix.data.fill_(0.25)
    tokens = network.tokenize_documents(["w3 w1 w7"])
    assert tokens.ids.tolist() == ids.tolist()
    torch.testing.assert_close(network._contextual(tokens, 500), 0.25 * words + 0.75 * states)


def test_padding_changes_nothing(base: Path) -> None:
    model = tiny_rerankers.in_cross_encoder(tiny_rerankers.make_tk(base))
    together = model.predict(tiny_rerankers.PAIRS)
    alone = [model.predict([pair])[0] for pair in tiny_rerankers.PAIRS]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert len({round(float(score), 3) for score in together}) == 4


def test_base_words_get_the_length_of_random_ones(base: Path, tmp_path: Path) -> None:
    """√16 on average, in the base's proportions."""
    from transformers import BertModel

    own = BertModel.from_pretrained(base).embeddings.word_embeddings.weight.detach()
    words = word_embeddings(base, tiny_rerankers.tokenizer(base))
    assert words.norm(dim=1).mean().item() == pytest.approx(4.0)
    torch.testing.assert_close(words, own * (words[7, 0] / own[7, 0]))
    small = BertModel(tiny.bert_config(1))
    small.resize_token_embeddings(60)
    small.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="60 word embeddings, but its tokenizer has 68 words"):
        word_embeddings(tmp_path, tiny_rerankers.tokenizer(base))


def test_networks_that_cannot_be(base: Path) -> None:
    with pytest.raises(InputError, match="heads: 3 heads"):
        tiny_rerankers.make_tk(base, heads=3)
    without = tiny_rerankers.tokenizer(base)
    without.cls_token = None
    with pytest.raises(InputError, match="no \\[CLS\\]"):
        type(tiny_rerankers.make_tk(base))(without, dimension=16)
