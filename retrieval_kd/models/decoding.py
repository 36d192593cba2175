"""What is read off a language model's head: some positions alone, exact logits, how an answer may go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

NOT_FINITE = "the language model gave NaN or infinite logits; try precision: float32 or another checkpoint"


class Constraint(Protocol):
    """Which tokens one answer may go on with; it follows the answer token by token."""

    @property
    def tokens(self) -> Sequence[int]:
        """Every token that may ever be allowed."""

    def allowed(self) -> Sequence[int]:
        """The tokens that may come next; none when the answer is complete."""

    def advance(self, token: int) -> None:
        """Takes note of the token that came. Called with any token after the answer is complete."""


class Rule:
    """A logits processor: refuses NaN and leaves each row the tokens that its constraint allows."""

    def __init__(self, constraints: Sequence[Constraint] | None, end: int) -> None:
        """``end`` is the token of a row whose constraint is complete."""
        self.constraints = constraints
        self.end = end
        self.begun = False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores [n, vocabulary], minus infinity where a token is not allowed."""
        import torch

        if not (scores < torch.inf).all():  # minus infinity is what some models give to tokens nobody uses
            raise FloatingPointError(NOT_FINITE)
        if self.constraints is None:
            return scores
        if self.begun:
            for constraint, token in zip(self.constraints, input_ids[:, -1].tolist(), strict=True):
                constraint.advance(token)
        self.begun = True
        allowed = torch.full_like(scores, -torch.inf)
        for row, constraint in enumerate(self.constraints):
            tokens = list(constraint.allowed()) or [self.end]
            allowed[row, tokens] = scores[row, tokens]
        return allowed


@contextmanager
def reading_at(network: Any, positions: Any) -> Iterator[None]:
    """Inside, the head is given these ``positions`` [n, k] of each row, so that logits are [n, k, vocabulary]."""
    import torch

    def select(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        return (hidden[torch.arange(len(hidden), device=hidden.device)[:, None], positions],)

    handle = network.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_float32(network: Any, token_ids: Iterable[int]) -> Iterator[None]:
    """Inside, the logits of these tokens are float32 products: bfloat16 has steps of 1/8 near 20."""
    import torch

    head = network.get_output_embeddings()
    rows = torch.tensor(sorted(set(token_ids)), dtype=torch.long, device=network.device)

    def multiply(_: Any, arguments: tuple[Any, ...], logits: Any) -> Any:
        bias = None if head.bias is None else head.bias[rows].float()
        exact = torch.nn.functional.linear(arguments[0].float(), head.weight[rows].float(), bias)
        return logits.float().index_copy(-1, rows, exact)

    if network.dtype == torch.float32 or not len(rows):
        yield
        return
    handle = head.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()
