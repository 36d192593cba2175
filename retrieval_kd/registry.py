"""The kinds of every stage: one literal table each, kind → lazy import path and the extra it needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from retrieval_kd.errors import MissingExtraError, RecipeError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """Where a kind is implemented (``module:Name``), what it is, and the extra that must be installed for it."""

    target: str
    summary: str
    extra: str | None = None


TEACHERS = {
    "api": Entry("retrieval_kd.teachers.api.teacher:ApiTeacher", "a model behind an OpenAI-compatible endpoint", "api"),
    "bi-encoder": Entry(
        "retrieval_kd.teachers.bi_encoder:BiEncoderTeacher", "cosine or dot of any sentence-transformers model"
    ),
    "bm25": Entry("retrieval_kd.teachers.bm25:BM25Teacher", "BM25 over the collection, no model"),
    "cross-encoder": Entry("retrieval_kd.teachers.cross_encoder:CrossEncoderTeacher", "raw logits of a cross-encoder"),
    "ensemble": Entry(
        "retrieval_kd.teachers.ensemble:Ensemble", "finished score files, normalised and combined (`scores ensemble`)"
    ),
    "late-interaction": Entry(
        "retrieval_kd.teachers.late_interaction:LateInteractionTeacher", "MaxSim of a multi-vector model"
    ),
    "llm-listwise": Entry(
        "retrieval_kd.teachers.llm_listwise:LLMListwiseTeacher", "ranks of a language model that orders windows"
    ),
    "llm-pointwise": Entry(
        "retrieval_kd.teachers.llm_pointwise:LLMPointwiseTeacher", "log-odds of a language model's yes and no"
    ),
    "sparse": Entry("retrieval_kd.teachers.sparse:SparseTeacher", "dot product of learned sparse vectors"),
}
STUDENTS = {
    "cross-encoder": Entry(
        "retrieval_kd.students.cross_encoder:CrossEncoderStudent", "a re-ranker, fine-tuned or distilled"
    ),
    "dense": Entry("retrieval_kd.students.dense:DenseStudent", "a bi-encoder: one vector a text"),
}
INDEXES = {
    "bm25": Entry("retrieval_kd.indexes.bm25:BM25Index", "BM25 without a JVM (bm25s)"),
    "faiss": Entry("retrieval_kd.indexes.faiss_index:FaissIndex", "any FAISS factory string over dense vectors", "cpu"),
}
EVALUATIONS = {
    "evaluation": Entry(
        "retrieval_kd.eval.evaluate:Evaluation", "measures, tests, efficiency and a report on one split"
    ),
}
PIPELINES = {
    "pipeline": Entry("retrieval_kd.pipeline:Pipeline", "a whole run: steps that name one another"),
}

STAGES: dict[str, dict[str, Entry]] = {
    "teachers": TEACHERS,
    "students": STUDENTS,
    "indexes": INDEXES,
    "eval": EVALUATIONS,
    "pipelines": PIPELINES,
}
"""Stage (the name of its recipe folder) → its kinds."""


def implementation(stage: str, kind: str) -> Any:
    """The class behind a kind. Raises `RecipeError` for an unknown kind, `MissingExtraError` for a missing package."""
    table = STAGES[stage]
    entry = table.get(kind)
    if entry is None:
        raise RecipeError(f"unknown kind '{kind}' in {stage}{did_you_mean(kind, table)}")
    module, _, name = entry.target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if entry.extra is None or (error.name or "").startswith("retrieval_kd"):
            raise
        raise MissingExtraError(f"kind '{kind}' needs the package '{error.name}'", entry.extra) from error
