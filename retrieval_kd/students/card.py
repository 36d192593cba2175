"""The model card: Hub front matter, and how this student was made (no times: the same work gives the same bytes)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from retrieval_kd.data.scores import Scores
    from retrieval_kd.students.base import StudentRecipe
    from retrieval_kd.students.inputs import TrainingInputs


class _Hub(NamedTuple):
    """How the Hub files a kind of model, and the class that loads it."""

    library: str
    pipeline: str
    tags: tuple[str, ...]
    loads: str


_RERANKER = _Hub("sentence-transformers", "text-ranking", ("cross-encoder", "reranker"), "CrossEncoder")
_SPARSE = _Hub("sentence-transformers", "feature-extraction", ("sparse-encoder", "splade"), "SparseEncoder")
_DENSE = _Hub("sentence-transformers", "sentence-similarity", ("feature-extraction", "dense"), "SentenceTransformer")
_HUB = {
    "late-interaction": _Hub(
        "sentence-transformers",
        "feature-extraction",
        ("multi-vector", "late-interaction", "colbert"),
        "MultiVectorEncoder",
    ),
    "splade": _SPARSE,
    "splade-doc": _SPARSE,
    "cross-encoder": _RERANKER,
    "tk": _RERANKER,
    "prettr": _RERANKER,
    "llm-listwise": _Hub("transformers", "text-ranking", ("reranker", "listwise"), "AutoModelForCausalLM"),
}


def model_card(
    recipe: StudentRecipe, inputs: TrainingInputs, development: Sequence[float], notes: Sequence[str]
) -> str:
    """The text of ``README.md``; ``notes`` are what the kind of student has to say of itself."""
    import yaml

    hub = _HUB.get(recipe.kind, _DENSE)
    front: dict[str, Any] = {
        "library_name": hub.library,
        "pipeline_tag": hub.pipeline,
        "tags": [hub.library, *hub.tags, "knowledge-distillation", "retrieval_kd"],
    }
    base = inputs.refs["base"].name or ""
    if "/" in base:
        front["base_model"] = base
    sections = [
        f"# A {recipe.kind} student trained with retrieval_kd",
        "\n".join([*_origin(recipe), *notes]),
        f"It loads as `{hub.loads}` of {hub.library}. The whole recipe is in `manifest.json`; "
        "`retrieval_kd.json` holds similarity, lengths and the fingerprints of what it was made from.",
        "\n".join(["## How it was distilled", "", *_teaching(recipe, inputs)]),
    ]
    if development:
        sections.append("\n".join(["## Results", "", *_results(recipe, development)]))
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def development_values(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """The evaluations during training, in order."""
    return [float(entry["eval_development"]) for entry in history if "eval_development" in entry]


def _origin(recipe: StudentRecipe) -> list[str]:
    layers = f", layers {recipe.layers}" if recipe.layers is not None else ""
    return [f"Started from `{recipe.base}`{layers}."]


def _teaching(recipe: StudentRecipe, inputs: TrainingInputs) -> list[str]:
    if recipe.steps == 0:
        return ["Not at all: it is as it started."]
    lines = [f"- Teacher: {_teacher(file)}" for file in inputs.scores]
    lines += [f"- Vectors of `{file.model_ref.name or file.model_ref.path}`, {file.of}" for file in inputs.vectors]
    if not inputs.scores and not inputs.vectors:
        lines.append("- No teacher: labels alone")
    if recipe.losses:
        losses = ", ".join(f"{term.kind} (weight {term.weight:g})" for term in recipe.losses)
        lines.append(f"- Losses: {losses}")
    fingerprints = ", ".join(f"{name} `{ref.fingerprint[:12]}`" for name, ref in sorted(inputs.refs.items()))
    return [
        *lines,
        f"- {_groups(recipe, inputs)}; {recipe.batch_size} queries a step",
        f"- Learning rate {recipe.learning_rate:g}, seed {recipe.seed}; every step is in `training_log.csv`",
        f"- Made from: {fingerprints}",
        "",
        "![losses](training.png)",
    ]


def _groups(recipe: StudentRecipe, inputs: TrainingInputs) -> str:
    if inputs.queries_alone:
        return "Queries alone, no documents"
    positive = "by the labels" if recipe.groups.positive == "qrels" else "the teacher's best document"
    return f"Groups of {recipe.groups.documents} documents, positive {positive}"


def _teacher(scores: Scores) -> str:
    details, counts = scores.manifest.details, scores.manifest.counts
    members = details.get("members")
    name = f"an ensemble of {', '.join(map(_named, members.values()))}" if members else _named(details)
    return f"{name}, {scores.score_kind} of {counts['pairs']:,} pairs, fingerprint `{scores.fingerprint[:12]}`"


def _named(details: Mapping[str, Any]) -> str:
    model, teacher = details.get("model") or "several", details.get("teacher") or "imported"
    return f"`{model}`" if model == teacher else f"`{model}` ({teacher})"


def _results(recipe: StudentRecipe, development: Sequence[float]) -> list[str]:
    against = recipe.development.against
    what = f"labels of `{recipe.development.split}`" if against == "qrels" else recipe.goal
    measure = recipe.development.measure
    return [
        f"{measure} on a small development pool against {what}, while training (the best is kept):",
        "",
        "| evaluation | " + " | ".join(str(i + 1) for i in range(len(development))) + " |",
        "|---|" + "---:|" * len(development),
        f"| {measure} | " + " | ".join(f"{value:.4f}" for value in development) + " |",
    ]
