"""Losses on scores against hand-worked numbers, float64 references and the invariances in `loss_table`."""

import math

import pytest
import torch
from loss_table import LOSSES, random_rows

from retrieval_kd.losses.on_scores import (
    info_nce,
    kl_divergence,
    list_net,
    margin_mse,
    mse,
    rank_net,
    reverse_kl,
    taid,
    without_false_negatives,
)
from retrieval_kd.losses.sinkhorn import sinkhorn

STUDENT = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 5.0]])
TEACHER = torch.tensor([[5.0, 1.0, 1.0], [0.0, 1.0, 9.0]])
FULL = torch.ones(2, 3, dtype=torch.bool)
# the softmax of LEANS is 1/4, 3/4; of EVEN 1/2, 1/2
LEANS, EVEN, PAIR = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def test_margin_mse_by_hand():
    # row 0: student margins 2, 3; teacher 4, 4 -> (-2)^2, (-1)^2; row 1: 0, -3; teacher -1, -9 -> 1^2, 6^2
    assert margin_mse(STUDENT, TEACHER, FULL).item() == pytest.approx((4 + 1 + 1 + 36) / 4)
    # the third pair of each row: student 1, teacher 0 -> 1; student -3, teacher -8 -> 25
    assert margin_mse(STUDENT, TEACHER, FULL, pairs="all").item() == pytest.approx((4 + 1 + 1 + 1 + 36 + 25) / 6)


def test_mse_by_hand():
    assert mse(STUDENT, TEACHER, FULL).item() == pytest.approx((4 + 0 + 1 + 4 + 1 + 16) / 6)


def test_kl_both_ways_and_listnet_by_hand():
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(LEANS, EVEN, PAIR).item() == pytest.approx(forward)
    assert reverse_kl(LEANS, EVEN, PAIR).item() == pytest.approx(backward)
    assert list_net(LEANS, EVEN, PAIR).item() == pytest.approx(-0.5 * math.log(0.25) - 0.5 * math.log(0.75))
    # temperature 1/2 squares the odds of 3 to 1, and the sum is multiplied by 1/4
    assert reverse_kl(LEANS, EVEN, PAIR, student_temperature=0.5).item() == pytest.approx(
        (0.1 * math.log(0.1 / 0.5) + 0.9 * math.log(0.9 / 0.5)) / 4
    )


def test_ground_truth_is_mixed_into_the_target():
    # 0.2 of the label and 0.8 of (1/2, 1/2): 0.6, 0.4; with the label on the second slot 0.4, 0.6
    for loss, entropy in ((kl_divergence, 0.6 * math.log(0.6) + 0.4 * math.log(0.4)), (list_net, 0.0)):
        on_first = loss(LEANS, EVEN, PAIR, ground_truth=0.2)
        assert on_first.item() == pytest.approx(entropy - 0.6 * math.log(0.25) - 0.4 * math.log(0.75))
        on_second = loss(LEANS, EVEN, PAIR, ground_truth=0.2, positive=torch.tensor([1]))
        assert on_second.item() == pytest.approx(entropy - 0.4 * math.log(0.25) - 0.6 * math.log(0.75))
    assert kl_divergence(LEANS, EVEN, PAIR, ground_truth=1.0).item() == pytest.approx(-math.log(0.25))
    # a positive whose teacher score is missing is no target
    three = torch.tensor([[7.0, 0.0, math.log(3.0)]]), torch.zeros(1, 3), torch.tensor([[False, True, True]])
    assert list_net(*three, ground_truth=0.2).item() == pytest.approx(list_net(LEANS, EVEN, PAIR).item())


def test_rank_net_by_hand():
    teacher = torch.tensor([[4.0, 1.0, 1.0]])  # two pairs: the first over each other one; ranks 1, 2, 2
    student = torch.tensor([[0.0, math.log(3.0), 0.0]])
    losses = math.log(4), math.log(2)  # log(1 + 3), log(1 + 1)
    full = torch.ones(1, 3, dtype=torch.bool)
    for weights, w in (("none", 1.0), ("gap", 3.0), ("rank", 1 / 3)):
        assert rank_net(student, teacher, full, weights=weights).item() == pytest.approx(w * sum(losses) / 2)


def test_info_nce_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0), 7.0]])
    mask = torch.tensor([[True, True, False]])
    assert info_nce(scores, torch.tensor([1]), mask).item() == pytest.approx(-math.log(0.75))
    # temperature 1/2 squares the odds: 9 to 1
    assert info_nce(scores, torch.tensor([1]), mask, temperature=0.5).item() == pytest.approx(-math.log(0.9))
    # a masked positive leaves the row out
    assert info_nce(scores, torch.tensor([2]), mask).item() == 0.0


def test_taid_goes_from_the_student_to_the_teacher():
    for t, expected in ((0.0, LEANS), (1.0, EVEN), (0.5, LEANS / 2)):
        assert taid(LEANS, EVEN, PAIR, t=t).item() == pytest.approx(list_net(LEANS, expected, PAIR).item())
    student = LEANS.clone().requires_grad_(True)
    taid(student, EVEN, PAIR, t=0.0).backward()
    assert student.grad.abs().max().item() < 1e-7  # a student that follows itself does not move
    student.grad = None
    # t = 1/2: odds of √3 to 1 in the target; the gradient is student minus target
    taid(student, EVEN, PAIR, t=0.5).backward()
    share = 1 / (1 + math.sqrt(3))
    assert student.grad[0].tolist() == pytest.approx([0.25 - share, share - 0.25])


def test_sinkhorn_by_hand():
    # one row: the whole mass goes from the teacher's (1/2, 1/2) to the student's (1/4, 3/4)
    assert sinkhorn(LEANS, EVEN, PAIR, columns="documents").item() == pytest.approx(0.5)
    # ranked by a teacher that says (3/4, 1/4): the student's row becomes (3/4, 1/4) too
    backwards = LEANS.flip(1)
    assert sinkhorn(LEANS, LEANS, PAIR, columns="ranks").item() == pytest.approx(0.0, abs=1e-6)
    assert sinkhorn(LEANS, backwards, PAIR, columns="ranks").item() == pytest.approx(1.0)
    # two rows whose students have swapped answers: each is 0 from the other's teacher and 1 from its own
    student, teacher = torch.cat([backwards, LEANS]), torch.cat([LEANS, backwards])
    crossed = sinkhorn(student, teacher, PAIR.expand(2, 2), columns="documents", regularisation=0.5)
    # the plan is symmetric, with odds of exp(-1/0.5) for the costly half
    assert crossed.item() == pytest.approx(math.exp(-2) / (1 + math.exp(-2)), rel=1e-5)
    # where exp(-1/0.001) underflows, the plan still goes the free way
    free = sinkhorn(student, teacher, PAIR.expand(2, 2), columns="documents", regularisation=1e-3)
    assert free.item() == pytest.approx(0.0, abs=1e-6)


def test_false_negatives_are_dropped_by_the_teacher():
    mask = torch.tensor([[True, True, True, True], [True, True, True, True], [True, True, True, False]])
    teacher = torch.tensor([[0.8, 0.79, 0.7, math.nan], [math.nan, 9.0, 9.0, 9.0], [-2.0, -2.05, -2.2, 5.0]])
    positive = torch.zeros(3, dtype=torch.int64)
    known = teacher.isfinite()
    kept = without_false_negatives(mask, teacher, known, positive, relative=0.95)
    # bars 0.76, none (the positive is unknown), -2.1
    assert kept.tolist() == [[True, False, True, True], [True] * 4, [True, False, True, False]]
    kept = without_false_negatives(mask, teacher, known, positive, margin=0.15)
    # bars 0.65, none, -2.15
    assert kept.tolist() == [[True, False, False, True], [True] * 4, [True, False, True, False]]
    assert without_false_negatives(mask, teacher, known, positive).equal(mask)
    # the positive's column, wherever it is; an equal score is not above
    third = torch.tensor([2])
    teacher = torch.tensor([[2.0, 3.0, 3.0, 4.0]])
    kept = without_false_negatives(mask[:1], teacher, teacher.isfinite(), third, margin=0.0)
    assert kept.tolist() == [[True, True, True, False]]


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_reference(loss, seed):
    student, teacher, mask = random_rows(seed)
    expected = loss.reference(student.numpy(), teacher.numpy(), mask.numpy())
    assert loss.call(student, teacher, mask).item() == pytest.approx(expected, rel=1e-10)


@every_loss
def test_a_constant_added_to_a_row_changes_nothing(loss):
    student, teacher, mask = random_rows(1)
    value = loss.call(student, teacher, mask).item()
    shifts = torch.arange(1.0, 6.0, dtype=torch.float64).unsqueeze(1)
    for shifted in ((student, teacher + shifts), (student - shifts, teacher)):
        assert (loss.call(*shifted, mask).item() == pytest.approx(value, rel=1e-9)) is loss.shift


@every_loss
def test_the_order_of_documents_and_of_queries_changes_nothing(loss):
    student, teacher, mask = random_rows(2)
    value = loss.call(student, teacher, mask).item()
    order = [4, 0, 2, 6, 1, 3, 5] if loss.order == "all" else [0, 4, 2, 6, 1, 3, 5]
    assert loss.call(student[:, order], teacher[:, order], mask[:, order]).item() == pytest.approx(value, rel=1e-9)
    rows = [3, 1, 4, 0, 2]
    # the plan of Sinkhorn has not wholly converged, so that it is equal to fewer digits
    assert loss.call(student[rows], teacher[rows], mask[rows]).item() == pytest.approx(value, rel=1e-6)


@every_loss
@pytest.mark.parametrize("anything", [math.nan, math.inf, 1e30])
def test_masked_slots_have_no_influence_and_no_gradient(loss, anything):
    student, teacher, mask = random_rows(3)
    value = loss.call(student, teacher, mask).item()
    student = student.masked_fill(~mask, anything).requires_grad_(True)
    spoiled = loss.call(student, teacher.masked_fill(~mask, anything), mask)
    spoiled.backward()
    assert spoiled.item() == pytest.approx(value, rel=1e-12)
    assert torch.isfinite(student.grad).all()
    assert (student.grad[~mask] == 0).all()
    assert (student.grad[mask] != 0).any()


@every_loss
def test_gradients_are_those_of_the_formula(loss):
    student, teacher, mask = random_rows(4, rows=3, columns=5)
    student.requires_grad_(True)
    teacher.requires_grad_(True)
    value = loss.call(student, teacher, mask)
    (_, to_teacher) = torch.autograd.grad(value, (student, teacher), allow_unused=True)
    assert to_teacher is None  # the teacher is a constant
    if loss.still:
        assert torch.autograd.gradcheck(lambda s: loss.call(s, teacher.detach(), mask), (student,))


@every_loss
def test_a_row_with_one_usable_document_teaches_nothing(loss):
    student, teacher, mask = random_rows(5, rows=2)
    mask[1] = False
    mask[1, 0] = True
    both, alone = loss.call(student, teacher, mask).item(), loss.call(student[:1], teacher[:1], mask[:1]).item()
    assert (both == pytest.approx(alone, rel=1e-12)) is not loss.single


@every_loss
@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (1, 1)])
def test_nothing_usable_is_exactly_zero_and_has_a_graph(loss, shape):
    student = torch.full(shape, math.nan, requires_grad=True)
    value = loss.call(student, torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert (student.grad == 0).all()


@every_loss
def test_one_document_a_query_counts_zero(loss):
    if not loss.single:
        student = torch.ones(3, 1, requires_grad=True)
        value = loss.call(student, torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool))
        value.backward()
        assert value.item() == 0.0 and (student.grad == 0).all()


@every_loss
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, half):
    student, teacher, mask = random_rows(6)
    student, teacher = student.to(half), teacher.float()
    value = loss.call(student, teacher, mask)
    assert value.dtype is torch.float32
    assert value.item() == loss.call(student.float(), teacher, mask).item()
    low = teacher.to(half)
    assert loss.call(student, low, mask).item() == loss.call(student.float(), low.float(), mask).item()


@every_loss
def test_equal_teacher_scores_give_a_number(loss):
    student, teacher, mask = random_rows(7)
    student.requires_grad_(True)
    value = loss.call(student, torch.full_like(teacher, 2.5), mask)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()


def test_kl_of_large_temperature_is_margin_mse_over_all_pairs():
    student, teacher, _ = random_rows(8)
    full = torch.ones_like(student, dtype=torch.bool)
    n = student.shape[1]
    # half the variance of the difference; Margin-MSE is twice the variance, times N / (N - 1) without i = j
    limit = margin_mse(student, teacher, full, pairs="all").item() * (n - 1) / n / 4
    hot = {"student_temperature": 1e4, "teacher_temperature": 1e4}
    for loss in (kl_divergence, reverse_kl):
        assert loss(student, teacher, full, **hot).item() == pytest.approx(limit, rel=1e-2)
    warm = {"student_temperature": 1.0, "teacher_temperature": 1.0}
    assert kl_divergence(student, teacher, full, **warm).item() != pytest.approx(limit, rel=0.1)


def test_listnet_has_the_gradient_of_kl():
    student, teacher, mask = random_rows(9)
    student.requires_grad_(True)
    settings = {"student_temperature": 2.0, "teacher_temperature": 0.5, "ground_truth": 0.1}
    (one,) = torch.autograd.grad(kl_divergence(student, teacher, mask, **settings), student)
    (other,) = torch.autograd.grad(list_net(student, teacher, mask, **settings), student)
    torch.testing.assert_close(one, other)
