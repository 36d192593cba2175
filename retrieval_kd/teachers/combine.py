"""How the scores of several teachers for one query become one score: normalised, joined, aggregated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.data.score_statistics import Moments
from retrieval_kd.data.scores import ScoredQuery
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.recipe import Recipe

EPSILON = 1e-6
"""Added to the range of a min-max, as the heterogeneous ensembles of OpenSearch's sparse encoders have it."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EnsembleRecipe(Recipe):
    """How score files are combined: each is normalised by itself, then the documents are joined and aggregated."""

    stage: ClassVar[str] = "teachers"

    kind: Literal["ensemble"]
    normalise: Literal["none", "min-max", "z-score", "rank", "softmax"] = "none"
    over: Literal["query", "global"] = "query"
    """Whether min and max, or mean and deviation, are those of a query's scores or of the whole file's."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Of the softmax."""
    aggregate: Literal["mean", "weighted", "max", "reciprocal-rank"] = "mean"
    weights: dict[str, Weight] | list[Weight] | None = None
    """Of `weighted`: by the members' names, or in their order."""
    k: float = Field(60.0, ge=0, allow_inf_nan=False)
    """Of `reciprocal-rank`: a document's score is the sum of 1 / (k + rank)."""
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    join: Literal["intersection", "union"] = "intersection"
    """Which documents of a query are kept: those that all members scored, or those that any did."""
    fill: Literal["lowest"] | Finite | None = None
    """A union's score (after normalisation) of a document that a member lacks; its lowest of the query, or a number."""
    pairs_per_shard: int = Field(8192, ge=1)

    @property
    def independent(self) -> bool:
        """Whether a combined score depends on its pair alone, not on other pairs of the file."""
        return self.aggregate != "reciprocal-rank" and self.fill != "lowest" and self.normalise == "none"

    @model_validator(mode="after")
    def _consistent(self) -> EnsembleRecipe:
        by_rank = self.aggregate == "reciprocal-rank"
        if by_rank and self.normalise != "none":
            raise ValueError("aggregate: reciprocal-rank looks at ranks only; leave out normalise")
        if self.over == "global" and self.normalise not in ("min-max", "z-score"):
            raise ValueError("over: global is for normalise: min-max and z-score")
        if (self.weights is None) == (self.aggregate == "weighted"):
            raise ValueError("weights and aggregate: weighted go together; give both or neither")
        if self.weights is not None and not sum(_values(self.weights)) > 0:
            raise ValueError("weights: at least one must be above 0")
        if (self.fill is None) == (self.join == "union" and not by_rank):
            raise ValueError(
                "fill (lowest, or a number) is what a union takes for a score that is missing: give it with "
                "join: union and only there; reciprocal-rank needs none, a missing document adds nothing"
            )
        return self


class Ensemble:
    """Combines the members' rows of one query. Not a `Teacher`: it reads score files and never a text."""

    Recipe: ClassVar[type[EnsembleRecipe]] = EnsembleRecipe

    def __init__(self, recipe: EnsembleRecipe, weights: np.ndarray, moments: Sequence[Moments] | None = None) -> None:
        """``weights`` [members]; ``moments`` of each member's whole file when the recipe normalises over it."""
        self.recipe = recipe
        self.counts: Counter[str] = Counter()
        self._weights = weights
        self._moments = moments

    def combine(self, query_id: str, rows: Sequence[ScoredQuery | None]) -> ScoredQuery | None:
        """The combined row of a query; None when no document is left, or when `lowest` has nothing to fill in.

        ``rows`` are the members', None where a member lacks the query. Documents are in the first member's order,
        then in that of the others. Arithmetic is float64 until the end. ``tokens_lost`` is the most that a member lost
        of the pair, None where one of them does not know.
        """
        scored = dict.fromkeys(doc_id for row in rows if row for doc_id in row.doc_ids)
        kept: Iterable[str] = scored
        if self.recipe.join == "intersection":
            sets = [set(row.doc_ids) if row else set() for row in rows]
            kept = [doc_id for doc_id in scored if all(doc_id in of_member for of_member in sets)]
        place = {doc_id: i for i, doc_id in enumerate(kept)}
        lacks_query = any(row is None for row in rows)
        if not place or (lacks_query and self.recipe.fill == "lowest"):
            return None
        matrix = self._matrix(place, rows)
        with np.errstate(over="ignore"):
            scores = (self._aggregate(matrix) * self.recipe.scale).astype(np.float32)
        if not np.isfinite(scores).all():
            raise RetrievalKDError(
                f"query {query_id!r}: a combined score is too large for float32; lower scale or fill"
            )
        self.counts["pairs_left_out"] += len(scored) - len(place)
        return ScoredQuery(query_id, list(place), scores, _tokens_lost(place, rows))

    def _matrix(self, place: Mapping[str, int], rows: Sequence[ScoredQuery | None]) -> np.ndarray:
        """[members, documents] of normalised scores, or of 1 / (k + rank); what is missing is filled in and counted."""
        fill = 0.0 if self.recipe.aggregate == "reciprocal-rank" else self.recipe.fill
        matrix = np.full((len(rows), len(place)), np.nan)
        for member, row in enumerate(rows):
            values = self._normalised(member, row.scores) if row else np.empty(0)
            for doc_id, value in zip(row.doc_ids if row else (), values.tolist(), strict=True):
                if doc_id in place:
                    matrix[member, place[doc_id]] = value
            missing = np.isnan(matrix[member])
            if missing.any():
                matrix[member, missing] = values.min() if fill == "lowest" else fill
                self.counts["missing_scores"] += int(missing.sum())
        return matrix

    def _normalised(self, member: int, scores: np.ndarray) -> np.ndarray:
        values = scores.astype(np.float64)
        if self.recipe.aggregate == "reciprocal-rank":
            return 1 / (self.recipe.k + ranks(values))
        if self.recipe.normalise == "none":
            return values
        if self.recipe.normalise == "rank":
            return (len(values) + 1 - ranks(values)) / len(values)
        if self.recipe.normalise == "softmax":
            powers = np.exp((values - values.max()) / self.recipe.temperature)
            return np.asarray(powers / powers.sum())
        if self._moments is not None:
            moments = self._moments[member]
        else:
            moments = Moments()
            moments.add(values)
        if self.recipe.normalise == "min-max":
            return (values - moments.low) / (moments.high - moments.low + EPSILON)
        return (values - moments.mean) / moments.std if moments.std else np.zeros_like(values)

    def _aggregate(self, matrix: np.ndarray) -> np.ndarray:
        if self.recipe.aggregate == "reciprocal-rank":
            return np.asarray(matrix.sum(axis=0))
        if self.recipe.aggregate == "max":
            return np.asarray(matrix.max(axis=0))
        return np.asarray(self._weights @ matrix / self._weights.sum())


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value [n], 1 for the highest; tied values share the mean of their ranks."""
    _, places, counts = np.unique(-values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[places])


def _tokens_lost(place: Mapping[str, int], rows: Sequence[ScoredQuery | None]) -> np.ndarray | None:
    most = np.zeros(len(place), dtype=np.int32)
    for row in rows:
        if row is None:
            continue
        if row.tokens_lost is None:
            return None
        for doc_id, tokens in zip(row.doc_ids, row.tokens_lost.tolist(), strict=True):
            if doc_id in place:
                most[place[doc_id]] = max(most[place[doc_id]], tokens)
    return most


def _values(weights: Mapping[str, float] | Sequence[float]) -> list[float]:
    return list(weights.values() if isinstance(weights, Mapping) else weights)
