"""The kinds of scores, as a score file's manifest names them; docs/formats.md says what each one is."""

from __future__ import annotations

SCORE_KINDS = (
    "logit",
    "log_odds",
    "grade",
    "rank",
    "cosine",
    "dot",
    "maxsim",
    "meanmaxsim",
    "bm25",
    "ensemble",
    "imported",
)

COUNTED_KINDS = frozenset({"grade", "rank"})
"""Few different numbers by nature: that such scores tie, or fit into fewer bits, says nothing."""
