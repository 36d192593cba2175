"""What the kinds share whose queries a model on this machine writes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from retrieval_kd.artifact import InputRef
from retrieval_kd.models.load import ModelSource, find_model
from retrieval_kd.queries.base import DocumentQueryMaker


class LocalModelQueryMaker(DocumentQueryMaker):
    """Queries by the ``model`` at ``revision`` that the recipe names; finished chunks are kept."""

    recipe: Any
    resumable = True
    chunk = 128

    @cached_property
    def source(self) -> ModelSource:
        """Where the model is."""
        return find_model(self.recipe.model, self.recipe.revision)

    @property
    def model(self) -> str:
        """The model's name."""
        return self.source.name

    def refs(self) -> dict[str, InputRef]:
        """The model."""
        return {"model": self.source.ref()}
