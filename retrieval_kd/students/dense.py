"""The dense student: queries and documents encoded by one network, to vectors and by layers that may be cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from retrieval_kd.errors import RecipeError
from retrieval_kd.recipe import Section
from retrieval_kd.students.single_vector import SingleVectorRecipe, SingleVectorStudent

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor, nn

    from retrieval_kd.losses.objective import Outputs
    from retrieval_kd.students.objective import Objective


class Matryoshka(Section):
    """Vectors that can be cut (Kusupati et al. 2022): the losses also on the first ``dimensions`` of a vector.

    ``weights`` are those of the dimensions, 1 where not given. The whole vector always counts, with weight 1 unless it
    is among the dimensions.
    """

    dimensions: list[int] = Field(min_length=1)
    weights: list[float] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Matryoshka:
        if min(self.dimensions) < 1 or len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError(f"dimensions must be different numbers above 0 (got {self.dimensions})")
        if self.weights is not None and (len(self.weights) != len(self.dimensions) or min(self.weights) <= 0):
            raise ValueError(f"weights must be one number above 0 for each of {self.dimensions} (got {self.weights})")
        return self

    def weighted(self, whole: int) -> dict[int, float]:
        """Every dimension's weight, that of the ``whole`` vector too."""
        weights = self.weights or [1.0] * len(self.dimensions)
        return {whole: 1.0, **dict(zip(self.dimensions, weights, strict=True))}


class DenseStudent(SingleVectorStudent):
    """A `SentenceTransformer` bi-encoder."""

    class Recipe(SingleVectorRecipe):
        """Keys of ``kind: dense``.

        ``exits`` are numbers of layers after which the model can be cut, ``exit_weight`` weighs what an exit learns
        from the last layer. ``relations_from`` is the teacher network of a loss 'minilm-relations'.
        """

        kind: Literal["dense"]
        similarity: Literal["cosine", "dot"] = "cosine"
        matryoshka: Matryoshka | None = None
        exits: list[int] = Field(default_factory=list)
        exit_weight: float = Field(default=1.0, ge=0)
        relations_from: str | None = None

        def other_models(self) -> dict[str, str]:
            """The relations' teacher."""
            return {} if self.relations_from is None else {"relations_from": self.relations_from}

        @model_validator(mode="after")
        def _goes_together(self) -> DenseStudent.Recipe:
            kinds = {term.kind for term in self.losses}
            if ("minilm-relations" in kinds) != (self.relations_from is not None):
                raise ValueError("loss 'minilm-relations' and relations_from (the teacher's model) go together")
            if self.matryoshka and self.exits:
                raise ValueError("give one of matryoshka and exits")
            if (self.matryoshka or self.exits) and kinds & {"taid", "minilm-relations"}:
                raise ValueError(
                    "with matryoshka or exits a loss is computed several times: not 'taid', 'minilm-relations'"
                )
            if self.matryoshka and self.similarity == "dot":
                raise ValueError("matryoshka: cut vectors are compared by cosine; set similarity: cosine")
            if self.matryoshka and kinds & {"embedding", "mi-alpha"}:
                raise ValueError("matryoshka: losses 'embedding' and 'mi-alpha' need vectors of one length")
            return self

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.similarity = recipe.similarity

    def start(self) -> BaseModel:
        """The base model; `RecipeError` where the recipe asks for dimensions or layers that it does not have."""
        model: Any = super().start()
        dimension = int(model.get_embedding_dimension())
        if self.recipe.matryoshka and max(self.recipe.matryoshka.dimensions) > dimension:
            raise RecipeError(
                f"matryoshka.dimensions: {self.recipe.matryoshka.dimensions}: the model's vectors have {dimension}"
            )
        if self.recipe.exits:
            from retrieval_kd.students.exits import check_exits

            check_exits(model, self.recipe.exits)
        if self.recipe.relations_from is not None:
            from retrieval_kd.students.relations import RelationTeacher

            self._relation_teacher = RelationTeacher(self.recipe.relations_from, model)
        return model

    def loss(self, objective: Objective) -> nn.Module:
        """The objective; over several lengths of vectors or several exits where the recipe says so."""
        if self.recipe.exits:
            from retrieval_kd.students.exits import MultiExitLoss

            return MultiExitLoss(objective, self.recipe.exits, self.recipe.exit_weight)
        if self.recipe.matryoshka is None:
            return objective
        from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

        from retrieval_kd.students.objective import InParts, Summed

        model: Any = InParts(objective)
        weights = self.recipe.matryoshka.weighted(model.get_embedding_dimension())
        return MatryoshkaLoss(model, Summed(objective, model), list(weights), matryoshka_weights=list(weights.values()))

    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """The forward pass; with the last layer's states where a loss compares their relations."""
        if self.recipe.relations_from is None:
            return super().outputs(model, parameters, features, labels)
        from retrieval_kd.students.relations import outputs_with_relations

        return outputs_with_relations(self, self._relation_teacher, model, parameters, features, labels)

    def save(self, model: Any, folder: Path) -> None:
        """Writes the finished model, and its exits as models of their own in ``exit-LAYERS``."""
        super().save(model, folder)
        if self.recipe.exits:
            from retrieval_kd.students.exits import save_exits

            save_exits(model, self.recipe.exits, folder)

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """Similarity, scale, and what the vectors and the layers can be cut to."""
        settings = super().settings(parameters)
        if self.recipe.matryoshka:
            settings["dimensions"] = sorted(self.recipe.matryoshka.dimensions)
        if self.recipe.exits:
            settings["exits"] = sorted(self.recipe.exits)
        return settings

    def notes(self) -> list[str]:
        """What can be cut, and how it is loaded then."""
        notes = []
        if self.recipe.matryoshka:
            least = min(self.recipe.matryoshka.dimensions)
            cuts = ", ".join(map(str, sorted(self.recipe.matryoshka.dimensions)))
            notes.append(f"Its vectors can be cut to {cuts} dimensions: `SentenceTransformer(…, truncate_dim={least})`")
        if self.recipe.exits:
            exits = ", ".join(f"`exit-{layers}`" for layers in sorted(self.recipe.exits))
            notes.append(f"{exits}: the model after that many layers, for queries and documents alike")
        return notes
