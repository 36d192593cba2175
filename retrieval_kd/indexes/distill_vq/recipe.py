"""The recipe of a Distill-VQ index: which stock FAISS index it becomes, and how its parts are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retrieval_kd.errors import RecipeError
from retrieval_kd.indexes.distill_vq.layout import layout_of
from retrieval_kd.indexes.faiss_recipe import FaissRecipe
from retrieval_kd.recipe import Section

LossName = Literal["listnet", "kl", "reverse-kl", "margin-mse", "ranknet", "mse"]


class Training(Section):
    """How codebooks and centroids are trained. An epoch visits every training query once."""

    epochs: int = Field(default=20, ge=0)
    """0 leaves what FAISS trained, refined where codebooks are added."""
    batch: int = Field(default=64, ge=1)
    """Queries a step."""
    documents: int = Field(default=20, ge=1)
    """Documents drawn from a query's ``top`` beside its best one; those of the whole batch are compared."""
    top: int = Field(default=20, ge=2)
    loss: LossName = "listnet"
    temperature: float = Field(default=0.1, gt=0)
    """Divides the student's scores and the vectors' inner products."""
    score_temperature: float = Field(default=1.0, gt=0)
    """Divides the scores of score files."""
    score_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of score files against the vectors' own inner products, where score files are given."""
    pseudo_queries: int = Field(default=20000, ge=0)
    """At most so many documents serve as queries."""
    pseudo_share: float = Field(default=0.5, ge=0, le=1)
    """Their share of a batch where real queries are given; without these, they are all there is."""
    own_document: bool = False
    """Whether a document that serves as a query is among its own results."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the queries (50 to 500) that are not trained on and decide which epoch is the best."""
    selection: Literal["straight-through", "fixed"] = "fixed"
    """Codes are chosen in every step, with a gradient for the choice, or in every epoch: a third of the time."""
    refinement: int = Field(default=5, ge=0)
    """Rounds of alternating codes and codewords before training, where codebooks are added (RQ)."""
    reconstruction: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight of the squared error of documents beside the loss; ``auto``: 10 for RQ, 0 for PQ."""
    centroid_weight: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight of the loss of centroids alone; ``auto``: as large as that of the codes in the first step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    centroid_learning_rate: float = Field(default=1e-3, gt=0)
    rotation_learning_rate: float = Field(default=0.0, ge=0)
    """Above 0 the OPQ rotation is learned too, and stays orthogonal."""
    query_learning_rate: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Above 0 a linear map of queries is learned too, the first step of the FAISS index; ``auto``: 0.002 with OPQ, in
    whose place it is, else 0."""


class DistillVQRecipe(FaissRecipe):
    """A factory string of PQ or RQ, with or without OPQ and IVF, or of IVF alone, and how it is trained."""

    kind: Literal["distill-vq"]  # type: ignore[assignment]
    residual: bool = True
    """With IVF: whether codes are of what the centroid leaves, or of the document itself."""
    training: Training = Training()

    @model_validator(mode="after")
    def _check(self) -> DistillVQRecipe:
        layout = layout_of(self.factory)
        if self.rerank is not None:
            raise RecipeError("a distill-vq index has no rerank; use kind faiss for it")
        if self.ef_construction is not None:
            raise RecipeError("a distill-vq index has no graph and no ef_construction")
        if self.training.rotation_learning_rate and not layout.rotated:
            raise RecipeError(f"factory '{self.factory}' has no rotation to learn; put OPQ in front")
        return self
