"""The cross-encoder student: a re-ranker that reads query and document together; fine-tuned, it is a teacher too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from retrieval_kd.students.reranker import Reranker, RerankerRecipe

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


class CrossEncoderStudent(Reranker):
    """A `CrossEncoder` around a transformer with one output."""

    class Recipe(RerankerRecipe):
        """Keys of ``kind: cross-encoder``."""

        kind: Literal["cross-encoder"]
        max_length: int = Field(default=256, ge=8)

        @field_validator("query_length", "document_length")
        @classmethod
        def _one_length(cls, value: int | None) -> int | None:
            if value is not None:
                raise ValueError("a cross-encoder reads pairs: give max_length")
            return value

    recipe: Recipe

    def start(self) -> BaseModel:
        """The base network with a new one-output head, cut to ``layers``."""
        import torch
        from sentence_transformers import CrossEncoder

        from retrieval_kd.models.encoder import new_parts_expected
        from retrieval_kd.models.layers import keep_layers
        from retrieval_kd.models.load import find_model

        torch.manual_seed(self.recipe.seed)
        path = find_model(self.recipe.base).path
        with new_parts_expected():
            model = CrossEncoder(
                str(path), num_labels=1, max_length=self.recipe.max_length, activation_fn=torch.nn.Identity()
            )
        if self.recipe.layers is not None:
            keep_layers(model[0].auto_model, self.recipe.layers)
        return model

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """The pair length."""
        return {"max_length": self.recipe.max_length}
