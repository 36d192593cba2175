"""Making prompts fit: their documents are cut, the rest of a prompt never is, and what can never fit is said early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from retrieval_kd.errors import InputError, first
from retrieval_kd.models.language_model import LanguageModel, PromptText
from retrieval_kd.teachers.base import Candidates, ScoringJob

_QUERIES_AT_ONCE = 256


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


def refuse_long_queries(job: ScoringJob, excess: Callable[[Sequence[Candidates]], Sequence[int]]) -> None:
    """Raises `InputError` when queries of ``job`` cannot be asked about, however much is cut off their documents.

    ``excess`` gives for each query by how many tokens its prompt with empty documents is too long; 0 or less fits.
    A run is looked through once: its resumes and its other workers find that in ``job.work``, and need no model for it.
    """
    looked_through = job.work / "queries-fit"
    if looked_through.exists():
        return
    too_long: list[str] = []
    most = 0
    for start in range(0, len(job.candidates), _QUERIES_AT_ONCE):
        queries = job.candidates[start : start + _QUERIES_AT_ONCE]
        for query, over in zip(queries, excess(queries), strict=True):
            if over > 0:
                too_long.append(query.query_id)
                most = max(most, over)
    if too_long:
        raise InputError(
            f"{len(too_long)} queries do not fit into max_length even with empty documents, by up to {most} tokens: "
            f"{first(too_long)}; raise max_length, shorten or leave out these queries, or show fewer documents at once"
        )
    looked_through.touch()


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
