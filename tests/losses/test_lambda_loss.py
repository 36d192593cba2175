"""LambdaLoss on tensors: by hand, against plain loops, and with missing documents."""

import math

import numpy as np
import pytest
import torch

from retrieval_kd.errors import UsageError
from retrieval_kd.losses.lambda_loss import SCHEMES, lambda_loss
from retrieval_kd.losses.objective import Outputs, WeightedLosses
from retrieval_kd.losses.terms import LambdaLoss, refuse_ranks


def reference(student, teacher, mask, scheme, k=None):
    """Wang et al. 2018, equations 10 to 18, in loops over the documents as the student ranks them."""
    values = []
    width = student.shape[1]
    for row in range(len(student)):
        there = [n for n in range(width) if mask[row, n]]
        if len(there) < 2:
            continue
        order = sorted(there, key=lambda n: -student[row, n])
        levels = sorted((max(float(teacher[row, n]), 0.0) for n in there), reverse=True)
        cut = width if k is None else k
        ideal = sum((2**level - 1) / math.log2(2 + rank) for rank, level in enumerate(levels[:cut]))
        gain = [(2 ** max(float(teacher[row, n]), 0.0) - 1) / max(ideal, 1e-10) for n in order]
        discount = [math.log2(2 + rank) for rank in range(width + 1)]
        for i, first in enumerate(order):
            for j, second in enumerate(order):
                if teacher[row, first] <= teacher[row, second] or min(i, j) >= cut:
                    continue
                apart = abs(gain[i] - gain[j])
                near = abs(1 / discount[abs(i - j) - 1] - 1 / discount[abs(i - j)]) * apart
                ranks = abs(1 / discount[i] - 1 / discount[j]) * apart
                weights = {"none": 1.0, "ndcg-loss2": near, "lambda-rank": ranks, "ndcg-loss2++": 10 * near + ranks}
                margin = float(student[row, first] - student[row, second])
                values.append(weights[scheme] * math.log2(1 + math.exp(-margin)))
    return np.mean(values)


def random_rows(rows=5, columns=6):
    rng = np.random.default_rng(4)
    student = torch.tensor(rng.normal(size=(rows, columns)), dtype=torch.float32)
    teacher = torch.tensor(rng.normal(size=(rows, columns)) * 2 + 1, dtype=torch.float32)
    mask = torch.tensor(rng.random((rows, columns)) < 0.7)
    mask[:, :2] = True
    mask[-1, 1:] = False
    return student, teacher, mask


def test_by_hand():
    """Scores 1 and 0, levels 0 and 1: gains 0 and 1, discounts 1 and log2 3; one pair, the wrong way round."""
    student, teacher, mask = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    wrong = math.log2(1 + math.e)
    moved = 1 - 1 / math.log2(3)
    assert lambda_loss(student, teacher, mask, scheme="none").item() == pytest.approx(wrong)
    assert lambda_loss(student, teacher, mask, scheme="lambda-rank").item() == pytest.approx(moved * wrong)
    assert lambda_loss(student, teacher, mask).item() == pytest.approx(11 * moved * wrong)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("scheme", ["none", "ndcg-loss2", "lambda-rank", "ndcg-loss2++"])
def test_against_loops(scheme, k):
    student, teacher, mask = random_rows()
    expected = reference(student, teacher, mask, scheme, k)
    assert lambda_loss(student, teacher, mask, scheme=scheme, k=k).item() == pytest.approx(expected, rel=1e-4)


def test_ndcg_loss1_weighs_by_the_first_document():
    """One pair both ways: its gain 1 over its discount log2 3 for one, gain 0 for the other; a mean over four."""
    student, teacher, mask = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    expected = (math.log2(1 + math.e) + 1) / math.log2(3) / 4
    assert lambda_loss(student, teacher, mask, scheme="ndcg-loss1").item() == pytest.approx(expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_missing_documents_take_no_part(scheme):
    student, teacher, mask = random_rows()
    student.requires_grad_()
    value = lambda_loss(student, teacher, mask, scheme=scheme)
    value.backward()
    assert not student.grad[~mask].any() and student.grad[mask].any()
    changed = student.detach().masked_fill(~mask, 77.0), teacher.masked_fill(~mask, torch.nan)
    assert lambda_loss(*changed, mask, scheme=scheme).item() == pytest.approx(value.item())


def test_order_of_documents_does_not_matter():
    student, teacher, mask = random_rows()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    value = lambda_loss(student, teacher, mask).item()
    assert lambda_loss(student[:, order], teacher[:, order], mask[:, order]).item() == pytest.approx(value, rel=1e-5)


def test_nothing_to_learn_is_zero():
    student = torch.randn(2, 3, requires_grad=True)
    nothing = torch.tensor([[True, False, False], [False, False, False]])
    for teacher, mask in ((torch.full((2, 3), torch.nan), nothing), (torch.ones(2, 3), torch.ones(2, 3) > 0)):
        value = lambda_loss(student, teacher, mask)
        assert value.item() == 0
        value.backward()
    assert not student.grad.any()


def test_the_term_of_a_recipe():
    """Levels from 0 to 4 by min-max, unless said otherwise; made of ranks, they do too."""
    student, teacher, mask = random_rows()
    outputs = Outputs(scores=student, present=mask, teacher=teacher, known=mask)
    low, high = (teacher.masked_fill(~mask, fill) for fill in (torch.inf, -torch.inf))
    low, high = low.min(dim=1, keepdim=True).values, high.max(dim=1, keepdim=True).values
    levels = 4 * (teacher - low) / (high - low)
    term = LambdaLoss(kind="lambda-loss", weight=0.5, scheme="lambda-rank", k=3)
    (value,) = WeightedLosses([term])(outputs).values()
    expected = 0.5 * lambda_loss(student, levels, mask, scheme="lambda-rank", k=3)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    refuse_ranks([term], "rank", "here")
    with pytest.raises(UsageError, match="loss 'lambda-loss' reads their sizes"):
        refuse_ranks([LambdaLoss(kind="lambda-loss", target="none")], "rank", "here")
    assert set(SCHEMES) == set(LambdaLoss.model_fields["scheme"].annotation.__args__)


def test_unknown_scheme():
    with pytest.raises(ValueError, match=r"scheme: 'ndcg' \(valid: none, "):
        lambda_loss(*random_rows(), scheme="ndcg")
