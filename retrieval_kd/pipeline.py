"""Pipelines: a whole run from one file, whose steps name one another. Finished artifacts are reused; the rest resumes.

A step is one verb with its arguments. ``$name`` stands for a variable or for the output of an earlier step::

    steps:
      collection: {data: pydocs}
      bm25: {index: indexes/bm25, collection: $collection}
"""

from __future__ import annotations

import importlib
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from retrieval_kd.errors import RecipeError, UsageError, did_you_mean
from retrieval_kd.recipe import Recipe, find_recipe, load_recipe, read_recipe

log = logging.getLogger("retrieval_kd")


@dataclass(frozen=True)
class Verb:
    """The function behind a verb, the parameter that the verb's own value goes to, and whether it takes overrides."""

    target: str
    first: str

    def function(self) -> Callable[..., Any]:
        """The function, imported now."""
        module, _, name = self.target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


VERBS = {
    "data": Verb("retrieval_kd.data.sources:make_collection", "source"),
    "queries": Verb("retrieval_kd.queries.make:make_queries", "recipe"),
    "encode": Verb("retrieval_kd.models.encode:encode", "model"),
    "index": Verb("retrieval_kd.indexes.build:build_index", "recipe"),
    "search": Verb("retrieval_kd.search.run:search_run", "index"),
    "score": Verb("retrieval_kd.teachers.score:score", "recipe"),
    "train": Verb("retrieval_kd.students.train:train", "recipe"),
    "eval": Verb("retrieval_kd.eval.evaluate:evaluate", "recipe"),
}
"""The verbs a step can be."""


class Pipeline:
    """The registry's entry for ``kind: pipeline``."""

    class Recipe(Recipe):
        """Keys of a pipeline file."""

        stage: ClassVar[str] = "pipelines"

        kind: Literal["pipeline"]
        variables: dict[str, Any] = Field(default_factory=dict)
        steps: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """One step, its references still unresolved."""

    name: str
    verb: Verb
    arguments: dict[str, Any]


def run_pipeline(
    pipeline: str, out: str | Path, overrides: Sequence[str] = (), *, force: bool = False
) -> dict[str, Path]:
    """Step name → path of its artifact under ``out``, after every step ran or was found finished."""
    out = Path(out)
    recipe, steps = _read(pipeline, overrides)
    paths: dict[str, Path] = {}
    for number, step in enumerate(steps, 1):
        log.info("[%d/%d] %s", number, len(steps), step.name)
        known = {**recipe.variables, **paths}
        arguments = _resolve(step.arguments, known)
        paths[step.name] = out / step.name
        began = time.perf_counter()
        step.verb.function()(**arguments, out=paths[step.name], force=force)
        log.info("[%d/%d] %s: %.1f s", number, len(steps), step.name, time.perf_counter() - began)
    return paths


def estimate_pipeline(pipeline: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved variables and steps, in order, without running anything."""
    recipe, steps = _read(pipeline, overrides)
    names = {step.name: f"<{step.name}>" for step in steps}
    return {
        "variables": recipe.variables,
        "steps": {step.name: _resolve(step.arguments, {**recipe.variables, **names}) for step in steps},
    }


def demo(
    out: str | Path = "runs/demo", *, teacher: str | None = None, size: str = "full", force: bool = False
) -> dict[str, Path]:
    """The built-in pipeline on the standard library's documentation: step name → path of its artifact.

    ``size="tiny"`` takes a few hundred documents and a few training steps (for tests). A ``teacher`` recipe with
    another model than the built-in one runs the pipeline ``demo-reranker``: the student learns from its scores alone.
    """
    overrides = []
    pipeline = "pipelines/demo"
    if teacher is not None:
        overrides.append(f"variables.teacher_recipe={teacher}")
        if read_recipe(find_recipe(teacher, "teachers"), "teachers").get("model") != "builtin":
            pipeline = "pipelines/demo-reranker"
    if size == "tiny":
        smaller = {"sample": 200, "steps": 2, "pq": "indexes/pq-tiny", "vq": "PQ32x4"}
        overrides += [f"variables.{name}={value}" for name, value in smaller.items()]
    elif size != "full":
        raise UsageError(f"size '{size}'{did_you_mean(size, ['full', 'tiny'])}")
    return run_pipeline(pipeline, out, overrides, force=force)


def _read(pipeline: str, overrides: Sequence[str]) -> tuple[Pipeline.Recipe, list[Step]]:
    recipe = load_recipe(pipeline, "pipelines", overrides)
    if not isinstance(recipe, Pipeline.Recipe):
        raise UsageError(f"{pipeline}: not a pipeline")
    known = set(recipe.variables)
    steps = []
    for name, raw in recipe.steps.items():
        steps.append(_step(pipeline, name, raw, known))
        if name in known:
            raise RecipeError(f"{pipeline}: '{name}' is both a variable and a step")
        known.add(name)
    used = {reference for step in steps for reference in _references(step.arguments)}
    if unused := [name for name in recipe.variables if name not in used]:
        valid = recipe.variables.keys() & used
        raise RecipeError(f"{pipeline}: no step uses variable '{unused[0]}'{did_you_mean(unused[0], valid)}")
    return recipe, steps


def _step(place: str, name: str, raw: Mapping[str, Any], known: set[str]) -> Step:
    verbs = [key for key in raw if key in VERBS]
    if not verbs:
        raise RecipeError(f"{place}: step '{name}' has no verb (one of: {', '.join(VERBS)})")
    verb = VERBS[verbs[0]]
    arguments = {key: value for key, value in raw.items() if key != verbs[0]}
    arguments[verb.first] = raw[verbs[0]]
    if "set" in arguments:
        arguments["overrides"] = [f"{key}={value}" for key, value in arguments.pop("set").items() if value is not None]
    valid = set(inspect.signature(verb.function()).parameters) - {"out", "force"}
    for key in arguments:
        if key not in valid:
            raise RecipeError(f"{place}: step '{name}': unknown argument '{key}'{did_you_mean(key, valid)}")
    for parameter in inspect.signature(verb.function()).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in {*arguments, "out"}:
            raise RecipeError(f"{place}: step '{name}': argument '{parameter.name}' is missing")
    for reference in _references(arguments):
        if reference not in known:
            raise RecipeError(
                f"{place}: step '{name}': '${reference}' is no variable or earlier step{did_you_mean(reference, known)}"
            )
    return Step(name, verb, arguments)


def _references(value: Any) -> list[str]:
    if isinstance(value, str):
        return [part[1:] for part in _parts(value) if part.startswith("$")]
    if isinstance(value, Mapping):
        return [reference for item in value.values() for reference in _references(item)]
    if isinstance(value, list):
        return [reference for item in value for reference in _references(item)]
    return []


def _parts(text: str) -> list[str]:
    """``key=$name`` (an override) and ``$name`` are the two places a reference can stand."""
    return [text.partition("=")[2]] if "=" in text else [text]


def _resolve(value: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        if value.startswith("$"):
            return known[value[1:]]
        key, separator, text = value.partition("=")
        return f"{key}={known[text[1:]]}" if separator and text.startswith("$") else value
    if isinstance(value, Mapping):
        return {key: _resolve(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [item for item in (_resolve(item, known) for item in value) if not _unset(item)]
    return value


def _unset(item: Any) -> bool:
    return isinstance(item, str) and item.endswith("=None")
