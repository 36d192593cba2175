"""The same numbers as the losses of sentence-transformers, where both exist."""

import pytest
import torch
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.multi_vector_encoder.losses import MultiVectorDistillKLDivLoss, MultiVectorMarginMSELoss
from sentence_transformers.multi_vector_encoder.scoring import colbert_kd_scores
from sentence_transformers.sentence_transformer.losses import (
    DistillKLDivLoss,
    EmbedDistillLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sparse_encoder.losses import SparseDistillKLDivLoss, SparseMarginMSELoss
from sentence_transformers.util import dot_score

from retrieval_kd.losses.on_representations import embedding_regression
from retrieval_kd.losses.on_scores import info_nce, kl_divergence, list_net, margin_mse

FULL = torch.ones(4, 4, dtype=torch.bool)
TEMPERATURES = {"student_temperature": 2.0, "teacher_temperature": 0.5}


@pytest.fixture(scope="module")
def numbers():
    """Query and document vectors [4, 8] by column, teacher scores [4, 4], student scores [4, 4]."""
    generator = torch.Generator().manual_seed(0)
    query, *documents = (torch.randn(4, 8, generator=generator) for _ in range(5))
    teacher = torch.randn(4, 4, generator=generator)
    return [query, *documents], teacher, torch.stack([(query * document).sum(1) for document in documents], dim=1)


@pytest.mark.parametrize("theirs", [MarginMSELoss, SparseMarginMSELoss])
def test_margin_mse(numbers, theirs):
    embeddings, teacher, student = numbers
    value = theirs(model=None).compute_loss_from_embeddings(embeddings, teacher).item()
    assert margin_mse(student, teacher, FULL).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("theirs", [DistillKLDivLoss, SparseDistillKLDivLoss])
def test_kl(numbers, theirs):
    embeddings, teacher, student = numbers
    value = theirs(model=None, **TEMPERATURES).compute_loss_from_embeddings(embeddings, teacher).item()
    assert kl_divergence(student, teacher, FULL, **TEMPERATURES).item() == pytest.approx(value, rel=1e-5)


class TokensAreGiven(torch.nn.Module):
    """A multi-vector model whose features hold the token embeddings already."""

    def forward(self, features, task=None, **_):
        return features


@pytest.mark.parametrize(
    ("theirs", "settings", "ours"),
    [
        (MultiVectorMarginMSELoss, {}, margin_mse),
        (MultiVectorDistillKLDivLoss, TEMPERATURES, lambda s, t, m: kl_divergence(s, t, m, **TEMPERATURES)),
    ],
)
def test_multi_vector(theirs, settings, ours):
    generator = torch.Generator().manual_seed(1)
    query, *documents = (torch.randn(4, 3, 8, generator=generator) for _ in range(5))
    teacher = torch.randn(4, 4, generator=generator)
    features = [
        {"token_embeddings": x, "attention_mask": torch.ones(4, 3, dtype=torch.int64)} for x in (query, *documents)
    ]
    value = theirs(TokensAreGiven(), **settings)(features, teacher).item()
    student = colbert_kd_scores(query, torch.stack(documents, dim=1))
    assert ours(student, teacher, FULL).item() == pytest.approx(value, rel=1e-5)


def test_info_nce_over_the_batch(numbers):
    embeddings, _, _ = numbers
    query, *documents = embeddings
    loss = MultipleNegativesRankingLoss(model=None, scale=5.0, similarity_fct=dot_score)
    value = loss.compute_loss_from_embeddings(embeddings, None).item()
    student = query @ torch.cat(documents).T
    ours = info_nce(student, torch.arange(4), torch.ones_like(student, dtype=torch.bool), temperature=0.2)
    assert ours.item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("distance", "times"), [("cosine", 1), ("mse", 8)])
def test_embedding_regression(numbers, distance, times):
    (query, document, *_), _, _ = numbers
    theirs = EmbedDistillLoss(model=None, distance_metric=distance)
    # theirs is a mean over the eight dimensions, ours the sum
    value = times * theirs.compute_loss_from_embeddings([query], [document]).item()
    assert embedding_regression(query, document, distance=distance).item() == pytest.approx(value, rel=1e-5)


class LogitsAreGiven(torch.nn.Module):
    """A cross-encoder that answers with given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.num_labels, self.device = logits, 1, torch.device("cpu")

    def preprocess(self, pairs, **_):
        return {"rows": torch.arange(len(pairs))}

    def forward(self, features):
        return {"scores": self.logits}


def test_listnet_of_lists_of_different_length(numbers):
    _, teacher, student = numbers
    mask = torch.tensor([[True, True, True, True], [True, True, True, False], [True, True, False, False], [True] * 4])
    lengths = mask.sum(dim=1).tolist()
    loss = ListNetLoss(LogitsAreGiven(student[mask]), mini_batch_size=-1)
    labels = [row[:n] for row, n in zip(teacher, lengths, strict=True)]
    value = loss([["q"] * 4, [["d"] * n for n in lengths]], labels).item()
    assert list_net(student, teacher, mask).item() == pytest.approx(value, rel=1e-5)
