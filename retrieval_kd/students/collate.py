"""Making a batch: groups are drawn, their texts looked up by id and tokenised; no training file holds text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import ArtifactError, InputError
from retrieval_kd.students.base import Batch
from retrieval_kd.students.groups import TrainingQuery, draw
from retrieval_kd.students.sampling import Groups

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.students.base import TrainerStudent


class TeacherVectors:
    """A teacher's vectors of the documents and of the training queries, looked up by row and by query id.

    ``decoded`` are those of the documents that an index has left of them, where such were given.
    """

    def __init__(self, vectors: Sequence[Vectors], collection: Collection) -> None:
        self.documents: np.ndarray | None = None
        self.decoded: np.ndarray | None = None
        self.similarity = "dot"
        self._queries: dict[str, np.ndarray] = {}
        if len({file.model_ref.fingerprint for file in vectors}) > 1:
            raise ArtifactError("the teacher vectors come from different models; give those of one model")
        for file in vectors:
            if file.manifest.inputs["collection"]["fingerprint"] != collection.fingerprint:
                raise ArtifactError(f"{file.path}: these vectors are of another collection")
            if file.of == "documents":
                file.check_rows(collection.documents.ids)
            if file.decoded:
                self.decoded = file.matrix
                continue
            self.similarity = file.similarity
            if file.of == "documents":
                self.documents = file.matrix
            else:
                self._queries.update(zip(file.ids, file.matrix, strict=True))

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        some = self.documents if self.documents is not None else next(iter(self._queries.values()))
        return int(some.shape[-1])

    def complete(self, queries: Sequence[TrainingQuery], *, documents: bool = True) -> bool:
        """Whether all of ``queries`` have vectors, and the documents too."""
        return (self.documents is not None or not documents) and all(q.query_id in self._queries for q in queries)

    def check_dimension(self, student: int) -> None:
        """Raises `InputError` when the teacher's vectors are not as long as the student's."""
        if self.dimension != student:
            raise InputError(
                f"loss 'embedding': the teacher's vectors have {self.dimension} dimensions, the student's {student}; "
                "take a student of the teacher's dimension, or learn from its scores (kl, margin-mse)"
            )

    def of(self, queries: Sequence[TrainingQuery], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of queries [B, d] and of document rows [U, d]; unit length when the teacher compares by cosine."""
        documents = np.zeros((0, self.dimension), dtype=np.float32) if self.documents is None else self.documents
        found = np.stack([self._queries[query.query_id] for query in queries]), np.asarray(documents[rows])
        if self.similarity == "dot":
            return found
        queries_, documents = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in found)
        return queries_, documents


def without_weights(model: Any) -> Any:
    """A copy of ``model`` that can tokenise and nothing else: what worker processes get, in place of its weights."""
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    shapes = {id(tensor): torch.empty_like(tensor, device="meta", requires_grad=False) for tensor in tensors}
    parameters = {
        id(tensor): torch.nn.Parameter(shapes[id(tensor)], requires_grad=False) for tensor in model.parameters()
    }
    return copy.deepcopy(model, {**shapes, **parameters})


@dataclass
class GroupCollator:
    """The trainer's data collator: rows ``{query, visit}`` in, tokenised texts and labels out.

    A function of the rows and the seed alone, so that it gives the same in any process.
    """

    student: TrainerStudent
    model: Any
    collection: Collection
    queries: Sequence[TrainingQuery]
    groups: Groups
    seed: int
    teacher_vectors: TeacherVectors | None = None
    valid_label_columns: tuple[str, ...] = ("label",)

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Model inputs, and under ``label`` the tensors of `Batch`."""
        import torch

        batch = self.batch(rows)
        labels = {
            "query": torch.tensor([row["query"] for row in rows]),
            "column": torch.from_numpy(batch.column),
            "present": torch.from_numpy(batch.present),
            "teacher": torch.from_numpy(batch.teacher),
            "relevant": torch.from_numpy(batch.relevant),
        }
        if batch.teacher_queries is not None and batch.teacher_documents is not None:
            labels["teacher_queries"] = torch.from_numpy(batch.teacher_queries)
            labels["teacher_documents"] = torch.from_numpy(batch.teacher_documents)
        if batch.decoded_documents is not None:
            labels["decoded_documents"] = torch.from_numpy(batch.decoded_documents)
        return {**self.student.tokenize(self.model, batch), "label": labels}

    def batch(self, rows: Sequence[Mapping[str, int]]) -> Batch:
        """The drawn groups of these visits."""
        queries = [self.queries[row["query"]] for row in rows]
        drawn = [
            draw(query, self.groups, (self.seed, row["query"], row["visit"]))
            for query, row in zip(queries, rows, strict=True)
        ]
        width = self.groups.documents
        documents, flat = np.unique(
            np.concatenate([q.rows[d] for q, d in zip(queries, drawn, strict=True)]), return_inverse=True
        )
        column = np.zeros((len(rows), width), dtype=np.int64)
        present = np.zeros((len(rows), width), dtype=bool)
        teacher = np.full((len(rows), width), np.nan, dtype=np.float32)
        relevant = np.zeros((len(rows), len(documents)), dtype=bool)
        start = 0
        for i, (query, positions) in enumerate(zip(queries, drawn, strict=True)):
            n = len(positions)
            column[i, :n] = flat[start : start + n]
            present[i, :n] = True
            teacher[i, :n] = query.scores[positions]
            relevant[i] = np.isin(documents, query.rows[query.relevant])
            start += n
        teacher_queries = teacher_documents = decoded_documents = None
        if self.teacher_vectors is not None:
            teacher_queries, teacher_documents = self.teacher_vectors.of(queries, documents)
            if self.teacher_vectors.decoded is not None:
                decoded_documents = np.asarray(self.teacher_vectors.decoded[documents])
        return Batch(
            [query.text for query in queries],
            self.collection.documents.texts(documents),
            column,
            present,
            teacher,
            relevant,
            teacher_queries,
            teacher_documents,
            decoded_documents,
        )
