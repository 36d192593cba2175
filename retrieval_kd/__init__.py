"""The public API: every name is imported from its module when it is first used, so importing this stays cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval_kd.artifact import Artifact
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.engine_formats.export import export_vectors
    from retrieval_kd.data.engine_formats.loading import EngineExport
    from retrieval_kd.data.engine_formats.milvus import load_milvus
    from retrieval_kd.data.engine_formats.qdrant import load_qdrant
    from retrieval_kd.data.merge_scores import merge_scores
    from retrieval_kd.data.run import Run
    from retrieval_kd.data.score_formats.convert import convert_scores
    from retrieval_kd.data.score_report import describe_scores
    from retrieval_kd.data.scores import Scores
    from retrieval_kd.data.sources import make_collection
    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.errors import (
        ArtifactError,
        DataError,
        InputError,
        MissingExtraError,
        OutputExistsError,
        RecipeError,
        RetrievalKDError,
        UsageError,
    )
    from retrieval_kd.eval.evaluate import evaluate
    from retrieval_kd.eval.report import Report
    from retrieval_kd.indexes.base import Index
    from retrieval_kd.indexes.build import build_index
    from retrieval_kd.indexes.decode import decode_index
    from retrieval_kd.indexes.tune import tune_index
    from retrieval_kd.indexes.update import update_index
    from retrieval_kd.models.encode import encode
    from retrieval_kd.models.export import export_model
    from retrieval_kd.models.load import Model
    from retrieval_kd.pipeline import run_pipeline
    from retrieval_kd.queries.make import make_queries
    from retrieval_kd.search.run import search_run
    from retrieval_kd.search.searcher import Hit, Searcher
    from retrieval_kd.students.train import train
    from retrieval_kd.teachers.ensemble import ensemble_scores
    from retrieval_kd.teachers.score import score
    from retrieval_kd.verify import check

__all__ = [
    "Artifact",
    "ArtifactError",
    "Collection",
    "DataError",
    "EngineExport",
    "Hit",
    "Index",
    "InputError",
    "MissingExtraError",
    "Model",
    "OutputExistsError",
    "RecipeError",
    "Report",
    "RetrievalKDError",
    "Run",
    "Scores",
    "Searcher",
    "UsageError",
    "Vectors",
    "build_index",
    "check",
    "convert_scores",
    "decode_index",
    "describe_scores",
    "encode",
    "ensemble_scores",
    "evaluate",
    "export_model",
    "export_vectors",
    "load_milvus",
    "load_qdrant",
    "make_collection",
    "make_queries",
    "merge_scores",
    "run_pipeline",
    "score",
    "search_run",
    "train",
    "tune_index",
    "update_index",
]

_HOMES = {
    "artifact": ("Artifact",),
    "data.collection": ("Collection",),
    "data.engine_formats.export": ("export_vectors",),
    "data.engine_formats.loading": ("EngineExport",),
    "data.engine_formats.milvus": ("load_milvus",),
    "data.engine_formats.qdrant": ("load_qdrant",),
    "data.merge_scores": ("merge_scores",),
    "data.run": ("Run",),
    "data.score_formats.convert": ("convert_scores",),
    "data.score_report": ("describe_scores",),
    "data.scores": ("Scores",),
    "data.sources": ("make_collection",),
    "data.vectors": ("Vectors",),
    "errors": (
        "ArtifactError",
        "DataError",
        "InputError",
        "MissingExtraError",
        "OutputExistsError",
        "RecipeError",
        "RetrievalKDError",
        "UsageError",
    ),
    "eval.evaluate": ("evaluate",),
    "eval.report": ("Report",),
    "indexes.base": ("Index",),
    "indexes.build": ("build_index",),
    "indexes.decode": ("decode_index",),
    "indexes.tune": ("tune_index",),
    "indexes.update": ("update_index",),
    "models.encode": ("encode",),
    "models.export": ("export_model",),
    "models.load": ("Model",),
    "pipeline": ("run_pipeline",),
    "queries.make": ("make_queries",),
    "search.run": ("search_run",),
    "search.searcher": ("Hit", "Searcher"),
    "students.train": ("train",),
    "teachers.ensemble": ("ensemble_scores",),
    "teachers.score": ("score",),
    "verify": ("check",),
}
_MODULE_OF = {name: f"retrieval_kd.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The public object ``name``, imported now."""
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("retrieval-kd")
        except metadata.PackageNotFoundError:
            return "0+not.installed"
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'retrieval_kd' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
