from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from retrieval_kd import recipe as recipes
from retrieval_kd.errors import MissingExtraError, RecipeError, did_you_mean, first
from retrieval_kd.recipe import Recipe, Section, apply_overrides, find_recipe, load_recipe, read_recipe, validate
from retrieval_kd.registry import STAGES, Entry, implementation


class Margin(Section):
    kind: Literal["margin"]
    weight: float = 1.0


class Divergence(Section):
    kind: Literal["divergence"]
    temperature: float = 1.0


class Batches(Section):
    size: int = 32


class ToyRecipe(Recipe):
    steps: int
    batches: Batches = Batches()
    losses: list[Annotated[Margin | Divergence, Field(discriminator="kind")]] = Field(default_factory=list)


class Toy:
    Recipe = ToyRecipe


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage ``toys`` with the kind ``toy`` and a folder of shipped recipes."""
    kinds = {
        "toy": Entry(f"{__name__}:Toy", "a toy"),
        "heavy": Entry("no_such_package:Toy", "a toy that is not installed", "gpu"),
    }
    monkeypatch.setitem(STAGES, "toys", kinds)
    monkeypatch.setattr(recipes, "recipe_roots", lambda: [tmp_path / "shipped"])
    folder = tmp_path / "shipped" / "toys"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text("kind: toy\nsteps: 3\nbatches: {size: 8}\nlosses: [{kind: margin}]\n")
    (folder / "large.yaml").write_text("extends: small\nsteps: 300\n")
    return folder


def problem(raw: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        validate(ToyRecipe, raw, "x.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", ["toys/small", "small", "small.yaml", "toys/small.yaml"])
def test_a_shipped_recipe_has_a_short_name(toys: Path, name: str) -> None:
    assert find_recipe(name, "toys") == toys / "small.yaml"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"smal: no such file, and no recipe of that name in toys/ .*'small'\?"):
        find_recipe("smal", "toys")


def test_extends_merges_mappings_and_replaces_the_rest(toys: Path, tmp_path: Path) -> None:
    assert load_recipe("large", "toys").resolved() == {
        "kind": "toy",
        "steps": 300,
        "batches": {"size": 8},
        "losses": [{"kind": "margin", "weight": 1.0}],
    }
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: toys/large\nlosses: [{kind: divergence}]\n")
    assert read_recipe(mine, "toys") == {
        "kind": "toy",
        "steps": 300,
        "batches": {"size": 8},
        "losses": [{"kind": "divergence"}],
    }


def test_extends_may_be_a_path_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("kind: toy\nsteps: 1\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nsteps: 2\n")
    assert read_recipe(tmp_path / "mine.yaml", "toys") == {"kind": "toy", "steps": 2}


def test_extends_that_cannot_be_right(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("extends: two.yaml\n")
    two.write_text("extends: one.yaml\n")
    with pytest.raises(RecipeError, match=r"one.yaml: extends itself"):
        read_recipe(one, "toys")
    one.write_text("extends: [a, b]\n")
    with pytest.raises(RecipeError, match=r"one.yaml: extends: takes one recipe \(got \['a', 'b'\]\)"):
        read_recipe(one, "toys")
    one.write_text("extends: lage\n")
    with pytest.raises(RecipeError, match=r"one.yaml: extends: lage: no such file.*did you mean 'large'"):
        read_recipe(one, "toys")


def test_overrides_are_yaml_and_follow_dots_and_positions() -> None:
    raw = {"steps": 1, "losses": [{"kind": "margin"}, {"kind": "divergence"}]}
    given = ["steps=20", "losses.1.temperature=2.5", "batches.size=4", "losses.0={kind: margin, weight: 3}"]
    assert apply_overrides(raw, given, "x") == {
        "steps": 20,
        "losses": [{"kind": "margin", "weight": 3}, {"kind": "divergence", "temperature": 2.5}],
        "batches": {"size": 4},
    }
    assert raw == {"steps": 1, "losses": [{"kind": "margin"}, {"kind": "divergence"}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set steps: write it as key=value"),
        ("=1", "--set =1: write it as key=value"),
        ("steps=[1", "--set steps=[1: the value is not valid YAML"),
        ("losses.2.weight=1", "x: --set losses.2.weight=1: '2' is not one of the 1 items (counted from 0)"),
        ("steps.a=1", "x: --set steps.a=1: 'steps' is a value, not a mapping"),
    ],
)
def test_overrides_that_cannot_be_right(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        apply_overrides({"steps": 1, "losses": [{}]}, [override], "x")
    assert str(caught.value) == message


def test_an_unknown_key_names_the_nearest_at_its_own_depth() -> None:
    assert problem({"kind": "toy", "step": 1, "steps": 1}) == "x.yaml: unknown key 'step' (did you mean 'steps'?)"
    nested = problem({"kind": "toy", "steps": 1, "batches": {"siz": 1}})
    assert nested == "x.yaml: unknown key 'batches.siz' (did you mean 'size'?)"
    in_union = problem({"kind": "toy", "steps": 1, "losses": [{"kind": "divergence", "temprature": 2}]})
    assert in_union == "x.yaml: unknown key 'losses.0.divergence.temprature' (did you mean 'temperature'?)"
    not_near = problem({"kind": "toy", "steps": 1, "batches": {"zzz": 1}})
    assert not_near == "x.yaml: unknown key 'batches.zzz' (valid: size)"


def test_missing_keys_and_wrong_values_name_the_key_and_the_value() -> None:
    assert problem({"kind": "toy"}) == "x.yaml: 'steps' is missing"
    wrong = problem({"kind": "toy", "steps": "many"})
    assert wrong.startswith("x.yaml: steps: Input should be a valid integer")
    assert wrong.endswith("(got 'many')")
    assert len(problem({"kind": "toy", "steps": "many", "batch": 1}).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\n", r"no 'kind:' \(one of: toy, heavy\)"),
        ("kind: tay\nsteps: 1\n", r"x.yaml: unknown kind 'tay' in toys \(did you mean 'toy'\?\)"),
        ("- a\n", "a recipe is a mapping with a 'kind:' key"),
        ("", "a recipe is a mapping with a 'kind:' key"),
        ("kind: [\n", "x.yaml: not valid YAML: .*line 2"),
    ],
)
def test_files_that_cannot_be_right(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path), "toys")


def test_a_missing_package_names_the_pip_line() -> None:
    with pytest.raises(
        MissingExtraError, match=r"needs the package 'no_such_package'; .*pip install 'retrieval-kd\[gpu\]'"
    ):
        implementation("toys", "heavy")


def test_a_recipe_cannot_be_changed() -> None:
    loaded = validate(ToyRecipe, {"kind": "toy", "steps": 1}, "x")
    with pytest.raises(ValueError, match="frozen"):
        loaded.steps = 2


def test_names_in_messages() -> None:
    assert did_you_mean("mrgin", ["margin", "kl"]) == " (did you mean 'margin'?)"
    assert did_you_mean("zzz", ["b", "a"]) == " (valid: a, b)"
    assert first(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert first(range(5)) == "0, 1, 2, …"


def test_an_unknown_kind_in_a_list_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "student.yaml"
    recipe.write_text("kind: dense\nbase: builtin\nlosses: [{kind: infonce}]\n")
    with pytest.raises(RecipeError, match=r"losses\.0: unknown kind 'infonce' \(did you mean 'info-nce'\?\)"):
        load_recipe(str(recipe), "students")
