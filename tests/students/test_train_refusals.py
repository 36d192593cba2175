from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.score_formats.convert import convert_scores
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.errors import InputError, RecipeError, RetrievalKDError, UsageError
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.models.load import Model

Trained = Callable[..., Model]


def test_what_a_loss_lacks(fit: Trained, scores: Path, candidates: Path, vectors: list[Path]) -> None:
    def refused(message: str, error: type[Exception] = UsageError, **values: Any) -> None:
        with pytest.raises(error, match=message):
            fit(**values)

    by_labels = {"positive": "qrels"}
    refused("nothing to train on", inputs={}, losses=[{"kind": "kl"}])
    for kind in ("kl", "margin-mse"):
        inputs = {"candidates": candidates}
        refused(f"'{kind}' needs a teacher's scores", inputs=inputs, losses=[{"kind": kind}], groups=by_labels)
    refused("groups.positive", inputs={"candidates": candidates}, losses=[{"kind": "info-nce"}])
    for loss in ({"kind": "embedding"}, {"kind": "kl", "over": "batch"}):
        refused("needs the teacher's vectors", inputs={"scores": [scores]}, losses=[loss])
        with_vectors: dict[str, Any] = {"scores": [scores], "teacher_vectors": vectors[:1]}
        refused(
            "cover the documents and all queries of split 'train'",
            InputError,
            inputs=with_vectors,
            losses=[loss],
        )


def test_scores_of_another_collection(fit: Trained, scores: Path, tmp_path: Path) -> None:
    other = tiny.make_tiny_collection(tmp_path, "other")
    with pytest.raises(InputError, match="these scores are of another collection"):
        fit(inputs={"scores": [scores], "collection": other}, losses=[{"kind": "kl"}])


def test_scores_imported_without_a_collection(fit: Trained, tmp_path: Path) -> None:
    (tmp_path / "scores.trec").write_text("train-1 Q0 d01 1 2.5 made\n")
    arguments: dict[str, Any] = {"from_format": "trec", "to_format": "retrieval-kd", "out": tmp_path / "imported"}
    convert_scores(tmp_path / "scores.trec", **arguments)
    with pytest.raises(InputError, match=r"without a collection.*scores convert … --collection"):
        fit(inputs={"scores": [tmp_path / "imported"]}, losses=[{"kind": "kl"}])


def test_teacher_vectors_of_another_dimension(
    fit: Trained, scores: Path, collection: Collection, teacher: Path, tmp_path: Path
) -> None:
    """The student has 16 dimensions, the teacher's vectors 8."""
    model = DenseEncoder.load(teacher).ref()
    paths = []
    for of, ids in (("documents", tiny.ids_of(range(40))), ("queries", [f"train-{i}" for i in range(30)])):
        write_vectors(
            tmp_path / of,
            np.ones((len(ids), 8)),
            ids,
            of=of,
            split=None,
            similarity="cosine",
            model=model,
            collection=collection.ref(),
        )
        paths.append(tmp_path / of)
    with pytest.raises(InputError, match=r"have 8 dimensions, the student's 16"):
        fit(inputs={"scores": [scores], "teacher_vectors": paths}, losses=[{"kind": "embedding"}])


def test_diverged_training_is_an_error(fit: Trained, scores: Path, tmp_path: Path) -> None:
    base = tiny.spoil(tiny.make_dense(tmp_path / "spoilt"))
    with pytest.raises(RetrievalKDError, match="diverged"):
        fit(inputs={"scores": [scores]}, losses=[{"kind": "kl"}], base=str(base), steps=4)


def test_a_base_keeps_its_pooling(fit: Trained, scores: Path) -> None:
    with pytest.raises(RecipeError, match=r"pooling: cls: the base '.*' pools by 'mean' already; leave the key out"):
        fit(inputs={"scores": [scores]}, losses=[{"kind": "kl"}], pooling="cls")
