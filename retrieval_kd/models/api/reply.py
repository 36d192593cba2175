"""What an endpoint answers: one completion, read from its JSON, with nothing of the key in it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_SECRET = 8
"""A shorter key (``EMPTY`` for a server of one's own) is no secret, and may be part of any text."""


class Reply(NamedTuple):
    """What an endpoint answered: one completion."""

    content: str
    first_token: tuple[tuple[str, float], ...] | None
    """The most likely first tokens with their log-probabilities; None when the endpoint gave none."""
    usage: tuple[int, int] | None
    """Tokens of the prompt and of the answer; None when the endpoint did not say."""
    model: str | None
    """The model that the endpoint says has answered, often more precise than the one asked for."""


def read_reply(raw: Any) -> Reply:
    """The reply in a response's JSON. ValueError, or any error of access, means that it is none."""
    choice = raw["choices"][0]
    if raw.get("error") or choice.get("error") or choice.get("finish_reason") == "error":
        raise ValueError("an error, whatever else was answered")
    content = choice["message"].get("content") if "message" in choice else choice["text"]
    if not isinstance(content, str | None):
        raise TypeError("content")
    model = raw.get("model")
    return Reply(
        content=content or "",
        first_token=_first_token(choice.get("logprobs")),
        usage=_usage(raw.get("usage")),
        model=model if isinstance(model, str) else None,
    )


def without_thoughts(content: str) -> str:
    """What follows the last ``</think>`` (its beginning may have been in the prompt), up to a thought that was cut."""
    return content.rpartition("</think>")[2].partition("<think>")[0]


def without_key(value: Any, key: str | None) -> Any:
    """A text, or decoded JSON, in which ``[key]`` stands for the key, as it is or with its characters escaped."""
    if key is None or len(key) < _SECRET:
        return value
    characters = (rf"(?:\\*{re.escape(c)}|\\+u00{ord(c):02x}|%{ord(c):02x}|&#(?:{ord(c)}|x{ord(c):x});)" for c in key)
    pattern = re.compile("".join(characters), re.IGNORECASE)

    def cleaned(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub("[key]", part)
        if isinstance(part, list):
            return [cleaned(item) for item in part]
        if isinstance(part, dict):
            return {cleaned(name): cleaned(item) for name, item in part.items()}
        return part

    return cleaned(value)


def _usage(raw: Any) -> tuple[int, int] | None:
    """The two counts; None when one is missing or cannot be one."""
    if not isinstance(raw, Mapping):
        return None
    prompt, completion = raw.get("prompt_tokens"), raw.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or min(prompt, completion) < 0:
        return None
    return prompt, completion


def _first_token(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    """The first token's alternatives: in the form of chats (``content``), or the older one of plain completions.

    The token that was written is one of them where the endpoint leaves it out of its list, but not when it is less
    likely than all in the list: no other token may be more likely than the last that is told.
    """
    if not logprobs:
        return None
    if logprobs.get("content"):
        first = logprobs["content"][0]
        found = [(item["token"], float(item["logprob"])) for item in first.get("top_logprobs") or []]
        chosen = (first["token"], float(first["logprob"]))
    elif logprobs.get("tokens"):
        found = [(token, float(value)) for token, value in ((logprobs.get("top_logprobs") or [{}])[0] or {}).items()]
        chosen = (logprobs["tokens"][0], float(logprobs["token_logprobs"][0]))
    else:
        return ()
    if any(math.isnan(value) for _, value in [*found, chosen]):
        raise ValueError("a log-probability is NaN")
    listed = chosen[0] in dict(found) or (found and chosen[1] < min(value for _, value in found))
    return tuple(found) if listed else (*found, chosen)
