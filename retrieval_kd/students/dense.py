"""The dense student: one vector a text, compared by cosine (with a scale) or dot product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.recipe import Section
from retrieval_kd.students.base import Batch, Student, StudentRecipe

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor

    from retrieval_kd.losses.objective import Outputs

_TEXTS_AT_ONCE = 32


class Scale(Section):
    """What a cosine is multiplied by before a loss sees it: cosines alone cannot reach a teacher's margins."""

    initial: float = Field(default=20.0, gt=0)
    learned: bool = True


class DenseStudent(Student):
    """A `SentenceTransformer` bi-encoder; encodes queries and documents with one network."""

    class Recipe(StudentRecipe):
        """Keys of ``kind: dense``."""

        kind: Literal["dense"]
        pooling: Literal["mean", "cls", "lasttoken"] = "mean"
        similarity: Literal["cosine", "dot"] = "cosine"
        scale: Scale = Scale()
        prompts: dict[Literal["query", "document"], str] = Field(default_factory=dict)

    recipe: Recipe

    def start(self) -> BaseModel:
        """The base model cut to ``layers``; a plain transformer gets a pooling layer on top."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        from retrieval_kd.models.layers import keep_layers
        from retrieval_kd.models.load import find_model

        path = find_model(self.recipe.base).path
        if (path / "modules.json").is_file():
            model = SentenceTransformer(str(path), similarity_fn_name=self.recipe.similarity)
        else:
            network = Transformer(str(path))
            pooling = Pooling(network.get_embedding_dimension(), pooling_mode=self.recipe.pooling)
            model = SentenceTransformer(modules=[network, pooling], similarity_fn_name=self.recipe.similarity)
        if self.recipe.similarity == "dot":
            model = SentenceTransformer(
                modules=[module for module in model if not isinstance(module, Normalize)],
                similarity_fn_name="dot",
                prompts=model.prompts,
            )
        if self.recipe.layers is not None:
            keep_layers(model[0].auto_model, self.recipe.layers)
        if self.recipe.prompts:
            model.prompts = {**model.prompts, **self.recipe.prompts}
        if self.recipe.query_length is not None:
            model[0].query_length = self.recipe.query_length
        if self.recipe.document_length is not None:
            model[0].document_length = self.recipe.document_length
        return model

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """`SentenceTransformerTrainer`."""
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

        return SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    def tokenize(self, model: BaseModel, batch: Batch) -> dict[str, Any]:
        """``query_*`` [B, …] and ``document_*`` [U, …] features."""
        features = {}
        for task, texts in (("query", batch.queries), ("document", batch.documents)):
            prompt = (model.prompts or {}).get(task) or None
            for key, value in model.preprocess(texts, prompt=prompt, task=task).items():
                features[f"{task}_{key}"] = value
        return features

    def extra_parameters(self) -> dict[str, Tensor]:
        """The logarithm of the scale, for a cosine student whose scale is learned."""
        import torch

        if self.recipe.similarity == "dot" or not self.recipe.scale.learned:
            return {}
        return {"log_scale": torch.tensor(self.recipe.scale.initial).log()}

    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """Encodes B queries and U documents once; every group's scores are a look-up in [B, U]."""
        import torch

        from retrieval_kd.losses.objective import Outputs

        queries = _vectors(model, features[0])
        documents = _vectors(model, features[1])
        if self.recipe.similarity == "cosine":
            queries = torch.nn.functional.normalize(queries, dim=1)
            documents = torch.nn.functional.normalize(documents, dim=1)
            scale = parameters["log_scale"].exp() if "log_scale" in parameters else self.recipe.scale.initial
        else:
            scale = 1.0
        batch_scores = scale * (queries @ documents.T)
        column, present, teacher = labels["column"], labels["present"], labels["teacher"]
        positive = column[:, 0]
        own = torch.nn.functional.one_hot(positive, batch_scores.shape[1]).bool()
        teacher_vectors = batch_teacher = None
        if "teacher_queries" in labels:
            teacher_vectors = torch.cat([labels["teacher_queries"], labels["teacher_documents"]])
            batch_teacher = labels["teacher_queries"] @ labels["teacher_documents"].T
        return Outputs(
            scores=batch_scores.gather(1, column),
            present=present,
            teacher=teacher,
            known=present & teacher.isfinite(),
            batch_scores=batch_scores,
            batch_allowed=own | ~labels["relevant"],
            positive=positive,
            batch_teacher=batch_teacher,
            vectors=torch.cat([queries, documents]),
            teacher_vectors=teacher_vectors,
        )

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Similarities [queries, documents] without the scale."""
        q = model.encode_query(list(queries), show_progress_bar=False)
        d = model.encode_document(list(documents), show_progress_bar=False)
        if self.recipe.similarity == "cosine":
            q, d = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (q, d))
        return np.asarray(q @ d.T, dtype=np.float32)

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """Similarity and the scale that training ended with."""
        scale = float(np.exp(parameters["log_scale"])) if "log_scale" in parameters else self.recipe.scale.initial
        return {"similarity": self.recipe.similarity, "scale": scale if self.recipe.similarity == "cosine" else 1.0}


def _vectors(model: Any, features: dict[str, Tensor]) -> Tensor:
    """Vectors [n, d] of n texts, run through the network in parts of similar length: padding costs as much as text."""
    import torch

    lengths = features["attention_mask"].sum(dim=1)
    order = lengths.argsort()
    tensors = {key: value for key, value in features.items() if torch.is_tensor(value)}
    others = {key: value for key, value in features.items() if key not in tensors}
    vectors = []
    for part in order.split(_TEXTS_AT_ONCE):
        width = int(lengths[part].max())
        vectors.append(model({**others, **{k: v[part, :width] for k, v in tensors.items()}})["sentence_embedding"])
    return torch.cat(vectors)[order.argsort()]
