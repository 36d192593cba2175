"""Making prompts fit: their documents are cut, the rest of a prompt never is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from retrieval_kd.errors import InputError
from retrieval_kd.models.language_model import LanguageModel, PromptText


class Fitted(NamedTuple):
    """Prompts that fit."""

    tokens: list[list[int]]
    """The token ids of each prompt."""
    tokens_lost: list[np.ndarray]
    """int32: for each prompt, how many tokens each of its documents lost."""


def fit_prompts(
    model: LanguageModel,
    render: Callable[[int, Sequence[str]], PromptText],
    documents: Sequence[Sequence[str]],
    *,
    max_length: int,
    answer_start: str = "",
    names: Sequence[str],
) -> Fitted:
    """Each prompt ``render(i, documents[i])`` in at most ``max_length`` tokens, its documents cut where needed.

    All documents of a prompt are cut to the same number of tokens; shorter ones stay whole. Raises `InputError` with
    ``names[i]`` (the query) when a prompt is too long even without its documents.
    """
    tokens = model.tokenize([render(i, texts) for i, texts in enumerate(documents)], answer_start)
    lost = [np.zeros(len(texts), dtype=np.int32) for texts in documents]
    too_long = [i for i, ids in enumerate(tokens) if len(ids) > max_length]
    ends = {i: model.token_ends(documents[i]) for i in too_long}
    while too_long:
        for i in too_long:
            over = len(tokens[i]) - max_length
            before = np.array([len(of_text) for of_text in ends[i]])
            if not before.any():
                raise InputError(
                    f"{names[i]}: the prompt without its documents is {len(tokens[i])} tokens, {over} more than "
                    f"fit into max_length; raise max_length, shorten the query, or show fewer documents at once"
                )
            limit = equal_limit(before, int(before.sum()) - over)
            ends[i] = [of_text[:limit] for of_text in ends[i]]
            lost[i] += np.maximum(before - limit, 0).astype(np.int32)
        cut = [
            render(
                i,
                [
                    text[: of_text[-1] if len(of_text) else 0]
                    for text, of_text in zip(documents[i], ends[i], strict=True)
                ],
            )
            for i in too_long
        ]
        for i, ids in zip(too_long, model.tokenize(cut, answer_start), strict=True):
            tokens[i] = ids
        too_long = [i for i in too_long if len(tokens[i]) > max_length]
    return Fitted(tokens, lost)


def equal_limit(lengths: np.ndarray, total: int) -> int:
    """The largest limit for which ``lengths`` cut to it add up to at most ``total``; 0 when there is none."""
    low, high = 0, int(lengths.max())
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(lengths, middle).sum()) <= total:
            low = middle
        else:
            high = middle - 1
    return low
