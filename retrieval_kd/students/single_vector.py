"""Students that make one vector a text: the network they start from, and how their vectors are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.errors import RecipeError
from retrieval_kd.recipe import Section
from retrieval_kd.students.base import StudentRecipe
from retrieval_kd.students.bi_encoder import BiEncoderStudent

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor


class Scale(Section):
    """What a cosine is multiplied by before a loss sees it: cosines alone cannot reach a teacher's margins."""

    initial: float = Field(default=20.0, gt=0)
    learned: bool = True


class SingleVectorRecipe(StudentRecipe):
    """What every student with one vector a text can be told; ``pooling`` is for bases that have none."""

    pooling: Literal["mean", "cls", "lasttoken"] = "mean"
    scale: Scale = Scale()
    prompts: dict[Literal["query", "document"], str] = Field(default_factory=dict)


class SingleVectorStudent(BiEncoderStudent):
    """A `SentenceTransformer` whose vectors are compared by ``similarity`` (``cosine`` or ``dot``)."""

    recipe: SingleVectorRecipe
    similarity: str

    def start(self) -> BaseModel:
        """The base model cut to ``layers``; a plain transformer gets a pooling layer on top."""
        from retrieval_kd.models.layers import keep_layers

        model = self._base()
        if self.recipe.layers is not None:
            keep_layers(model[0].auto_model, self.recipe.layers)
        if self.recipe.prompts:
            model.prompts = {**model.prompts, **self.recipe.prompts}
        if self.recipe.query_length is not None:
            model[0].query_length = self.recipe.query_length
        if self.recipe.document_length is not None:
            model[0].document_length = self.recipe.document_length
        return model

    def _base(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        from retrieval_kd.models.load import find_model

        path = find_model(self.recipe.base).path
        if not (path / "modules.json").is_file():
            network = Transformer(str(path))
            pooling = Pooling(network.get_embedding_dimension(), pooling_mode=self.recipe.pooling)
            return SentenceTransformer(modules=[network, pooling], similarity_fn_name=self.similarity)
        model = SentenceTransformer(str(path), similarity_fn_name=self.similarity)
        if "pooling" in self.recipe.model_fields_set:
            own = [module for module in model if isinstance(module, Pooling)]
            if own and own[0].pooling_mode != self.recipe.pooling:
                raise RecipeError(
                    f"pooling: {self.recipe.pooling}: the base '{self.recipe.base}' pools by "
                    f"'{own[0].pooling_mode}' already; leave the key out"
                )
        if self.similarity == "cosine":
            return model
        kept = [module for module in model if not isinstance(module, Normalize)]
        return SentenceTransformer(modules=kept, similarity_fn_name="dot", prompts=model.prompts)

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """`SentenceTransformerTrainer`."""
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

        return SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    def extra_parameters(self) -> dict[str, Tensor]:
        """The logarithm of the scale, for a cosine student whose scale is learned."""
        import torch

        if self.similarity == "dot" or not self.recipe.scale.learned:
            return {}
        return {"log_scale": torch.tensor(self.recipe.scale.initial).log()}

    def compare(self, queries: Tensor, documents: Tensor, parameters: Any) -> Tensor:
        """Scaled cosines or dot products [B, U]."""
        return self.scaled(self.comparable(queries) @ self.comparable(documents).T, parameters)

    def scaled(self, scores: Tensor, parameters: Any) -> Tensor:
        """Cosines times the scale; dot products as they are."""
        if self.similarity == "dot":
            return scores
        scale = parameters["log_scale"].exp() if "log_scale" in parameters else self.recipe.scale.initial
        product: Tensor = scale * scores
        return product

    def vectors(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Vectors [B+U, d], of unit length where the similarity is the cosine."""
        import torch

        return torch.cat([self.comparable(queries), self.comparable(documents)])

    def comparable(self, vectors: Tensor) -> Tensor:
        """Vectors [n, d] whose dot products are the similarity."""
        import torch

        return torch.nn.functional.normalize(vectors, dim=1) if self.similarity == "cosine" else vectors

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Similarities [queries, documents] without the scale."""
        q = model.encode_query(list(queries), show_progress_bar=False)
        d = model.encode_document(list(documents), show_progress_bar=False)
        return self.similarities(q, d)

    def similarities(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosines or dot products [queries, documents] of finished vectors."""
        if self.similarity == "cosine":
            queries, documents = (
                x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, documents)
            )
        return np.asarray(queries @ documents.T, dtype=np.float32)

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """Similarity and the scale that training ended with."""
        scale = float(np.exp(parameters["log_scale"])) if "log_scale" in parameters else self.recipe.scale.initial
        return {"similarity": self.similarity, "scale": scale if self.similarity == "cosine" else 1.0}
