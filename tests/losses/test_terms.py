"""The items of ``losses:``: what they accept, need and refuse, all of it without torch."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from retrieval_kd.errors import RecipeError, UsageError
from retrieval_kd.losses.terms import LossTerm, refuse_ranks, term_keys
from retrieval_kd.recipe import Section, validate


class Losses(Section):
    losses: list[LossTerm]


def terms(*items):
    return TypeAdapter(list[LossTerm]).validate_python([{"kind": i} if isinstance(i, str) else i for i in items])


def problem(item):
    with pytest.raises(RecipeError) as error:
        validate(Losses, {"losses": [item]}, "x.yaml")
    return str(error.value)


SCORES, BATCH = {"scores"}, {"vectors", "batch"}
NEEDS = [
    ("margin-mse", SCORES),
    ("mse", SCORES),
    ("ranknet", SCORES),
    *((kind, SCORES) for kind in ("kl", "reverse-kl", "listnet", "sinkhorn", "taid")),
    *(({"kind": kind, "over": "batch"}, BATCH) for kind in ("kl", "reverse-kl", "listnet", "sinkhorn", "taid")),
    ("info-nce", {"batch"}),
    ({"kind": "info-nce", "over": "group"}, set()),
    ({"kind": "info-nce", "over": "group", "false_negatives": {"margin": 1}}, SCORES),
    ({"kind": "info-nce", "false_negatives": {"relative": 0.95}}, {"batch", "scores"}),
    ("embedding", {"vectors"}),
    ("mi-alpha", {"vectors"}),
    ("minilm-relations", {"relations"}),
]


@pytest.mark.parametrize(("item", "needs"), NEEDS, ids=str)
def test_what_each_needs(item, needs):
    (term,) = terms(item)
    assert term.needs == needs


def test_one_temperature_for_both_unless_they_have_their_own():
    plain, one, two = terms(
        "kl",
        {"kind": "kl", "temperature": 2},
        {"kind": "listnet", "temperature": 2, "teacher_temperature": 0.5},
    )
    assert plain.temperatures == {"student_temperature": 1, "teacher_temperature": 1}
    assert one.temperatures == {"student_temperature": 2, "teacher_temperature": 2}
    assert two.temperatures == {"student_temperature": 2, "teacher_temperature": 0.5}


def test_a_target_is_a_name_or_a_section():
    short, long = terms(
        {"kind": "kl", "target": "min-max"},
        {"kind": "kl", "target": {"transform": "reciprocal-rank", "k": 60, "scale": 30}},
    )
    assert short.target.model_dump() == {"transform": "min-max", "scale": 1.0, "k": 0.0}
    assert long.target.model_dump() == {"transform": "reciprocal-rank", "scale": 30.0, "k": 60.0}
    # what a manifest holds reads back as the same recipe
    assert terms(*(term.model_dump(mode="json") for term in (short, long))) == [short, long]


def test_terms_of_one_kind_get_names_of_their_own():
    assert term_keys(terms("kl", "margin-mse", "kl", "kl")) == ["kl", "margin-mse", "kl_2", "kl_3"]


def test_bad_values_are_named():
    assert "losses.0.kl.weight: Input should be greater than 0 (got 0)" in problem({"kind": "kl", "weight": 0})
    unknown = problem({"kind": "kl", "target": {"transfrom": "min-max"}})
    assert "unknown key 'losses.0.kl.target.transfrom' (did you mean 'transform'?)" in unknown
    assert "'min-max', 'z-score'" in problem({"kind": "kl", "target": "max-min"})
    only = "k belongs to 'transform: reciprocal-rank', not to 'z-score'"
    assert only in problem({"kind": "kl", "target": {"transform": "z-score", "k": 60}})
    for rule in ({}, {"margin": 1, "relative": 0.9}):
        assert "give one of margin and relative" in problem({"kind": "info-nce", "false_negatives": rule})
    assert "end (0.2) lies before start (0.4)" in problem({"kind": "taid", "end": 0.2})
    assert "unknown key 'losses.0.reverse-kl.ground_truth'" in problem({"kind": "reverse-kl", "ground_truth": 0.1})
    assert "greater than 0 (got 0)" in problem({"kind": "kl", "student_temperature": 0})


@pytest.mark.parametrize(
    "item",
    ["margin-mse", "mse", "kl", "reverse-kl", "listnet", "sinkhorn", "taid", {"kind": "ranknet", "weights": "gap"}],
    ids=str,
)
def test_ranks_are_refused_where_sizes_count(item):
    item = {"kind": item} if isinstance(item, str) else item
    with pytest.raises(UsageError) as error:
        refuse_ranks(terms("info-nce", item), "rank", "ranks/")
    assert str(error.value) == (
        f"ranks/: these scores are ranks, and loss '{item['kind']}' reads their sizes; in the recipe, "
        "add `target: reciprocal-rank`"
    )
    refuse_ranks(terms(item), "logit", "scores/")
    for target in ("reciprocal-rank", "minus-rank"):
        refuse_ranks(terms({**item, "target": target}), "rank", "ranks/")
    with pytest.raises(UsageError, match="reciprocal-rank"):
        refuse_ranks(terms({**item, "target": "z-score"}), "rank", "ranks/")


def test_ranks_are_enough_where_only_the_order_counts():
    order = [{"kind": "ranknet", "weights": weights} for weights in ("none", "rank")]
    no_scores = [{"kind": "kl", "over": "batch"}, "info-nce", "embedding", "mi-alpha", "minilm-relations"]
    refuse_ranks(terms(*order, *no_scores), "rank", "ranks/")
    refuse_ranks(terms({"kind": "info-nce", "false_negatives": {"margin": 0}}), "rank", "ranks/")
    with pytest.raises(UsageError, match=r"'info-nce' reads their sizes; .*`false_negatives: \{margin: 0\}`"):
        refuse_ranks(terms({"kind": "info-nce", "false_negatives": {"relative": 0.9}}), "rank", "ranks/")


def test_the_second_of_a_kind_is_named():
    with pytest.raises(UsageError, match="loss 'kl_2'"):
        refuse_ranks(terms({"kind": "kl", "target": "minus-rank"}, "kl"), "rank", "ranks/")


def test_terms_are_checked_without_torch():
    code = "import sys, retrieval_kd.losses.terms; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
