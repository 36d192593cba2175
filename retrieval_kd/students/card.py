"""The model card: Hub front matter, and how this student was made (no times: the same work gives the same bytes)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrieval_kd.artifact import InputRef
from retrieval_kd.students.base import StudentRecipe

_HUB = {"dense": ("sentence-similarity", "feature-extraction"), "cross-encoder": ("text-ranking", "reranker")}


def model_card(recipe: StudentRecipe, inputs: Mapping[str, InputRef], development: Sequence[float]) -> str:
    """The text of ``README.md``."""
    import yaml

    pipeline, tag = _HUB.get(recipe.kind, ("feature-extraction", recipe.kind))
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": pipeline,
        "tags": ["sentence-transformers", tag, "knowledge-distillation", "retrieval_kd"],
    }
    if recipe.base != "builtin" and recipe.base.count("/") == 1:
        front["base_model"] = recipe.base
    losses = ", ".join(f"{term.kind} (weight {term.weight:g})" for term in recipe.losses)
    positive = "by the labels" if recipe.groups.positive == "qrels" else "the teacher's best document"
    lines = [
        "# A student trained with retrieval_kd",
        "",
        f"- Kind: {recipe.kind}; started from `{recipe.base}`"
        + (f", layers {recipe.layers}" if recipe.layers is not None else ""),
        f"- Losses: {losses}; groups of {recipe.groups.documents} documents, positive {positive}",
        f"- {recipe.batch_size} queries a step, learning rate {recipe.learning_rate:g}, seed {recipe.seed}",
        "- Made from: " + ", ".join(f"{name} `{ref.fingerprint[:12]}`" for name, ref in sorted(inputs.items())),
    ]
    if development:
        values = " → ".join(f"{value:.4f}" for value in development)
        lines.append(f"- {recipe.development.measure} against {recipe.development.against} while training: {values}")
    lines += ["", "The whole recipe is in `manifest.json`; `retrieval_kd.json` holds similarity, scale and lengths."]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(lines) + "\n"


def development_values(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """The evaluations during training, in order."""
    return [float(entry["eval_development"]) for entry in history if "eval_development" in entry]
