"""Statistics of a score file's pairs, taken shard by shard in memory that does not grow with the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_SMALL = 256
"""Up to here every whole number is a bfloat16 and a float16 number, so that being one says nothing."""
_MERGE_AT = 1 << 20
"""Rows of pairs that were cut which are kept before they are merged by document."""


class Moments:
    """Count, mean, population standard deviation, lowest and highest of values that come in parts."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.low = np.inf
        self.high = -np.inf
        self._squares = 0.0

    @property
    def std(self) -> float:
        """The population standard deviation; exactly 0 when all values are the same."""
        return 0.0 if self.low == self.high else float(np.sqrt(self._squares / self.count))

    def add(self, values: np.ndarray) -> None:
        """Takes in values [n]; sums are float64 and around the mean, so that a large offset costs no digits."""
        if not len(values):
            return
        part = np.asarray(values, dtype=np.float64)
        count = self.count + len(part)
        mean = float(part.mean())
        step = mean - self.mean
        self._squares += float(((part - mean) ** 2).sum()) + step * step * self.count * len(part) / count
        self.mean += step * len(part) / count
        self.count = count
        self.low = min(self.low, float(part.min()))
        self.high = max(self.high, float(part.max()))


class Quantiles:
    """Exact quantiles of float32 values that are read twice: `add` all of them, then `refine` with all of them.

    A radix selection. The bits of a float32 can be mapped to integers of the same order; the first reading counts
    their upper 16 bits, the second the lower 16 bits of the few bins in which the quantiles lie.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares
        self._counts = np.zeros(1 << 16, dtype=np.int64)
        self._fine: dict[int, np.ndarray] = {}

    def add(self, values: np.ndarray) -> None:
        """First reading."""
        bins, counts = np.unique(_ordered_bits(values) >> 16, return_counts=True)
        self._counts[bins] += counts

    def roughly(self, share: float) -> tuple[float, float]:
        """Between which two values (less than 1 % apart) a quantile lies, after the first reading."""
        found = self._bin(int(share * (self._counts.sum() - 1)))
        return _from_ordered_bits(found << 16), _from_ordered_bits((found << 16) | 0xFFFF)

    def refine(self, values: np.ndarray) -> None:
        """Second reading."""
        if not self._fine:
            ranks = [rank for share in self._shares for rank in self._ranks(share)[:2]]
            self._fine = {self._bin(rank): np.zeros(1 << 16, dtype=np.int64) for rank in ranks}
        bits = _ordered_bits(values)
        for upper, counts in self._fine.items():
            lower, found = np.unique(bits[bits >> 16 == upper] & 0xFFFF, return_counts=True)
            counts[lower] += found

    def values(self) -> list[float]:
        """The quantiles, between two values by linear interpolation (as `numpy.quantile`)."""
        found = []
        for share in self._shares:
            below, above, part = self._ranks(share)
            low, high = self._at(below), self._at(above)
            found.append(low + (high - low) * part)
        return found

    def _ranks(self, share: float) -> tuple[int, int, float]:
        position = share * (int(self._counts.sum()) - 1)
        return int(np.floor(position)), int(np.ceil(position)), position - np.floor(position)

    def _bin(self, rank: int) -> int:
        return int(np.searchsorted(np.cumsum(self._counts), rank, side="right"))

    def _at(self, rank: int) -> float:
        """The value of a 0-based rank."""
        upper = self._bin(rank)
        inside = rank - int(self._counts[:upper].sum())
        lower = int(np.searchsorted(np.cumsum(self._fine[upper]), inside, side="right"))
        return _from_ordered_bits((upper << 16) | lower)


class WithinQueries:
    """What the scores of one query have to do with one another: spread, ties, number of documents."""

    def __init__(self) -> None:
        self.tied_pairs = 0
        self.queries_with_ties = 0
        self.representable = {"bfloat16": True, "float16": True}
        """Whether every score is a number of that type, as when a model's low-precision output was kept."""
        self.small_integers = True
        """Whether every score is a whole number that all these types hold anyway."""
        self._lengths: list[np.ndarray] = []
        self._spreads: list[np.ndarray] = []

    def add(self, lengths: np.ndarray, scores: np.ndarray) -> None:
        """Takes in a shard: documents a query [q], none of them 0, and the scores [sum of lengths] float32."""
        starts = np.cumsum(lengths) - lengths
        self._lengths.append(lengths)
        self._spreads.append(np.maximum.reduceat(scores, starts) - np.minimum.reduceat(scores, starts))
        query = np.repeat(np.arange(len(lengths)), lengths)
        order = np.lexsort((scores, query))
        as_next = (np.diff(scores[order]) == 0) & (np.diff(query[order]) == 0)
        tied = np.zeros(len(scores), dtype=bool)
        tied[1:] |= as_next
        tied[:-1] |= as_next
        self.tied_pairs += int(tied.sum())
        self.queries_with_ties += len(np.unique(query[order][tied]))
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite and differs
            self.representable["float16"] &= bool((scores.astype(np.float16) == scores).all())
        self.small_integers &= bool(((scores == np.trunc(scores)) & (np.abs(scores) <= _SMALL)).all())
        self.representable["bfloat16"] &= not (scores.view(np.uint32) & 0xFFFF).any()

    @property
    def lengths(self) -> np.ndarray:
        """The number of documents of each query."""
        return np.concatenate(self._lengths)

    @property
    def spreads(self) -> np.ndarray:
        """Highest minus lowest score of each query, float32."""
        return np.concatenate(self._spreads)


class Truncation:
    """Pairs that the teacher did not read to their end, and their documents; memory grows with these documents."""

    def __init__(self) -> None:
        self.known_pairs = 0
        self.cut_pairs = 0
        self.tokens_lost = 0
        self._parts: list[pa.Table] = []
        self._waiting = 0

    def add(self, doc_ids: pa.Array, tokens_lost: np.ndarray) -> None:
        """Takes in a shard's pairs whose truncation is known."""
        import pyarrow as pa

        cut = tokens_lost > 0
        self.known_pairs += len(tokens_lost)
        self.cut_pairs += int(cut.sum())
        self.tokens_lost += int(tokens_lost.sum(dtype=np.int64))
        if not cut.any():
            return
        most = pa.array(tokens_lost[cut], pa.int32())
        part = {"doc_id": doc_ids.filter(pa.array(cut)), "most": most, "pairs": np.ones(len(most), dtype=np.int64)}
        self._parts.append(pa.table(part))
        self._waiting += len(most)
        if self._waiting > _MERGE_AT:
            self._parts, self._waiting = [self.documents()], 0

    def documents(self) -> pa.Table:
        """One row a document that was cut: ``doc_id``, ``most`` tokens that one pair lost, ``pairs``; worst first."""
        import pyarrow as pa

        if not self._parts:
            return pa.table({"doc_id": [], "most": [], "pairs": []})
        merged = pa.concat_tables(self._parts).group_by("doc_id").aggregate([("most", "max"), ("pairs", "sum")])
        merged = merged.select(["doc_id", "most_max", "pairs_sum"]).rename_columns(["doc_id", "most", "pairs"])
        return merged.sort_by([("most", "descending"), ("doc_id", "ascending")])

    def worst(self, n: int = 5) -> list[dict[str, Any]]:
        """The first ``n`` rows of `documents`."""
        rows: list[dict[str, Any]] = self.documents().slice(0, n).to_pylist()
        return rows


def _ordered_bits(values: np.ndarray) -> np.ndarray:
    """uint32 [n] in the order of the float32 values (−0 is 0)."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _from_ordered_bits(bits: int) -> float:
    original = bits ^ (1 << 31) if bits >> 31 else ~bits & 0xFFFFFFFF
    return float(np.array([original], dtype=np.uint32).view(np.float32)[0])
