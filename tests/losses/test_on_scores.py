"""Losses on scores against hand-worked numbers, float64 references, sentence-transformers and invariances."""

import math

import numpy as np
import pytest
import torch

from retrieval_kd.losses.on_representations import embedding_regression
from retrieval_kd.losses.on_scores import info_nce, kl_divergence, margin_mse

STUDENT = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 5.0]])
TEACHER = torch.tensor([[5.0, 1.0, 1.0], [0.0, 1.0, 9.0]])
FULL = torch.ones(2, 3, dtype=torch.bool)


def test_margin_mse_by_hand():
    # row 0: student margins 2, 3; teacher 4, 4 -> (-2)^2, (-1)^2; row 1: 0, -3; teacher -1, -9 -> 1^2, 6^2
    assert margin_mse(STUDENT, TEACHER, FULL).item() == pytest.approx((4 + 1 + 1 + 36) / 4)


def test_margin_mse_all_pairs_is_twice_the_variance_of_the_difference():
    difference = (STUDENT - TEACHER).double().numpy()
    # over ordered pairs i != j of N: mean of squares = 2 * var * N / (N - 1)
    expected = np.mean(2 * difference.var(axis=1) * 3 / 2)
    assert margin_mse(STUDENT, TEACHER, FULL, pairs="all").item() == pytest.approx(expected)


def test_kl_by_hand():
    student = torch.tensor([[0.0, math.log(3.0)]])
    teacher = torch.tensor([[0.0, 0.0]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(student, teacher, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(expected)


def test_info_nce_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0), 7.0]])
    mask = torch.tensor([[True, True, False]])
    assert info_nce(scores, torch.tensor([1]), mask).item() == pytest.approx(-math.log(0.75))
    # temperature 1/2 squares the odds: 9 to 1
    assert info_nce(scores, torch.tensor([1]), mask, temperature=0.5).item() == pytest.approx(-math.log(0.9))


def test_embedding_regression_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert embedding_regression(student, teacher).item() == pytest.approx(1.0)
    assert embedding_regression(student, teacher, distance="cosine").item() == pytest.approx(0.5)


def _random(seed, rows=5, columns=7):
    rng = np.random.default_rng(seed)
    student = torch.tensor(rng.normal(size=(rows, columns)) * 3)
    teacher = torch.tensor(rng.normal(size=(rows, columns)) * 4)
    mask = torch.tensor(rng.random((rows, columns)) < 0.7)
    mask[:, :2] = True
    return student, teacher, mask


def _reference_margin_mse(s, t, m):
    values = [
        ((s[b, 0] - s[b, n]) - (t[b, 0] - t[b, n])) ** 2
        for b in range(len(s))
        for n in range(1, s.shape[1])
        if m[b, 0] and m[b, n]
    ]
    return np.mean(values)


def _reference_kl(s, t, m, ts, tt):
    total = []
    for b in range(len(s)):
        p = np.exp(t[b, m[b]] / tt) / np.exp(t[b, m[b]] / tt).sum()
        q = np.exp(s[b, m[b]] / ts) / np.exp(s[b, m[b]] / ts).sum()
        total.append((p * np.log(p / q)).sum())
    return ts**2 * np.mean(total)


@pytest.mark.parametrize("seed", range(4))
def test_masked_losses_equal_a_float64_reference(seed):
    student, teacher, mask = _random(seed)
    s, t, m = student.numpy(), teacher.numpy(), mask.numpy()
    assert margin_mse(student, teacher, mask).item() == pytest.approx(_reference_margin_mse(s, t, m), rel=1e-12)
    got = kl_divergence(student, teacher, mask, student_temperature=2.0, teacher_temperature=0.5).item()
    assert got == pytest.approx(_reference_kl(s, t, m, 2.0, 0.5), rel=1e-12)


LOSSES = [
    margin_mse,
    lambda s, t, m: margin_mse(s, t, m, pairs="all"),
    kl_divergence,
    lambda s, t, m: kl_divergence(s, t, m, student_temperature=3.0, teacher_temperature=2.0),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_added_to_the_teacher_changes_nothing(loss):
    student, teacher, mask = _random(1)
    assert loss(student, teacher + 5, mask).item() == pytest.approx(loss(student, teacher, mask).item(), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_other_documents_changes_nothing(loss):
    student, teacher, mask = _random(2)
    order = [0, 4, 2, 6, 1, 3, 5]
    moved = loss(student[:, order], teacher[:, order], mask[:, order]).item()
    assert moved == pytest.approx(loss(student, teacher, mask).item(), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_slots_have_no_influence_and_no_gradient_even_when_nan(loss):
    student, teacher, mask = _random(3)
    student.requires_grad_(True)
    spoiled = teacher.masked_fill(~mask, float("nan"))
    value = loss(student, spoiled, mask)
    value.backward()
    assert value.item() == pytest.approx(loss(student, teacher, mask).item(), rel=1e-12)
    assert torch.isfinite(student.grad).all()
    assert (student.grad[~mask] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_formula(loss):
    student, teacher, mask = _random(4)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), (student,))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_with_one_usable_document_teaches_nothing(loss):
    student, teacher, mask = _random(5, rows=2)
    mask[1] = False
    mask[1, 0] = True
    assert loss(student, teacher, mask).item() == pytest.approx(loss(student[:1], teacher[:1], mask[:1]).item())
    nothing = torch.zeros_like(mask)
    assert loss(student, teacher, nothing).item() == 0.0


def test_equal_to_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss

    generator = torch.Generator().manual_seed(0)
    query, *documents = (torch.randn(4, 8, generator=generator) for _ in range(5))
    teacher = torch.randn(4, 4, generator=generator)
    student = torch.stack([(query * document).sum(1) for document in documents], dim=1)
    full = torch.ones(4, 4, dtype=torch.bool)
    theirs = MarginMSELoss(model=None).compute_loss_from_embeddings([query, *documents], teacher)
    assert margin_mse(student, teacher, full).item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs = DistillKLDivLoss(model=None, temperature=2.0).compute_loss_from_embeddings([query, *documents], teacher)
    ours = kl_divergence(student, teacher, full, student_temperature=2.0, teacher_temperature=2.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
