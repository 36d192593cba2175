"""Students that encode queries and documents apart: every text of a batch once, in parts of similar length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from retrieval_kd.losses.objective import Outputs
from retrieval_kd.students.base import Batch, TrainerStudent
from retrieval_kd.students.parts import in_parts

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


class BiEncoderStudent(TrainerStudent):
    """A student whose score of a query and a document is a function of their two embeddings."""

    def tokenize(self, model: BaseModel, batch: Batch) -> dict[str, Any]:
        """``query_*`` [B, …] and ``document_*`` [U, …] features."""
        features = {}
        for task, texts in (("query", batch.queries), ("document", batch.documents)):
            prompt = (model.prompts or {}).get(task) or None
            for key, value in model.preprocess(texts, prompt=prompt, task=task).items():
                features[f"{task}_{key}"] = value
            features[f"{task}_task"] = task
        return features

    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """Encodes B queries and U documents once."""
        return self.outputs_of([self.embed(model, of_texts) for of_texts in features], parameters, labels)

    def outputs_of(self, embeddings: list[Any], parameters: Any, labels: dict[str, Tensor]) -> Outputs:
        """The same for embeddings of queries and documents that are there; compared in float32, inside autocast too."""
        with torch.autocast(embeddings[0].device.type, enabled=False):
            return self._compared([at_least_float32(vectors) for vectors in embeddings], parameters, labels)

    def _compared(self, embeddings: list[Tensor], parameters: Any, labels: dict[str, Tensor]) -> Outputs:
        queries, documents = embeddings
        column, present, teacher = labels["column"], labels["present"], labels["teacher"]
        batch_scores = None
        scores = self.group_scores(queries, documents, column, present)
        if scores is None:
            batch_scores = self.compare(queries, documents, parameters)
            scores = batch_scores.gather(1, column)
        positive = column[:, 0]
        own = one_hot(positive, labels["relevant"].shape[1]).bool()
        outputs = {
            "scores": scores,
            "present": present,
            "teacher": teacher,
            "known": present & teacher.isfinite(),
            "batch_scores": batch_scores,
            "batch_allowed": own | ~labels["relevant"],
            "positive": positive,
            "column": column,
        }
        if "teacher_queries" in labels:
            outputs["teacher_vectors"] = torch.cat([labels["teacher_queries"], labels["teacher_documents"]])
            outputs["batch_teacher"] = labels["teacher_queries"] @ labels["teacher_documents"].T
        return Outputs(**outputs, vectors=self.vectors(queries, documents))

    def embed(self, model: Any, features: dict[str, Tensor]) -> Any:
        """The embeddings [n, d] of n texts."""
        return self.in_parts(lambda part: model(part)["sentence_embedding"], features)

    @abstractmethod
    def compare(self, queries: Any, documents: Any, parameters: Any) -> Tensor:
        """Scores [B, U] of all queries with all documents of the batch, as the losses see them."""

    def group_scores(self, queries: Any, documents: Any, column: Tensor, present: Tensor) -> Tensor | None:
        """Scores [B, N] of the groups' own documents, where all of [B, U] would cost more and no loss asks for it."""
        return None

    def vectors(self, queries: Any, documents: Any) -> Tensor | None:
        """One vector a text [B+U, d] for losses on representations; None where a text has several."""
        return None

    def token_counts(self, features: dict[str, Any]) -> Tensor:
        """How many tokens [n] of each text the network must see."""
        counts: Tensor = features["attention_mask"].sum(dim=1)
        return counts

    def in_parts(self, run: Callable[[dict[str, Any]], Tensor], features: dict[str, Any]) -> Tensor:
        """``run`` over n texts as the recipe's ``texts_at_once`` and ``recompute`` say (see `parts.in_parts`)."""
        recipe = self.recipe
        return in_parts(run, features, self.token_counts(features), recipe.texts_at_once, recompute=recipe.recompute)


def at_least_float32(vectors: Tensor) -> Tensor:
    """``vectors`` as float32 where they are of half precision: a score is the difference of large numbers."""
    return vectors.float() if vectors.dtype in (torch.bfloat16, torch.float16) else vectors
