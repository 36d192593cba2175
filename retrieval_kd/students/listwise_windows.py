"""Windows to train a listwise ranker on: which documents, in which order they are shown, and the answer to be learnt.

A window depends on the seed, the list and the visit alone, as every draw does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrieval_kd.errors import InputError, first
from retrieval_kd.students.groups import TrainingQuery, draw

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.run import Run
    from retrieval_kd.models.prompt_fitting import Fitted
    from retrieval_kd.models.window_prompts import WindowPrompts
    from retrieval_kd.students.sampling import Groups

log = logging.getLogger("retrieval_kd")

NOT_A_TARGET = -100
_LISTS_AT_ONCE = 256


class Window(NamedTuple):
    """Some documents of a list: ``rows`` and ``scores`` best first, ``shown[k]`` the one (of these) at place k."""

    query: TrainingQuery
    rows: np.ndarray
    scores: np.ndarray
    shown: np.ndarray

    @property
    def places(self) -> np.ndarray:
        """Where each document is shown, best first."""
        return np.argsort(self.shown)


def with_an_order(lists: Sequence[TrainingQuery]) -> tuple[list[TrainingQuery], dict[str, int]]:
    """The lists' scored documents, of lists in which the teacher prefers one to another; how many have no order.

    Raises `InputError` when no list is left.
    """
    kept, without = [], []
    for query in lists:
        known = int(np.isfinite(query.scores).sum())  # best first, so that unknown scores are last
        scores = query.scores[:known]
        if known > 1 and scores[0] > scores[-1]:
            kept.append(replace(query, rows=query.rows[:known], scores=scores, relevant=query.relevant[:known]))
        else:
            without.append(query.query_id)
    if not kept:
        raise InputError(f"no order to learn: none of {len(without)} queries has two documents with different scores")
    if without:
        log.warning("%d queries without two different scores are left out: %s", len(without), first(without))
    return kept, {"queries_without_order": len(without)} if without else {}


@dataclass
class WindowMaker:
    """Draws windows and makes what a model is trained on of them: a collator of rows ``{query, visit}``.

    Passages are shown in random order, or with ``order`` in that of a run (what the run lacks comes last).
    """

    prompts: WindowPrompts
    identifier_tokens: Sequence[int]
    collection: Collection
    lists: Sequence[TrainingQuery]
    groups: Groups
    max_length: int
    seed: int
    order: Run | None = None

    def window(self, query: int, visit: int) -> Window:
        """The documents of a visit."""
        of = self.lists[query]
        positions = np.sort(draw(of, self.groups, (self.seed, query, visit)))
        rows = of.rows[positions]
        if self.order is None:
            shown = np.random.default_rng((self.seed, query, visit, 1)).permutation(len(rows))
        else:
            ids = self.order.hits(of.query_id)[0]
            rank = {row: i for i, row in enumerate(self.collection.documents.rows(ids).tolist())}
            shown = np.array(sorted(range(len(rows)), key=lambda i: (rank.get(int(rows[i]), len(ids)), rows[i])))
        return Window(of, rows, of.scores[positions], shown)

    def fitted(self, windows: Sequence[Window]) -> Fitted:
        """Their prompts, and how many tokens each shown passage loses to its number of words and to ``max_length``."""
        model = self.prompts.model
        texts = [
            [model.ordinary(text) for text in self.collection.documents.texts(window.rows[window.shown])]
            for window in windows
        ]
        fitted = self.prompts.fitted(
            [model.ordinary(window.query.text) for window in windows],
            [[self.prompts.passage(text) for text in of_window] for of_window in texts],
            max_length=self.max_length,
            names=[f"query '{window.query.query_id}'" for window in windows],
        )
        by_words = [self.prompts.tokens_of_words_lost(of_window) for of_window in texts]
        return fitted._replace(tokens_lost=[a + b for a, b in zip(by_words, fitted.tokens_lost, strict=True)])

    def look_through(self) -> dict[str, int]:
        """What the lists' first windows lose by being cut.

        Raises `InputError` for queries whose prompt is too long even with empty passages.
        """
        windows = [self.window(query, 0) for query in range(len(self.lists))]
        parts = [windows[start : start + _LISTS_AT_ONCE] for start in range(0, len(windows), _LISTS_AT_ONCE)]
        lengths = [
            self.prompts.lengths_without_texts(
                [self.prompts.model.ordinary(window.query.text) for window in part],
                [len(window.rows) for window in part],
            )
            for part in parts
        ]
        excess = np.concatenate(lengths) - self.max_length
        if (excess > 0).any():
            ids = [window.query.query_id for window, over in zip(windows, excess, strict=True) if over > 0]
            raise InputError(
                f"{len(ids)} queries do not fit into max_length even with empty documents, by up to {excess.max()} "
                f"tokens: {first(ids)}; raise max_length, leave out these queries, or lower groups.documents"
            )
        lost = np.concatenate([of_window for part in parts for of_window in self.fitted(part).tokens_lost])
        if not (cut := int((lost > 0).sum())):
            return {}
        log.warning("%d of %d documents are cut in the first windows, by %d tokens", cut, len(lost), lost.sum())
        return {"truncated_documents": cut, "tokens_lost": int(lost.sum())}

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """The tensors of B windows, for L tokens at most, K of an answer and N documents.

        ``input_ids`` and ``attention_mask`` [B, L] hold prompt and answer, ``positions`` and ``targets`` [B, K] where
        each token of the answer is predicted and which it is (`NOT_A_TARGET` after its end). Best first:
        ``identifiers``, ``teacher`` and ``present`` [B, N]. ``query`` [B] is the list.
        """
        import torch

        windows = [self.window(row["query"], row["visit"]) for row in rows]
        names = self.prompts.prompt.identifiers_of(self.groups.documents)
        prompts = self.fitted(windows).tokens
        answers = [self.prompts.answer([names[place] for place in window.places]) for window in windows]
        texts = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
        shape = (len(rows), self.groups.documents)
        identifiers, present = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        teacher = np.full(shape, np.nan, dtype=np.float32)
        for i, window in enumerate(windows):
            n = len(window.rows)
            identifiers[i, :n] = np.array(self.identifier_tokens)[window.places]
            teacher[i, :n] = window.scores
            present[i, :n] = True
        positions = [range(len(prompt) - 1, len(text)) for prompt, text in zip(prompts, texts, strict=True)]
        arrays = {
            "input_ids": _padded(texts, self.prompts.model.end),
            "attention_mask": _padded([[1] * len(text) for text in texts], 0),
            "positions": _padded(positions, 0),
            "targets": _padded(answers, NOT_A_TARGET),
            "identifiers": identifiers,
            "teacher": teacher,
            "present": present,
            "query": np.array([row["query"] for row in rows]),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _padded(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """int64 [n, longest], filled up on the right."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for row, numbers in zip(padded, rows, strict=True):
        row[: len(numbers)] = numbers
    return padded
