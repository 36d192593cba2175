"""The recipe's ``groups:``: how a query's documents are drawn each time it is visited."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retrieval_kd.losses.terms import FalseNegatives
from retrieval_kd.recipe import Section

Positive = Annotated[float, Field(gt=0)]
Rank = Annotated[int, Field(ge=1)]


class Reweight(Section):
    """Mixing weights that follow the gap between student and teacher (DDK, Liu et al. 2024, arXiv 2407.16154).

    After each ``every`` steps the losses on ``queries`` held-out lists of every file (a tenth of its lists at most)
    become shares: softmax of the losses, of which ``floor`` is spread evenly over the files. ``smoothing`` is how much
    of the last weights stays. The losses must be on one scale: give the terms a ``target`` where the teachers' differ.
    """

    every: int = Field(default=100, ge=1)
    smoothing: float = Field(default=0.5, ge=0, lt=1)
    floor: float = Field(default=0.5, gt=0, le=1)
    queries: int = Field(default=64, ge=1)


class Groups(Section):
    """How a group of documents is drawn for a query each time it is visited.

    ``positive`` fills slot 0: a relevant document by the qrels, or the teacher's best. ``positives: all`` visits a
    query once for each relevant document, not once with any of them.

    ``negatives`` fill the rest from the query's candidates, best first: at ``random``, the ``hardest`` (best scored),
    ``spread`` over the teacher's ranking (one from each of equally large parts), ``top-random`` (at random from the
    best ``pool``), or ``margin-bins`` (each from a random one of ``bins`` equally wide parts of the teacher's margins,
    TAS-Balanced, Hofstätter et al. 2021).

    Never drawn: ranks outside ``range`` (1 is the best candidate); what the rule ``false_negatives`` takes for relevant
    by the teacher (with it only scored documents are drawn); judged relevant documents, with ``positive: qrels`` or
    ``labels: avoid``. A positive whose margin to every negative is below ``min_margin`` is left out.

    Several score files are joined; with ``mix``, one weight a file, each visit takes a list of one of them.
    """

    documents: int = Field(default=8, ge=2)
    positive: Literal["qrels", "teacher"] = "teacher"
    positives: Literal["one", "all"] = "one"
    negatives: Literal["random", "hardest", "spread", "top-random", "margin-bins"] = "random"
    pool: int = Field(default=100, ge=1)
    bins: int = Field(default=10, ge=2)
    range: tuple[Rank, Rank] | None = None
    false_negatives: FalseNegatives | None = None
    min_margin: float | None = Field(default=None, gt=0)
    labels: Literal["ignore", "avoid"] = "ignore"
    mix: list[Positive] | None = Field(default=None, min_length=2)
    reweight: Reweight | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Groups:
        if self.range is not None and self.range[0] > self.range[1]:
            raise ValueError(f"range: {list(self.range)} ends before it starts; give [from, to]")
        for name, needed in (("pool", "top-random"), ("bins", "margin-bins")):
            if name in self.model_fields_set and self.negatives != needed:
                raise ValueError(f"{name} belongs to 'negatives: {needed}', not to '{self.negatives}'")
        if self.positives == "all" and self.positive != "qrels":
            raise ValueError("positives: all needs 'positive: qrels' (the teacher has one best document)")
        if self.reweight is not None and self.mix is None:
            raise ValueError("reweight changes the weights of mixed files; give what they start with, as mix: [1, 1]")
        return self

    @property
    def reads_labels(self) -> bool:
        """Whether the split's qrels are needed."""
        return self.positive == "qrels" or self.labels == "avoid"

    @property
    def needs_scores(self) -> str | None:
        """The key that cannot do without a teacher's scores, None where labels and candidates suffice."""
        asked = {
            "positive: teacher": self.positive == "teacher",
            "negatives: margin-bins": self.negatives == "margin-bins",
            "false_negatives": self.false_negatives is not None,
            "min_margin": self.min_margin is not None,
            "mix": self.mix is not None,
        }
        return next((key for key, needs in asked.items() if needs), None)
