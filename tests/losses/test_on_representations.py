"""Losses on representations against hand-worked numbers, float64 references and invariances."""

import math

import numpy as np
import pytest
import torch

from retrieval_kd.errors import UsageError
from retrieval_kd.losses.on_representations import BilinearCritic, embedding_regression, mi_alpha, minilm_relations


def test_embedding_regression_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert embedding_regression(student, teacher).item() == pytest.approx(1.0)
    assert embedding_regression(student, teacher, distance="cosine").item() == pytest.approx(0.5)
    assert embedding_regression(student.bfloat16(), teacher).dtype is torch.float32


# a critic that gives a text's own vectors odds of 3 to 1 against the other text's
SCORES = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])


def test_mi_alpha_by_hand():
    zero = torch.tensor(0.0)
    # alpha 1: mean exp f = 2, so 1 + log(3/2) - 1
    assert mi_alpha(SCORES, zero, alpha=1.0).item() == pytest.approx(-math.log(1.5))
    # alpha 0 with baseline e^0: 1 + log 3 - 2; with the best baseline log 2: log 3 - log 2 again
    assert mi_alpha(SCORES, zero, alpha=0.0).item() == pytest.approx(-(1 + math.log(3) - 2))
    assert mi_alpha(SCORES, torch.tensor(math.log(2)), alpha=0.0).item() == pytest.approx(-math.log(1.5))
    # alpha 1/2: the baseline is (2 + 1) / 2
    assert mi_alpha(SCORES, zero, alpha=0.5).item() == pytest.approx(-(1 + math.log(3 / 1.5) - 2 / 1.5))


def test_mi_alpha_is_info_nce_between_the_vectors():
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8
    cross_entropy = torch.nn.functional.cross_entropy(scores.T, torch.arange(5))
    assert mi_alpha(scores, torch.tensor(3.0), alpha=1.0).item() == pytest.approx(cross_entropy.item() - math.log(5))


def _reference_mi_alpha(f, c, alpha):
    m = len(f)
    b = [alpha * np.mean(np.exp(f[:, j])) + (1 - alpha) * math.exp(c) for j in range(m)]
    joint = np.mean([f[j, j] - math.log(b[j]) for j in range(m)])
    product = np.mean([math.exp(f[i, j]) / b[j] for i in range(m) for j in range(m)])
    return -(1 + joint - product)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_mi_alpha_equals_the_reference_and_its_gradient(alpha):
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(True)
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = _reference_mi_alpha(scores.detach().numpy(), 0.7, alpha)
    assert mi_alpha(scores, c, alpha=alpha).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda f, c: mi_alpha(f, c, alpha=alpha), (scores, c))


def test_one_text_has_no_information():
    scores = torch.tensor([[2.0]], requires_grad=True)
    value = mi_alpha(scores, torch.tensor(0.0))
    value.backward()
    assert value.item() == 0.0 and scores.grad.item() == 0.0


def test_the_critic_compares_vectors_of_different_dimensions():
    critic = BilinearCritic(2, 3, scale=20.0)
    student, teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 5.0, 0.0], [0.6, 0.0, 0.8]])
    # it starts with the cosine on the dimensions that both have
    torch.testing.assert_close(critic(student, teacher), torch.tensor([[16.0, 7.2], [20.0, 0.0]]))
    with torch.no_grad():
        critic.weight.copy_(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(critic(student, teacher)[0], 20 * torch.tensor([0.0, 0.8 * 0.6 + 0.6 * 0.8]))
    assert [name for name, _ in critic.named_parameters()] == ["weight", "log_scale", "log_baseline"]


def test_relations_by_hand():
    # one head of one dimension; token 0 holds √(log 3), token 1 nothing: it looks at itself with odds of 3 to 1
    leans = torch.tensor([[[math.sqrt(math.log(3.0))], [0.0]]])
    flat = torch.zeros(1, 2, 1)
    both = torch.ones(1, 2, dtype=torch.bool)
    token0 = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert minilm_relations([(flat, leans)], both, heads=1).item() == pytest.approx(token0 / 2)
    # relations of the two networks add up; equal ones are 0
    assert minilm_relations([(flat, leans), (flat, leans), (leans, leans)], both, heads=1).item() == pytest.approx(
        token0
    )
    first_only = torch.tensor([[True, False]])
    assert minilm_relations([(flat, leans)], first_only, heads=1).item() == pytest.approx(0.0)


def _reference_relations(student, teacher, mask, heads):
    values = []
    for b in range(len(student)):
        tokens = [i for i in range(mask.shape[1]) if mask[b, i]]
        for h in range(heads):
            for i in tokens:
                rows = []
                for states in (teacher, student):
                    d = states.shape[2] // heads
                    x = states[b][:, h * d : (h + 1) * d]
                    e = [math.exp(x[i] @ x[j] / math.sqrt(d)) for j in tokens]
                    rows.append([y / sum(e) for y in e])
                values.append(sum(p * math.log(p / q) for p, q in zip(*rows, strict=True)))
    return np.mean(values)


def _states(seed, width):
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOKENS = torch.tensor([[True] * 5, [True, True, True, False, False], [True, True, True, True, False]])


def test_relations_equal_the_reference_for_networks_of_different_width():
    pairs = [(_states(0, 8), _states(1, 12)), (_states(2, 8), _states(3, 12))]
    expected = sum(_reference_relations(s.numpy(), t.numpy(), TOKENS.numpy(), 4) for s, t in pairs)
    assert minilm_relations(pairs, TOKENS, heads=4).item() == pytest.approx(expected, rel=1e-10)


def test_relations_ignore_padding_and_the_order_of_tokens_and_have_the_right_gradient():
    student, teacher = _states(4, 4), _states(5, 8)
    value = minilm_relations([(student, teacher)], TOKENS, heads=2).item()
    spoiled = [x.masked_fill(~TOKENS.unsqueeze(2), math.nan).requires_grad_(True) for x in (student, teacher)]
    loss = minilm_relations([(spoiled[0], spoiled[1])], TOKENS, heads=2)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert (spoiled[0].grad[~TOKENS] == 0).all() and torch.isfinite(spoiled[0].grad).all()
    assert spoiled[1].grad is None
    order = [3, 0, 4, 2, 1]
    moved = minilm_relations([(student[:, order], teacher[:, order])], TOKENS[:, order], heads=2).item()
    assert moved == pytest.approx(value, rel=1e-10)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: minilm_relations([(s, teacher)], TOKENS, heads=2), (student,))


def test_no_tokens_are_exactly_zero():
    student = _states(6, 4).requires_grad_(True)
    value = minilm_relations([(student, _states(7, 4))], torch.zeros_like(TOKENS), heads=2)
    value.backward()
    assert value.item() == 0.0 and (student.grad == 0).all()


def test_relation_heads_must_divide_the_width():
    with pytest.raises(UsageError, match="'minilm-relations': 3 relation heads do not divide a width of 8"):
        minilm_relations([(_states(0, 8), _states(1, 12))], TOKENS, heads=3)
