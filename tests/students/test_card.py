"""The model card says what a student was really made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrieval_kd.data.collection import Collection
from retrieval_kd.models.encode import encode
from retrieval_kd.models.load import Model, ModelSource
from retrieval_kd.students.card import model_card
from retrieval_kd.students.inputs import TrainingInputs
from retrieval_kd.students.train import _student_recipe
from retrieval_kd.teachers.ensemble import ensemble_scores
from retrieval_kd.teachers.score import score


def test_it_names_the_members_of_an_ensemble(
    tmp_path: Path, fit: Callable[..., Model], collection: Collection, scores: Path, candidates: Path
) -> None:
    words = score("teachers/bm25", collection=collection, candidates=[candidates], out=tmp_path / "words").path
    members = {"dense": scores, "sparse": words}
    both = ensemble_scores("teachers/ensemble-heterogeneous", members, out=tmp_path / "both")
    model = fit(kind="dense", inputs={"scores": [both.path]}, losses=[{"kind": "kl"}], steps=1)
    card = (model.path / "README.md").read_text()
    assert " (bi-encoder), `bm25`, ensemble of " in card and "- Teacher: an ensemble of `" in card


def test_a_query_tower_without_documents_claims_none(
    tmp_path: Path, fit: Callable[..., Model], collection: Collection, teacher: Path
) -> None:
    vectors = encode(teacher, collection, tmp_path / "queries", queries="train").path
    held = {"against": "teacher", "queries": 4, "times": 1}
    tower: dict[str, Any] = {"kind": "query-tower", "losses": [{"kind": "embedding"}], "development": held}
    card = (fit(inputs={"teacher_vectors": [vectors]}, **tower, steps=1).path / "README.md").read_text()
    assert "- Queries alone, no documents; " in card
    assert "development pool against the teacher's vectors of queries held out, while" in card
    assert "best document" not in card


@pytest.mark.parametrize(("local", "front"), [(False, True), (True, False)])
def test_a_directory_is_no_base_of_the_hub(
    tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch, local: bool, front: bool
) -> None:
    if local:
        (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    source = ModelSource("org/name", tmp_path / "org" / "name", "f" * 64)
    monkeypatch.setattr("retrieval_kd.students.inputs.find_model", lambda name: source)
    recipe = _student_recipe("students/demo-start", ["base=org/name"])
    card = model_card(recipe, TrainingInputs(collection, recipe), [], [])
    assert ("base_model: org/name" in card) is front
