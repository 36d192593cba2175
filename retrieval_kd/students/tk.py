"""The TK student: a re-ranker by Gaussian kernels over contextualised words, without a pre-trained transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from retrieval_kd.students.reranker import OwnNetwork, OwnNetworkRecipe

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


class TKStudent(OwnNetwork):
    """A `CrossEncoder` of one `TK` module (Hofstätter et al. 2020); words and tokenizer come from ``base``."""

    class Recipe(OwnNetworkRecipe):
        """Keys of ``kind: tk``. With ``dimension`` the embeddings are random, else the base's own.

        ``kernel_learning_rate`` is that of the kernels' weights (the paper's is ten times the others'; the same without
        it).
        """

        kind: Literal["tk"]
        dimension: int | None = Field(default=None, ge=2)
        heads: int = Field(default=8, ge=1)
        feed_forward: int = Field(default=300, ge=1)
        depth: int = Field(default=2, ge=1)
        kernel_learning_rate: float | None = Field(default=None, gt=0)

        @model_validator(mode="after")
        def _no_transformer(self) -> TKStudent.Recipe:
            if self.layers is not None:
                raise ValueError("layers: of the base a tk takes words alone; its own layers are `depth`")
            if self.gradient_checkpointing:
                raise ValueError("gradient_checkpointing: a tk has too few layers for it; `recompute` saves memory")
            return self

    recipe: Recipe

    def start(self) -> BaseModel:
        """The network with the base's words, or with random ones."""
        import torch
        from transformers import AutoTokenizer

        from retrieval_kd.models.load import find_model
        from retrieval_kd.models.tk import TK, word_embeddings

        recipe = self.recipe
        path = find_model(recipe.base).path
        tokenizer = AutoTokenizer.from_pretrained(path)
        words, dimension = None, recipe.dimension
        if dimension is None:
            words = word_embeddings(path, tokenizer)
            dimension = words.shape[1]
        torch.manual_seed(recipe.seed)
        network = TK(
            tokenizer,
            dimension=dimension,
            heads=recipe.heads,
            feed_forward=recipe.feed_forward,
            depth=recipe.depth,
            query_length=recipe.query_length,
            document_length=recipe.document_length,
        )
        if words is not None:
            network.embeddings.weight.data.copy_(words)
        return self.wrapped(network)

    def arguments(self) -> dict[str, Any]:
        """The learning rate of the kernels' weights."""
        rate = self.recipe.kernel_learning_rate
        return {"learning_rate_mapping": {r"model\.0\.(pooling\.alpha|weights)$": rate}} if rate else {}
