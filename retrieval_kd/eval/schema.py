"""What an evaluation recipe may say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from retrieval_kd.errors import RecipeError
from retrieval_kd.measures import depth_needed, parse_measures
from retrieval_kd.recipe import Recipe, Section


class Bootstrap(Section):
    """How the intervals are drawn."""

    samples: int = Field(10_000, ge=100)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    seed: int = Field(0, ge=0)


class Compare(Section):
    """What is tested: every two systems, or each with the baseline; on the headline measure unless another is named."""

    baseline: str | None = None
    measure: str | None = None

    @field_validator("measure")
    @classmethod
    def _canonical(cls, name: str | None) -> str | None:
        return None if name is None else canonical_names([name])[0]


class EvaluationRecipe(Recipe):
    """What is measured. The first measure is the headline; ``k`` is the depth of the runs made from indexes."""

    stage: ClassVar[str] = "eval"

    kind: Literal["evaluation"]
    measures: list[str] = Field(["nDCG@10", "R@100", "RR@10", "AP"], min_length=1)
    k: int = Field(100, ge=1)
    bootstrap: Bootstrap = Bootstrap()
    compare: Compare = Compare()
    latency_queries: int = Field(50, ge=1)
    skip_query_itself: bool = False
    """Whether a hit whose document id is the query's id is left out, as BEIR does."""

    @field_validator("measures")
    @classmethod
    def _canonical(cls, names: list[str]) -> list[str]:
        return canonical_names(names)

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationRecipe:
        if depth_needed(self.measures) > self.k:
            raise ValueError(f"the measures look at {depth_needed(self.measures)} hits, k is {self.k}; raise k")
        if self.compare.measure is not None and self.compare.measure not in self.measures:
            raise ValueError(f"compare.measure {self.compare.measure!r} is not one of {', '.join(self.measures)}")
        return self


def canonical_names(names: Sequence[str]) -> list[str]:
    """The measures' canonical names, with the error that pydantic expects of a validator."""
    try:
        return [str(measure) for measure in parse_measures(names)]
    except RecipeError as error:
        raise ValueError(str(error)) from error
