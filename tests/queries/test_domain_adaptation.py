"""The shipped pipeline on the tiny collection: queries from documents, a teacher, a student, its test split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.scores import Scores
from retrieval_kd.eval.report import Report
from retrieval_kd.losses.terms import KL, MarginMSE
from retrieval_kd.pipeline import estimate_pipeline, run_pipeline
from retrieval_kd.recipe import load_recipe
from retrieval_kd.students.base import StudentRecipe

PIPELINE = "pipelines/domain-adaptation"


def test_the_pipeline_on_a_tiny_collection(collection: Collection, tmp_path: Path, dense: Path) -> None:
    """The queries of train are gone, those of test are there, and no score is of a query that a person wrote."""
    teacher = tiny.make_dense(tmp_path / "teacher", seed=5)
    student = {
        "kind": "dense",
        "base": str(dense),
        "groups": {"documents": 3},
        "losses": [{"kind": "margin-mse"}, {"kind": "kl"}],
        "batch_size": 4,
        "development": {"against": "nothing"},
    }
    queries = {"kind": "ict", "crop": "words", "min_words": 2, "max_words": 3}
    variables = {
        "corpus": collection.path,
        "queries": tiny.write_recipe(tmp_path / "queries.yaml", queries),
        "teacher": tiny.write_recipe(tmp_path / "teacher.yaml", {"kind": "bi-encoder", "model": str(teacher)}),
        "student": tiny.write_recipe(tmp_path / "student.yaml", student),
        "documents": 12,
        "steps": 3,
    }
    paths = run_pipeline(PIPELINE, tmp_path / "run", [f"variables.{name}={value}" for name, value in variables.items()])
    made = Collection.load(paths["collection"])
    assert list(made.queries("train")) == [f"train-ict-{i}" for i in range(len(made.queries("train")))]
    assert len(made.origins) == 12
    assert made.queries("test") == collection.queries("test")
    scored = {row.query_id for row in Scores.load(paths["scores"])}
    assert scored == set(made.queries("train"))
    start, adapted = tiny.weights(paths["start"]), tiny.weights(paths["adapted"])
    assert any(not np.array_equal(start[name], adapted[name]) for name in start)
    systems = [system["name"] for system in Report.load(paths["report"]).metrics["systems"]]
    assert systems == ["BM25", "start", "adapted", "teacher-on-BM25"]


def test_the_pipeline_fits_the_student_it_names() -> None:
    """Its changes reach Margin-MSE's scale and KL's temperature, and the positives are the teacher's."""
    adapted = estimate_pipeline(PIPELINE)["steps"]["adapted"]
    recipe = load_recipe(adapted["recipe"], "students", adapted["overrides"])
    assert isinstance(recipe, StudentRecipe)
    margins, distribution = recipe.losses
    assert isinstance(margins, MarginMSE) and isinstance(distribution, KL)
    assert (margins.target.scale, distribution.temperatures["teacher_temperature"]) == (20, 0.05)
    assert recipe.groups.positive == "teacher"
    scores = estimate_pipeline(PIPELINE)["steps"]["scores"]
    assert scores["candidates"] == ["<candidates>"], "no judgement is a candidate"
