"""What the answer of a language model says: log-odds of two words, a grade, an order. No value is ever made up."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from retrieval_kd.teachers.windows import parse_permutation

UNLIKELY = -9999.0
"""The log-probability which OpenAI gives for a token outside the most likely ones: not a value."""
_INTEGER = re.compile(r"(?<![\w.])-?\d+(?!\w|\.\d)")
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


class AnswerError(Exception):
    """An answer that holds no score, after all attempts: held against its query and document, which are named."""


class Reply(NamedTuple):
    """What an endpoint answered: one completion."""

    content: str
    first_token: tuple[tuple[str, float], ...] | None
    """The most likely first tokens with their log-probabilities; None when the endpoint gave none."""
    usage: tuple[int, int] | None
    """Tokens of the prompt and of the answer; None when the endpoint did not say."""
    model: str | None
    """The model that the endpoint says has answered, often more precise than the one asked for."""


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
    (`` Yes``, ``yes``). When one answer was not returned, the lowest returned log-probability stands for it: no missing
    token is more likely than that, so the score is a lower bound where ``negative`` is missing, else an upper one.
    """
    returned = [(token, value) for token, value in reply.first_token or () if value > UNLIKELY]
    for_positive = [value for token, value in returned if _same(token, positive)]
    for_negative = [value for token, value in returned if _same(token, negative)]
    if not for_positive and not for_negative:
        return None
    lowest = [min(value for _, value in returned)]
    value = _logsumexp(for_positive or lowest) - _logsumexp(for_negative or lowest)
    return PairScore(value, bounded=not (for_positive and for_negative))


def grade(reply: Reply, lowest: int, highest: int) -> PairScore | None:
    """The first whole number from ``lowest`` to ``highest`` in the answer; None when there is none.

    A number with a fraction is none. What a model writes between ``<think>`` and ``</think>`` is no part of its answer.
    """
    numbers = (int(text) for text in _INTEGER.findall(without_thoughts(reply.content)))
    return next((PairScore(number) for number in numbers if lowest <= number <= highest), None)


def order(reply: Reply, identifiers: Sequence[str], answer_start: str = "") -> Order | None:
    """The order of a window's passages, repaired where necessary; None when the answer names none of them."""
    answer = answer_start + without_thoughts(reply.content)
    if not any(re.search(rf"\[\s*{re.escape(name)}\s*\]", answer) for name in identifiers):
        return None
    return Order(*parse_permutation(answer, identifiers))


def without_thoughts(content: str) -> str:
    """The answer without its reasoning; a thought that was cut off leaves nothing after it."""
    return _THOUGHT.sub("", content)


def _same(token: str, answer: str) -> bool:
    """Some servers give tokens as their vocabulary spells them, with a mark for a leading space."""
    return token.strip().lstrip("▁Ġ").lower() == answer.strip().lower()


def _logsumexp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
