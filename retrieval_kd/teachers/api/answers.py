"""What the answer of a language model says: log-odds of two words, a grade, an order. No value is ever made up."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from retrieval_kd.models.api.reply import Reply, without_thoughts
from retrieval_kd.teachers.windows import parse_permutation

UNLIKELY = -9999.0
"""The log-probability which OpenAI gives for a token outside the most likely ones: not a value."""
SMALLEST = 2.0**-24
"""What is left to all other tokens when the returned probabilities add up to 1: half a step of float32 there."""
_NUMBER = re.compile(r"[-−+.]?\w*\d\w*(?:[.,]\w*\d\w*)*")
"""A word with a digit in it, with its sign and its decimals."""


class AnswerError(Exception):
    """An answer that holds no score, after all attempts: held against its query and document, which are named."""


class PairScore(NamedTuple):
    """What an answer says of a pair: log-odds, or a grade."""

    value: float
    bounded: bool = False
    """One of the two answers was not among the returned tokens: the log-odds are a bound."""


class Order(NamedTuple):
    """The order of a window's passages."""

    positions: list[int]
    repaired: bool
    """Identifiers were missing, repeated or unknown."""


def log_odds(reply: Reply, positive: str, negative: str) -> PairScore | None:
    """log p(positive) - log p(negative) of the first token; None when neither was returned.

    The probabilities of all returned tokens that read the same, but for case and surrounding white space, are added up
    (`` Yes``, ``yes``). When one answer was not returned, the most that it can have stands for it: the probability of
    the least likely returned token, or what all returned ones leave (no less than `SMALLEST`), whichever is smaller.
    The score is then a lower bound where ``negative`` is missing, else an upper one.
    """
    returned = [(token, value) for token, value in reply.first_token or () if value > UNLIKELY]
    for_positive = [value for token, value in returned if _same(token, positive)]
    for_negative = [value for token, value in returned if _same(token, negative)]
    if not for_positive and not for_negative:
        return None
    left = 1 - math.fsum(math.exp(value) for _, value in returned)
    most = [min(math.log(max(left, SMALLEST)), *(value for _, value in returned))]
    value = _logsumexp(for_positive or most) - _logsumexp(for_negative or most)
    return PairScore(value, bounded=not (for_positive and for_negative))


def grade(reply: Reply, lowest: int, highest: int) -> PairScore | None:
    """The whole number from ``lowest`` to ``highest`` that is the only number of the answer; None when there is none.

    It may be repeated, and written as a fraction of the highest (``2/3``, ``2 out of 3``). Any other number beside it,
    such as those of the scale, leaves open which one is meant. Reasoning is no part of the answer.
    """
    answer = re.sub(rf"(?<=\d)\s*(?:/|out of)\s*{highest}\b(?![.,]\d)", "", without_thoughts(reply.content))
    numbers = {number.strip("_") for number in _NUMBER.findall(answer)}
    if len(numbers) != 1 or not (number := numbers.pop()).isdecimal() or not lowest <= int(number) <= highest:
        return None
    return PairScore(int(number))


def order(reply: Reply, identifiers: Sequence[str], answer_start: str = "") -> Order | None:
    """The order of a window's passages, repaired where necessary; None when the answer names none of them."""
    answer = answer_start + without_thoughts(reply.content)
    if not any(re.search(rf"\[\s*{re.escape(name)}\s*\]", answer) for name in identifiers):
        return None
    return Order(*parse_permutation(answer, identifiers))


def _same(token: str, answer: str) -> bool:
    """Some servers give tokens as their vocabulary spells them, with a mark for a leading space."""
    return token.strip().lstrip("▁Ġ").lower() == answer.strip().lower()


def _logsumexp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
