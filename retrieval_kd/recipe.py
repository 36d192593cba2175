"""Recipes: one small YAML file a working configuration, checked against the schema of its kind.

A recipe may name one other with ``extends:``; ``key=value`` overrides are applied last. Unknown keys are errors that
name the nearest valid key. There is no code in YAML.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from retrieval_kd.errors import RecipeError, did_you_mean


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Section):
    """The base of every recipe's schema. ``stage`` is the folder its files live in."""

    stage: ClassVar[str] = ""

    kind: str

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with defaults filled in, as plain values for the manifest."""
        return self.model_dump(mode="json")


R = TypeVar("R", bound=BaseModel)


def recipe_roots() -> list[Path]:
    """Where the shipped recipes are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return [package / "recipes"] if (package / "recipes").is_dir() else [package.parent]


def find_recipe(name: str, stage: str) -> Path:
    """The file for ``name``: a path, or a shipped recipe (``teachers/demo``, ``demo`` or ``demo.yaml``)."""
    path = Path(name)
    if path.is_file():
        return path
    short = name.removesuffix(".yaml").removeprefix(stage + "/")
    shipped = {file.stem: file for root in recipe_roots() for file in sorted((root / stage).glob("*.yaml"))}
    if short in shipped:
        return shipped[short]
    raise RecipeError(f"{name}: no such file, and no recipe of that name in {stage}/{did_you_mean(short, shipped)}")


def read_recipe(path: Path, stage: str | None = None, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The raw mapping of a recipe file with its ``extends:`` merged in (mappings merge, everything else replaces).

    ``extends:`` is a path relative to the file, or the name of a shipped recipe of the stage
    (the name of the file's folder when it is not given).
    """
    if path.resolve() in above:
        raise RecipeError(f"{path}: extends itself")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with a 'kind:' key")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends: takes one recipe (got {parent!r})")
    base = path.parent / parent
    if not base.is_file():
        try:
            base = find_recipe(parent, stage or path.parent.name)
        except RecipeError as error:
            raise RecipeError(f"{path}: extends: {error}") from error
    return _merge(read_recipe(base, stage, above=(*above, path.resolve())), raw)


def load_recipe(name: str, stage: str, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe ``name`` of a stage, with ``key=value`` overrides (``losses.0.weight=2``) applied."""
    from retrieval_kd.registry import STAGES, implementation

    path = find_recipe(name, stage)
    raw = apply_overrides(read_recipe(path, stage), overrides, str(path))
    if "kind" not in raw:
        raise RecipeError(f"{path}: no 'kind:' (one of: {', '.join(STAGES[stage])})")
    try:
        schema: type[Recipe] = implementation(stage, str(raw["kind"])).Recipe
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return validate(schema, raw, str(path))


def validate(schema: type[R], raw: dict[str, Any], place: str) -> R:
    """``raw`` as an instance of ``schema``; `RecipeError` names the place, the key and the nearest valid name."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(schema, detail, place) for detail in error.errors())) from error


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], place: str) -> dict[str, Any]:
    """A copy of ``raw`` with each ``dotted.key=value`` set; values are read as YAML."""
    result = copy.deepcopy(raw)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {override}: write it as key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {override}: the value is not valid YAML") from error
        _set(result, key.split("."), value, f"{place}: --set {override}")
    return result


def _set(node: Any, keys: list[str], value: Any, place: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(f"{place}: '{key}' is not one of the {len(node)} items (counted from 0)")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        else:
            raise RecipeError(f"{place}: '{'.'.join(keys[:depth])}' is a value, not a mapping")


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(schema: type[BaseModel], detail: Any, place: str) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        valid = _fields_at(schema, detail["loc"][:-1])
        return f"{place}: unknown key '{key}'{did_you_mean(location[-1], valid) if valid else ''}"
    if detail["type"] == "missing":
        return f"{place}: '{key}' is missing"
    if detail["type"] == "union_tag_invalid":
        tags = re.findall(r"'([^']+)'", detail["ctx"]["expected_tags"])
        return f"{place}: {key}: unknown kind '{detail['ctx']['tag']}'{did_you_mean(detail['ctx']['tag'], tags)}"
    got = "" if isinstance(detail.get("input"), dict) else f" (got {detail.get('input')!r})"
    where = f"{place}: {key}" if key else place
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}{got}"


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys at a place inside a schema, following models through lists, unions and optionals."""
    models = [schema]
    for part in location:
        found: list[type[BaseModel]] = []
        for model in models:
            if isinstance(part, str) and part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
            elif isinstance(part, int):
                found.append(model)
            else:
                found += [model]  # a union's tag, which pydantic adds to the location
        models = found
        tags = [m for m in models if "kind" in m.model_fields and part in _literals(m)]
        models = tags or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _literals(model: type[BaseModel]) -> tuple[Any, ...]:
    return getattr(model.model_fields["kind"].annotation, "__args__", ())
