"""The query tower: a small encoder of queries for a large model's document vectors, whose index stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.errors import UsageError
from retrieval_kd.losses.terms import Embedding, LossTerm
from retrieval_kd.students.base import Batch, Development, Fitted
from retrieval_kd.students.single_vector import SingleVectorRecipe, SingleVectorStudent

if TYPE_CHECKING:
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor

    from retrieval_kd.artifact import InputRef
    from retrieval_kd.data.collection import Documents
    from retrieval_kd.losses.objective import Outputs
    from retrieval_kd.plan import Draft
    from retrieval_kd.students.collate import TeacherVectors
    from retrieval_kd.students.groups import TrainingQuery
    from retrieval_kd.students.inputs import TrainingInputs


class QueryTowerStudent(SingleVectorStudent):
    """A `SentenceTransformer` for queries alone, distilled to a frozen document tower (ScalingNote, arXiv 2411.15766).

    It learns the teacher's query vectors and, from score files, the order of its groups by the teacher's document
    vectors; no document is read. A base of another dimension gets a linear projection. With the vectors that an index
    decodes, its scores are with these: the query encoder of Distill-VQ, which learns to make up for what codes lost.
    """

    class Recipe(SingleVectorRecipe):
        """Keys of ``kind: query-tower``. The similarity is the teacher's; ``against: teacher`` measures the cosine."""

        queries_alone: ClassVar[bool] = True
        goal: ClassVar[str] = "the teacher's vectors of queries held out"

        kind: Literal["query-tower"]
        losses: list[LossTerm] = Field(
            default=[Embedding(kind="embedding", distance="mse"), Embedding(kind="embedding", distance="cosine")],
            min_length=1,
        )
        development: Development = Development(measure="cosine")

        @model_validator(mode="before")
        @classmethod
        def _measure(cls, values: Any) -> Any:
            development = values.get("development") if isinstance(values, dict) else None
            if isinstance(development, dict) and development.get("against", "teacher") == "teacher":
                return {**values, "development": {"measure": "cosine", **development}}
            return values

        @model_validator(mode="after")
        def _cosine_with_the_teacher(self) -> QueryTowerStudent.Recipe:
            if self.development.against == "teacher" and self.development.measure != "cosine":
                raise ValueError("development: against the teacher a query tower is measured by `measure: cosine`")
            return self

    recipe: Recipe
    teacher: TeacherVectors
    """The vectors to learn; known when training begins, as the model that made them."""
    model: InputRef

    def fit(self, inputs: TrainingInputs, draft: Draft) -> Fitted:
        """The tower as the recipe's losses made it; `UsageError` without the teacher's vectors."""
        from retrieval_kd.students.collate import TeacherVectors

        if not inputs.vectors:
            raise UsageError(
                "a query-tower learns the teacher's vectors: give --teacher-vectors QUERIES "
                "(retrieval-kd encode MODEL --collection C --queries SPLIT)"
            )
        self.teach(TeacherVectors(inputs.vectors, inputs.collection))
        self.model = inputs.vectors[0].model_ref
        return super().fit(inputs, draft)

    def teach(self, teacher: TeacherVectors) -> None:
        """Sets the vectors to learn, which say the dimension and the similarity."""
        self.teacher = teacher
        self.similarity = teacher.similarity

    def start(self) -> BaseModel:
        """The base model, projected to the teacher's dimension where it has another."""
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Dense, Normalize

        model: Any = super().start()
        dimension = int(model.get_embedding_dimension())
        modules = [module for module in model if not isinstance(module, Normalize)]
        if dimension != self.teacher.dimension:
            torch.manual_seed(self.recipe.seed)
            modules.append(Dense(dimension, self.teacher.dimension, activation_function=torch.nn.Identity()))
        if self.similarity == "cosine":
            modules.append(Normalize())
        return SentenceTransformer(modules=modules, prompts=model.prompts, similarity_fn_name=self.similarity)

    def tokenize(self, model: BaseModel, batch: Batch) -> dict[str, Any]:
        """``query_*`` [B, …] features; documents are vectors already."""
        prompt = (model.prompts or {}).get("query") or None
        return {
            f"query_{key}": value for key, value in model.preprocess(batch.queries, prompt=prompt, task="query").items()
        }

    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """Encodes B queries; scores are with the teacher's document vectors, losses on vectors see queries alone."""
        from retrieval_kd.losses.objective import Outputs

        queries = self.embed(model, features[0])
        vectors = {"vectors": self.comparable(queries), "teacher_vectors": labels["teacher_queries"]}
        if len(labels["teacher_documents"]):
            documents = labels.get("decoded_documents", labels["teacher_documents"])
            found = self.outputs_of([queries, documents], parameters, labels)
            return dataclasses.replace(found, **vectors)
        nothing = labels["present"]
        return Outputs(
            scores=queries.new_zeros(nothing.shape),
            present=nothing,
            teacher=labels["teacher"],
            known=nothing,
            **vectors,
        )

    def compare(self, queries: Tensor, documents: Tensor, parameters: Any) -> Tensor:
        """Scores [B, U] with document vectors as they are: the teacher's have unit length by now, decoded ones not."""
        return self.scaled(self.comparable(queries) @ documents.T, parameters)

    def pool_scores(self, model: Any, queries: Sequence[str], documents: Documents, rows: np.ndarray) -> np.ndarray:
        """Similarities [queries, rows] with the teacher's document vectors, or inner products with decoded ones."""
        found = model.encode_query(list(queries), show_progress_bar=False)
        if self.teacher.decoded is not None:
            if self.similarity == "cosine":
                found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
            return np.asarray(found @ self.teacher.decoded[rows].T, dtype=np.float32)
        assert self.teacher.documents is not None
        return self.similarities(found, np.asarray(self.teacher.documents[rows]))

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Nothing: a query tower cannot encode texts of documents."""
        raise UsageError("a query tower encodes queries alone; documents are the teacher's vectors")

    def evaluator(self, inputs: TrainingInputs, held: Sequence[TrainingQuery]) -> BaseEvaluator | None:
        """The mean cosine with the teacher's vectors of ``held`` queries, or a measure over its document vectors."""
        against = self.recipe.development.against
        if against == "qrels" and self.teacher.documents is None:
            raise UsageError("development: against the qrels needs --teacher-vectors of the documents too")
        if against != "teacher":
            return super().evaluator(inputs, held)
        if self.teacher.decoded is not None:
            raise UsageError(
                "development: against the teacher measures how near its query vectors are, which a tower for decoded "
                "documents is to leave; set development.against to nothing or qrels"
            )
        if not held:
            return None
        from retrieval_kd.students.development import VectorEvaluator

        inputs.teacher_vectors(held)
        goal, _ = self.teacher.of(held, np.zeros(0, dtype=np.int64))
        return VectorEvaluator([query.text for query in held], goal)

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """Similarity and scale, and the model for whose index it makes query vectors."""
        model = {"fingerprint": self.model.fingerprint, "similarity": self.similarity}
        return {**super().settings(parameters), "queries_for": model}

    def notes(self) -> list[str]:
        """What it is for."""
        name = f" `{self.model.name}`" if self.model.name else ""
        return [
            f"For queries alone, in indexes whose documents the model{name} encoded "
            f"(fingerprint `{self.model.fingerprint[:12]}`)."
        ]
