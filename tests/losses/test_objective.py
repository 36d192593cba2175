"""A recipe's terms over a forward pass: each equals its function on the right tensors, and state is kept."""

import dataclasses
import math

import pytest
import torch
from pydantic import TypeAdapter

from retrieval_kd.errors import UsageError
from retrieval_kd.losses import on_scores
from retrieval_kd.losses.moving_target import MovingTarget
from retrieval_kd.losses.objective import Outputs, WeightedLosses
from retrieval_kd.losses.on_representations import BilinearCritic, embedding_regression, mi_alpha, minilm_relations
from retrieval_kd.losses.sinkhorn import sinkhorn
from retrieval_kd.losses.targets import transformed
from retrieval_kd.losses.terms import LossTerm

GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape):
    return torch.randn(*shape, generator=GENERATOR) * 2


# two queries with three slots among four documents; slot 2 of query 1 is empty, slot 1 of query 0 has no score
COLUMN = torch.tensor([[2, 0, 3], [0, 2, 0]])
PRESENT = torch.tensor([[True, True, True], [True, True, False]])
BATCH = _random(2, 4)
TEACHER = torch.tensor([[5.0, 100.0, 4.5], [1.0, 3.0, math.nan]])
KNOWN = torch.tensor([[True, False, True], [True, True, False]])
OUTPUTS = Outputs(
    scores=BATCH.gather(1, COLUMN),
    present=PRESENT,
    teacher=TEACHER,
    known=KNOWN,
    batch_scores=BATCH,
    batch_allowed=torch.tensor([[True, True, True, False], [True, True, True, True]]),
    positive=COLUMN[:, 0],
    batch_teacher=_random(2, 4),
    vectors=_random(6, 4),
    teacher_vectors=_random(6, 4),
    column=COLUMN,
    relations=[(_random(2, 3, 4), _random(2, 3, 8))],
    token_mask=torch.tensor([[True, True, True], [True, True, False]]),
)
SCORES = OUTPUTS.scores
WIDE, ALL = OUTPUTS.batch_teacher, torch.ones(2, 4, dtype=torch.bool)
WARM = {"student_temperature": 2.0, "teacher_temperature": 0.5}


def losses(*items, **arguments):
    terms = TypeAdapter(list[LossTerm]).validate_python([{"kind": i} if isinstance(i, str) else i for i in items])
    return WeightedLosses(terms, **arguments)


def value(item, outputs=OUTPUTS, **arguments):
    (result,) = losses(item, **arguments)(outputs).values()
    return result.item()


def _mi_alpha():
    critic = BilinearCritic(4, 4, scale=3.0)
    return mi_alpha(critic(OUTPUTS.vectors, OUTPUTS.teacher_vectors), critic.log_baseline, alpha=0.5)


WITH = [
    ({"kind": "margin-mse", "pairs": "all"}, lambda: on_scores.margin_mse(SCORES, TEACHER, KNOWN, pairs="all")),
    (
        {"kind": "margin-mse", "target": {"transform": "min-max", "scale": 3}},
        lambda: on_scores.margin_mse(SCORES, transformed(TEACHER, KNOWN, "min-max", scale=3.0), KNOWN),
    ),
    ("mse", lambda: on_scores.mse(SCORES, TEACHER, KNOWN)),
    (
        {"kind": "ranknet", "weights": "rank", "target": "reciprocal-rank"},
        lambda: on_scores.rank_net(SCORES, TEACHER, KNOWN, weights="rank"),
    ),
    (
        {"kind": "kl", "ground_truth": 0.2, **WARM},
        lambda: on_scores.kl_divergence(SCORES, TEACHER, KNOWN, ground_truth=0.2, **WARM),
    ),
    (
        {"kind": "kl", "over": "batch", "ground_truth": 0.2, **WARM},
        lambda: on_scores.kl_divergence(BATCH, WIDE, ALL, ground_truth=0.2, positive=COLUMN[:, 0], **WARM),
    ),
    (
        {"kind": "listnet", "over": "batch", "target": "z-score"},
        lambda: on_scores.list_net(BATCH, transformed(WIDE, ALL, "z-score"), ALL),
    ),
    ({"kind": "reverse-kl", "temperature": 2}, lambda: on_scores.reverse_kl(
        SCORES, TEACHER, KNOWN, student_temperature=2.0, teacher_temperature=2.0)),
    ({"kind": "sinkhorn", "iterations": 3}, lambda: sinkhorn(SCORES, TEACHER, KNOWN, iterations=3)),
    (
        {"kind": "sinkhorn", "over": "batch", "regularisation": 0.5},
        lambda: sinkhorn(BATCH, WIDE, ALL, columns="documents", regularisation=0.5),
    ),
    ({"kind": "info-nce", "over": "group", "temperature": 0.5}, lambda: on_scores.info_nce(
        SCORES, torch.tensor([0, 0]), PRESENT, temperature=0.5)),
    ("info-nce", lambda: on_scores.info_nce(BATCH, COLUMN[:, 0], OUTPUTS.batch_allowed)),
    ({"kind": "embedding", "distance": "cosine"}, lambda: embedding_regression(
        OUTPUTS.vectors, OUTPUTS.teacher_vectors, distance="cosine")),
    ({"kind": "mi-alpha", "alpha": 0.5, "scale": 3}, _mi_alpha),
    ({"kind": "minilm-relations", "heads": 2}, lambda: minilm_relations(
        OUTPUTS.relations, OUTPUTS.token_mask, heads=2)),
    ({"kind": "taid", "start": 0.3}, lambda: on_scores.taid(SCORES, TEACHER, KNOWN, t=0.3)),
]  # fmt: skip


@pytest.mark.parametrize(("item", "expected"), WITH, ids=lambda x: str(x) if not callable(x) else "")
def test_a_term_is_its_function_on_the_right_scores(item, expected):
    assert value(item, passes=10, dimensions=(4, 4)) == pytest.approx(expected().item(), rel=1e-6)


def test_false_negatives_of_the_group_are_judged_by_its_scores():
    # bars 4 and 0: slot 2 of query 0 (4.5) and slot 1 of query 1 (3.0) are false; an unknown score stays
    kept = torch.tensor([[True, True, False], [True, False, False]])
    expected = on_scores.info_nce(SCORES, torch.tensor([0, 0]), kept).item()
    item = {"kind": "info-nce", "over": "group", "false_negatives": {"margin": 1.0}}
    assert value(item) == pytest.approx(expected)


def test_false_negatives_of_the_batch_are_judged_by_its_scores_or_by_the_groups():
    item = {"kind": "info-nce", "false_negatives": {"margin": 1.0}}
    wide = torch.tensor([[5.0, 0.0, 2.0, 9.0], [2.0, 0.0, 0.9, 1.1]])
    # bars 1 (positive: column 2) and 1 (column 0); column 3 of query 0 was not allowed before
    kept = torch.tensor([[False, True, True, False], [True, True, True, False]])
    judged = dataclasses.replace(OUTPUTS, batch_teacher=wide)
    assert value(item, judged) == pytest.approx(on_scores.info_nce(BATCH, COLUMN[:, 0], kept).item())
    # without them, each query's own documents: column 3 of query 0 (4.5 of 5), column 2 of query 1 (3 of 1)
    own = dataclasses.replace(OUTPUTS, batch_teacher=None, batch_allowed=ALL)
    kept = torch.tensor([[True, True, True, False], [True, True, False, True]])
    assert value(item, own) == pytest.approx(on_scores.info_nce(BATCH, COLUMN[:, 0], kept).item())


def test_weights_and_names():
    both = losses({"kind": "kl", "weight": 0.5}, {"kind": "kl", "temperature": 4, "weight": 3}, "mse")(OUTPUTS)
    assert list(both) == ["kl", "kl_2", "mse"]
    plain = on_scores.kl_divergence(SCORES, TEACHER, KNOWN).item()
    hot = on_scores.kl_divergence(SCORES, TEACHER, KNOWN, student_temperature=4.0, teacher_temperature=4.0).item()
    assert both["kl"].item() == pytest.approx(0.5 * plain)
    assert both["kl_2"].item() == pytest.approx(3 * hot)


def test_what_is_missing_is_named():
    bare = Outputs(scores=SCORES, present=PRESENT, teacher=TEACHER, known=KNOWN)
    for item, name in (
        ({"kind": "kl", "over": "batch"}, "batch_scores"),
        ("info-nce", "batch_scores"),
        ("embedding", "vectors"),
        ("minilm-relations", "relations"),
    ):
        with pytest.raises(UsageError, match=f"needs {name}, which this student and its inputs do not give"):
            losses(item)(bare)
    with pytest.raises(UsageError, match="'taid' needs the length of the training"):
        losses("taid")
    with pytest.raises(UsageError, match="'mi-alpha' needs the dimensions"):
        losses("mi-alpha")


def test_learned_and_remembered_parts_are_in_the_state():
    module = losses("kl", "taid", "mi-alpha", {"kind": "mi-alpha", "scale": 2}, passes=10, dimensions=(4, 6))
    assert [name for name, _ in module.named_parameters()] == [
        f"states.{key}.{name}" for key in ("mi-alpha", "mi-alpha_2") for name in ("weight", "log_scale", "log_baseline")
    ]
    outputs = dataclasses.replace(OUTPUTS, teacher_vectors=_random(6, 6))
    sum(module(outputs).values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    again = losses("kl", "taid", "mi-alpha", {"kind": "mi-alpha", "scale": 2}, passes=10, dimensions=(4, 6))
    again.load_state_dict(module.state_dict())
    second, same = module(outputs), again(outputs)
    assert all(second[key].item() == same[key].item() for key in second)
    assert again.states["taid"].t.item() == module.states["taid"].t.item()


def test_taid_moves_in_training_only():
    module = losses({"kind": "taid", "start": 0.2}, passes=10)
    at = [module.states["taid"].t.item()]
    module(OUTPUTS)
    at.append(module.states["taid"].t.item())
    with torch.no_grad():
        module(OUTPUTS)
    module.eval()(OUTPUTS)
    assert at[0] == pytest.approx(0.2)
    assert at[1] == pytest.approx(0.28) and module.states["taid"].t.item() == at[1]  # a tenth of the way to 1


def test_t_moves_by_hand():
    moving = MovingTarget(10, start=0.4, end=1.0, adaptation=0.5, momentum=0.9)
    t, fall, previous = 0.4, 0.0, None
    for step, loss in enumerate([2.0, 1.0, 1.5, 0.0, 1.0], 1):
        change = (previous - loss) / previous if previous else 0.0
        fall = 0.9 * fall + 0.1 * change
        t = min(1.0, max(0.4 + 0.6 * step / 10, t + 0.5 * (1 - t) / (1 + math.exp(-fall))))
        previous = loss
        moving.update(torch.tensor(loss))
        assert moving.t.item() == pytest.approx(t, rel=1e-5)
    assert t > 0.4 + 0.6 * 5 / 10  # it ran ahead of the line
    slow = MovingTarget(4, start=0.2, end=0.8, adaptation=0.0, momentum=0.9)
    line = []
    for _ in range(6):
        slow.update(torch.tensor(1.0))
        line.append(slow.t.item())
    assert line == pytest.approx([0.35, 0.5, 0.65, 0.8, 0.8, 0.8])  # never beyond its end


def test_half_precision_and_autocast_are_computed_in_float32():
    low = dataclasses.replace(
        OUTPUTS,
        scores=SCORES.bfloat16(),
        batch_scores=BATCH.bfloat16(),
        vectors=OUTPUTS.vectors.bfloat16(),
        relations=[(s.bfloat16(), t) for s, t in OUTPUTS.relations],
    )
    full = dataclasses.replace(
        OUTPUTS,
        scores=low.scores.float(),
        batch_scores=low.batch_scores.float(),
        vectors=low.vectors.float(),
        relations=[(s.float(), t) for s, t in low.relations],
    )
    kinds = [
        "margin-mse",
        "kl",
        "info-nce",
        "sinkhorn",
        "embedding",
        "mi-alpha",
        {"kind": "minilm-relations", "heads": 2},
    ]
    module = losses(*kinds, dimensions=(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(low)
    expected = module(full)
    assert {key: x.item() for key, x in got.items()} == {key: x.item() for key, x in expected.items()}
    assert all(x.dtype is torch.float32 for x in got.values())
