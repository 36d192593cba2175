from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError
from retrieval_kd.students.base import Groups
from retrieval_kd.students.collate import GroupCollator, TeacherVectors, without_weights
from retrieval_kd.students.dense import DenseStudent
from retrieval_kd.students.groups import TrainingQuery

NAN = float("nan")
MODEL = tiny.reference("aa")


def training_query(number: int, rows: list[int], scores: list[float], relevant: list[int]) -> TrainingQuery:
    name = f"train-{number}"
    return TrainingQuery(
        name,
        f"text {number}",
        np.array(rows),
        np.array(scores, dtype=np.float32),
        np.isin(rows, relevant),
        np.flatnonzero(np.isin(rows, relevant)),
    )


QUERIES = [
    training_query(0, [7, 2, 9], [3.0, 2.0, 1.0], [7]),
    training_query(1, [2, 7], [5.0, NAN], [2]),
]
"""Both have documents 2 and 7; the first has three documents, the second two."""


def collator(collection: Collection, vectors: TeacherVectors | None = None) -> GroupCollator:
    student = DenseStudent(
        DenseStudent.Recipe.model_validate({"kind": "dense", "base": "none", "losses": [{"kind": "embedding"}]})
    )
    groups = Groups(documents=3, positive="qrels", negatives="hardest")
    return GroupCollator(student, None, collection, QUERIES, groups, 0, vectors)


def embedded(
    out: Path,
    collection: Collection,
    of: str,
    ids: Sequence[str],
    matrix: np.ndarray,
    similarity: str = "dot",
    model: InputRef = MODEL,
) -> Vectors:
    split = None if of == "documents" else "train"
    return write_vectors(
        out, matrix, ids, of=of, split=split, similarity=similarity, model=model, collection=collection.ref()
    )


def test_batch_by_hand(collection: Collection) -> None:
    """Distinct documents are rows 2, 7, 9, in this order; query 1 has an empty third slot."""
    batch = collator(collection).batch([{"query": 0, "visit": 0}, {"query": 1, "visit": 0}])
    assert batch.queries == ["text 0", "text 1"]
    assert batch.documents == [tiny.document_text(row) for row in (2, 7, 9)]
    assert batch.column.tolist() == [[1, 0, 2], [0, 1, 0]]
    assert batch.present.tolist() == [[True, True, True], [True, True, False]]
    np.testing.assert_array_equal(batch.teacher, np.array([[3, 2, 1], [5, NAN, NAN]], dtype=np.float32))
    assert batch.relevant.tolist() == [[False, True, False], [True, False, False]]
    assert batch.teacher_queries is None and batch.teacher_documents is None


def test_same_query_twice_in_a_batch(collection: Collection) -> None:
    batch = collator(collection).batch([{"query": 1, "visit": 0}, {"query": 1, "visit": 1}])
    assert batch.queries == ["text 1", "text 1"] and len(batch.documents) == 2
    assert batch.column.tolist() == [[0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_teacher_vectors_are_looked_up(similarity: str, collection: Collection, tmp_path: Path) -> None:
    """Document row r is [r + 1, 0], query i is [3, 4] · (i + 1): of unit length for a cosine teacher."""
    matrix = np.stack([np.arange(1, 41), np.zeros(40)], axis=1)
    documents = embedded(tmp_path / "d", collection, "documents", tiny.ids_of(range(40)), matrix, similarity)
    ids = ["train-1", "train-0"]
    queries = embedded(tmp_path / "q", collection, "queries", ids, np.array([[6.0, 8.0], [3.0, 4.0]]), similarity)
    vectors = TeacherVectors([documents, queries], collection)
    assert vectors.complete(QUERIES)
    batch = collator(collection, vectors).batch([{"query": 0, "visit": 0}, {"query": 1, "visit": 0}])
    assert batch.teacher_queries is not None and batch.teacher_documents is not None
    if similarity == "dot":
        assert batch.teacher_queries.tolist() == [[3, 4], [6, 8]]
        assert batch.teacher_documents.tolist() == [[3, 0], [8, 0], [10, 0]]
    else:
        np.testing.assert_allclose(batch.teacher_queries, [[0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
        np.testing.assert_allclose(batch.teacher_documents, [[1, 0], [1, 0], [1, 0]], rtol=1e-6)


def test_teacher_vectors_that_do_not_fit(collection: Collection, tmp_path: Path) -> None:
    ids = tiny.ids_of(range(40))
    documents = embedded(tmp_path / "d", collection, "documents", ids, np.ones((40, 2)))
    queries = embedded(tmp_path / "q", collection, "queries", ["train-0"], np.ones((1, 2)))
    assert not TeacherVectors([documents], collection).complete(QUERIES)
    assert not TeacherVectors([documents, queries], collection).complete(QUERIES)
    other = embedded(tmp_path / "o", collection, "queries", ["train-0"], np.ones((1, 2)), model=tiny.reference("bb"))
    with pytest.raises(ArtifactError, match="come from different models"):
        TeacherVectors([documents, other], collection)
    turned = embedded(tmp_path / "t", collection, "documents", ids[::-1], np.ones((40, 2)))
    with pytest.raises(ArtifactError, match="are not the collection's 40 documents"):
        TeacherVectors([turned], collection)
    elsewhere = tiny.make_tiny_collection(tmp_path, "elsewhere")
    with pytest.raises(ArtifactError, match="of another collection"):
        TeacherVectors([documents], elsewhere)


def test_a_copy_without_weights_tokenises_alike(dense: Path) -> None:
    """Worker processes get the tokenizer, prompts and lengths; no weight is copied or shared."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(dense), prompts={"query": "query: "})
    copy = without_weights(model)
    assert all(tensor.is_meta for tensor in [*copy.parameters(), *copy.buffers()])
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    for task in ("query", "document"):
        prompt = model.prompts.get(task)
        found = copy.preprocess(["w1 w2 w3", "w4"], prompt=prompt, task=task)
        expected = model.preprocess(["w1 w2 w3", "w4"], prompt=prompt, task=task)
        assert found.keys() == expected.keys()
        assert torch.equal(found["input_ids"], expected["input_ids"])
