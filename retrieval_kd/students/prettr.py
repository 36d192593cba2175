"""The PreTTR student: a re-ranker whose first layers read documents alone, so that their states can be stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retrieval_kd.students.reranker import OwnNetwork, OwnNetworkRecipe

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


class PreTTRStudent(OwnNetwork):
    """A `CrossEncoder` of one `PreTTR` module around a BERT or DistilBERT (MacAvaney et al. 2020)."""

    class Recipe(OwnNetworkRecipe):
        """Keys of ``kind: prettr``; the first ``layers_apart`` of the kept layers read the texts apart."""

        kind: Literal["prettr"]
        layers_apart: int = Field(default=3, ge=0)

    recipe: Recipe

    def start(self) -> BaseModel:
        """The base network, cut to ``layers``, with a new head."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        from retrieval_kd.models.layers import keep_layers
        from retrieval_kd.models.load import find_model
        from retrieval_kd.models.prettr import PreTTR

        recipe = self.recipe
        path = find_model(recipe.base).path
        network = AutoModel.from_pretrained(path, dtype=torch.float32)
        if recipe.layers is not None:
            keep_layers(network, recipe.layers)
        torch.manual_seed(recipe.seed)
        return self.wrapped(
            PreTTR(
                AutoTokenizer.from_pretrained(path),
                network,
                layers_apart=recipe.layers_apart,
                query_length=recipe.query_length,
                document_length=recipe.document_length,
            )
        )

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """How many layers read the texts apart."""
        return {"layers_apart": self.recipe.layers_apart}
