from __future__ import annotations

import pytest

from retrieval_kd.models.batching import token_batches


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([3, 5, 4, 5], 10, [[1, 3], [2, 0]]),  # 5 + 5, then 4 + 3 padded to 4
        ([2, 2, 2, 2, 2], 4, [[0, 1], [2, 3], [4]]),  # equal lengths keep their order
        ([9, 1, 1], 4, [[0], [1, 2]]),  # a text over the budget is alone
        ([0, 0], 1, [[0], [1]]),  # an empty text counts as one token
        ([7], 1, [[0]]),
        ([], 8, []),
    ],
)
def test_batches(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert [batch.tolist() for batch in token_batches(lengths, budget)] == expected


def test_every_text_is_in_one_batch_within_the_budget() -> None:
    lengths = [(7 * i) % 31 + 1 for i in range(100)]
    batches = [batch.tolist() for batch in token_batches(lengths, 64)]
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
