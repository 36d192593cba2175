from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import retrieval_kd
from retrieval_kd.errors import MissingExtraError
from retrieval_kd.recipe import load_recipe
from retrieval_kd.registry import STAGES

REPOSITORY = Path(__file__).parent.parent
RECIPES = [
    pytest.param(stage, path, id=f"{stage}/{path.stem}")
    for stage in STAGES
    for path in sorted((REPOSITORY / stage).glob("*.yaml"))
]
HEAVY = {"torch", "transformers", "sentence_transformers", "pyarrow", "faiss", "ranx", "matplotlib", "bm25s", "scipy"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that are loaded in a fresh process after ``code``."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import retrieval_kd; dir(retrieval_kd); retrieval_kd.__version__; retrieval_kd.RecipeError",
        "import retrieval_kd.cli",
        "import retrieval_kd.cli as cli\ntry: cli.app(['run', '--help'])\nexcept SystemExit: pass",
    ],
    ids=["package", "cli", "help"],
)
def test_starting_loads_nothing_heavy(code: str) -> None:
    loaded = modules_after(code)
    assert "retrieval_kd" in loaded
    assert loaded & HEAVY == set()


def test_every_public_name_is_there_and_lives_where_it_is_said_to() -> None:
    assert set(retrieval_kd._MODULE_OF) == set(retrieval_kd.__all__)
    for name in retrieval_kd.__all__:
        found = getattr(retrieval_kd, name)
        assert found.__name__ == name
        assert found.__module__ == retrieval_kd._MODULE_OF[name]
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = retrieval_kd.nonsense


def test_no_public_function_is_hidden_by_a_module_of_its_name() -> None:
    modules = {path.stem for path in (REPOSITORY / "retrieval_kd").iterdir()}
    assert modules & set(retrieval_kd.__all__) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_every_kind_of_the_registry_can_be_imported(stage: str) -> None:
    for kind, entry in STAGES[stage].items():
        module, _, name = entry.target.partition(":")
        try:
            implementation: Any = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            assert entry.extra is not None, f"{stage} {kind} needs {error.name}, and no extra installs it"
            continue
        assert implementation.Recipe.stage == stage


@pytest.mark.parametrize(("stage", "path"), RECIPES)
def test_every_shipped_recipe_is_valid_short_and_says_how_to_run_it(stage: str, path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# retrieval-kd ")
    assert path.stem in lines[0]
    assert len(lines) <= 40
    try:
        loaded = load_recipe(str(path), stage)
    except MissingExtraError as error:
        assert error.extra in extras()
    else:
        assert loaded.kind in STAGES[stage]


def extras() -> dict[str, list[str]]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


def test_extras_that_are_named_exist() -> None:
    from retrieval_kd.doctor import EXTRAS

    named = {entry.extra for kinds in STAGES.values() for entry in kinds.values() if entry.extra}
    assert named | set(EXTRAS) <= set(extras())
    for extra, packages in EXTRAS.items():
        required = {requirement.partition(">")[0] for requirement in extras()[extra]}
        assert set(packages) <= required


def test_every_stage_has_its_recipes_in_the_wheel() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried == {stage: f"retrieval_kd/recipes/{stage}" for stage in STAGES}
    assert set(carried) == set(STAGES)


def test_the_constraints_pin_every_direct_dependency_once() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in ("cpu", "demo", "onnx", "api", "dev") for line in extras()[extra]),
    ]
    names = [_normal(line) for line in wanted]
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = [_normal(line) for line in lines]
    assert all(line.count("==") == 1 for line in lines)
    assert set(names) - set(pinned) == set()
    assert len(set(pinned)) == len(pinned)


def _normal(requirement: str) -> str:
    name = requirement.replace("<", ">").replace("=", ">").replace("[", ">").partition(">")[0]
    return name.strip().lower().replace("_", "-")


def test_the_tables_of_kinds_are_those_of_the_registry() -> None:
    place = importlib.util.spec_from_file_location("docs_tables", REPOSITORY / "docs" / "tables.py")
    assert place is not None
    assert place.loader is not None
    tables = importlib.util.module_from_spec(place)
    place.loader.exec_module(tables)
    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == tables.with_tables(page), "run: python docs/tables.py"
    assert all(f"<!-- kinds: {stage} -->" in page for stage in STAGES)
