"""The items of a recipe's ``losses:`` list: which loss, with which weight and settings (no tensors here)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from retrieval_kd.errors import UsageError
from retrieval_kd.recipe import Section

Over = Literal["group", "batch"]
Need = Literal["scores", "vectors", "batch", "relations"]

RANK_TRANSFORMS = ("reciprocal-rank", "minus-rank")


class Target(Section):
    """What the teacher's scores become before a loss sees them, row by row; a name alone is its ``transform``.

    ``k`` belongs to ``reciprocal-rank``, 1/(k + rank). ``scale`` multiplies at the end.
    """

    transform: Literal["none", "centre", "min-max", "z-score", "reciprocal-rank", "minus-rank"] = "none"
    scale: float = Field(default=1.0, gt=0)
    k: float = Field(default=0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"transform": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _k_of_reciprocal_rank(self) -> Target:
        if self.k and self.transform != "reciprocal-rank":
            raise ValueError(f"k belongs to 'transform: reciprocal-rank', not to '{self.transform}'")
        return self


class Term(Section):
    """What every item has: a weight, what it needs, and whether it can learn from ranks."""

    kind: str
    weight: float = Field(default=1.0, gt=0)

    @property
    def needs(self) -> frozenset[Need]:
        """What must be there: a teacher's ``scores``, its ``vectors``, scores over the ``batch``, ``relations``."""
        return frozenset()

    @property
    def rank_mend(self) -> str | None:
        """What to change so that a teacher's ranks do; None where they do already."""
        return None


class OnScores(Term):
    """A loss on a group's scores that reads the sizes of the teacher's scores."""

    target: Target = Target()

    @property
    def needs(self) -> frozenset[Need]:
        """A teacher's scores."""
        return frozenset({"scores"})

    @property
    def rank_mend(self) -> str | None:
        """A target made of ranks."""
        return None if self.target.transform in RANK_TRANSFORMS else "add `target: reciprocal-rank`"


class OnDistributions(OnScores):
    """A loss on softmax distributions, over the group or over all documents of the batch (needs teacher vectors).

    ``temperature`` is that of student and teacher, where they have none of their own.
    """

    over: Over = "group"
    temperature: float = Field(default=1.0, gt=0)
    student_temperature: float | None = Field(default=None, gt=0)
    teacher_temperature: float | None = Field(default=None, gt=0)

    @property
    def needs(self) -> frozenset[Need]:
        """A teacher's scores; over the batch its vectors and a student that scores the batch."""
        return frozenset({"vectors", "batch"} if self.over == "batch" else {"scores"})

    @property
    def temperatures(self) -> dict[str, float]:
        """Both temperatures, as the losses' arguments."""
        return {
            "student_temperature": self.student_temperature or self.temperature,
            "teacher_temperature": self.teacher_temperature or self.temperature,
        }


class MarginMSE(OnScores):
    """Margin-MSE over the group's scores (margins are not scale-free: see ``target.scale``)."""

    kind: Literal["margin-mse"]
    pairs: Literal["positive", "all"] = "positive"


class MSE(OnScores):
    """Mean squared error of the scores, for a student on its teacher's scale."""

    kind: Literal["mse"]


class KL(OnDistributions):
    """KL divergence from the teacher; ``ground_truth`` is the share of the label in the target."""

    kind: Literal["kl"]
    ground_truth: float = Field(default=0.0, ge=0, le=1)


class ReverseKL(OnDistributions):
    """KL divergence of the teacher from the student."""

    kind: Literal["reverse-kl"]


class ListNet(OnDistributions):
    """ListNet: the cross-entropy to the teacher; ``ground_truth`` is the share of the label in the target."""

    kind: Literal["listnet"]
    ground_truth: float = Field(default=0.0, ge=0, le=1)


class Sinkhorn(OnDistributions):
    """Sinkhorn distillation: optimal transport between the batch's student and teacher distributions."""

    kind: Literal["sinkhorn"]
    regularisation: float = Field(default=0.1, gt=0)
    iterations: int = Field(default=20, ge=1)


class TAID(OnDistributions):
    """ListNet on a target that moves from the student to the teacher, t from ``start`` to ``end``."""

    kind: Literal["taid"]
    start: float = Field(default=0.4, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    adaptation: float = Field(default=5e-4, ge=0)
    momentum: float = Field(default=0.99, ge=0, lt=1)

    @model_validator(mode="after")
    def _towards_the_teacher(self) -> TAID:
        if self.end < self.start:
            raise ValueError(f"end ({self.end:g}) lies before start ({self.start:g})")
        return self


class RankNet(OnScores):
    """RankNet over the pairs the teacher tells apart; only ``weights: gap`` reads more than their order."""

    kind: Literal["ranknet"]
    weights: Literal["none", "gap", "rank"] = "none"

    @property
    def rank_mend(self) -> str | None:
        """Nothing but for gaps."""
        return super().rank_mend if self.weights == "gap" else None


class LambdaLoss(OnScores):
    """LambdaLoss: the pairs the teacher tells apart, weighted by what they matter to nDCG (see `lambda_loss`).

    The weights come from ``2^target - 1``, so the target is a level of relevance: 0 to 4 in each group, unless said
    otherwise.
    """

    kind: Literal["lambda-loss"]
    target: Target = Target(transform="min-max", scale=4.0)
    scheme: Literal["none", "ndcg-loss1", "ndcg-loss2", "ndcg-loss2++", "lambda-rank"] = "ndcg-loss2++"
    k: int | None = Field(default=None, ge=1)

    @property
    def rank_mend(self) -> str | None:
        """Nothing for levels between the group's worst and best."""
        return None if self.target.transform == "min-max" else super().rank_mend


class FalseNegatives(Section):
    """Which negatives are dropped: those that the teacher scores above a bar.

    The bar is the positive's score minus ``margin``, or ``relative`` times it (0.95 in NV-Retriever), which is meant
    for scores above 0, as cosines are.
    """

    margin: float | None = None
    relative: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one(self) -> FalseNegatives:
        if (self.margin is None) == (self.relative is None):
            raise ValueError("give one of margin and relative")
        return self


class InfoNCE(Term):
    """InfoNCE on the positive, over the group or over all documents of the batch (known positives are masked)."""

    kind: Literal["info-nce"]
    over: Over = "batch"
    temperature: float = Field(default=1.0, gt=0)
    false_negatives: FalseNegatives | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """A student that scores the batch; a teacher's scores to find false negatives."""
        needs: set[Need] = {"batch"} if self.over == "batch" else set()
        return frozenset(needs | {"scores"} if self.false_negatives else needs)

    @property
    def rank_mend(self) -> str | None:
        """A margin of ranks, where a share of a score was asked for."""
        relative = self.false_negatives is not None and self.false_negatives.relative is not None
        return "write `false_negatives: {margin: 0}`" if relative else None


class Embedding(Term):
    """Embedding regression: the student's vectors of queries and documents against the teacher's."""

    kind: Literal["embedding"]
    distance: Literal["mse", "cosine"] = "mse"

    @property
    def needs(self) -> frozenset[Need]:
        """A teacher's vectors."""
        return frozenset({"vectors"})


class MIAlpha(Term):
    """MI-alpha: mutual information of the student's and the teacher's vectors, which may differ in dimension.

    ``alpha`` 1 is InfoNCE between the two; ``scale`` is what the learned critic starts with.
    """

    kind: Literal["mi-alpha"]
    alpha: float = Field(default=0.9, ge=0, le=1)
    scale: float = Field(default=20.0, gt=0)

    @property
    def needs(self) -> frozenset[Need]:
        """A teacher's vectors."""
        return frozenset({"vectors"})


class MiniLMRelations(Term):
    """MiniLMv2: relations among queries, keys and values of one layer, in ``heads`` relation heads."""

    kind: Literal["minilm-relations"]
    heads: int = Field(default=48, ge=1)

    @property
    def needs(self) -> frozenset[Need]:
        """The teacher network's states of the same tokens."""
        return frozenset({"relations"})


LossTerm = Annotated[
    MarginMSE
    | MSE
    | KL
    | ReverseKL
    | ListNet
    | RankNet
    | LambdaLoss
    | Sinkhorn
    | TAID
    | InfoNCE
    | Embedding
    | MIAlpha
    | MiniLMRelations,
    Field(discriminator="kind"),
]


def term_keys(terms: Sequence[Term]) -> list[str]:
    """A name for each term: its kind, and ``kl_2`` for the second of a kind."""
    seen: Counter[str] = Counter()
    keys = []
    for term in terms:
        seen[term.kind] += 1
        keys.append(term.kind if seen[term.kind] == 1 else f"{term.kind}_{seen[term.kind]}")
    return keys


def refuse_ranks(terms: Sequence[Term], score_kind: str, where: str) -> None:
    """Raises `UsageError` when ``where`` holds ranks and a term needs the sizes of scores; names what to change."""
    if score_kind != "rank":
        return
    for key, term in zip(term_keys(terms), terms, strict=True):
        if "scores" in term.needs and term.rank_mend:
            raise UsageError(
                f"{where}: these scores are ranks, and loss '{key}' reads their sizes; in the recipe, {term.rank_mend}"
            )
