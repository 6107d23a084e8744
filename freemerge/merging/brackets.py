"""Brackets: an interval that, as a sample says, holds an order statistic, and exact counts of what lies in it.

float32 numbers that differ by a few per cent have few others between them: a bracket around a quantile in the bulk of
the values is narrow enough for one counter per number, however many values there are and however many of them are
equal. Brackets at the ends of a distribution are wide and hold few values, which are collected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

_COUNTERS = 1 << 20  # counted up to this width: 8 MiB a bracket
_COLLECTED = 1 << 24  # else collected up to this many values: 64 MiB a bracket


class Bracket:
    """Counts values against an interval [low, high] and finds the value of a rank, if it lies there.

    Args:
        low: lower end, float32; −inf for none.
        high: upper end, float32, not below `low`; +inf for none.
        rank: zero-based ascending rank among all the values that will be seen.
    """

    def __init__(self, low: float, high: float, rank: int) -> None:
        self.low, self.high, self.rank = np.float32(low), np.float32(high), rank
        self._below = 0
        self._first = _key(self.low)
        width = int(_key(self.high)) - int(self._first) + 1
        self._counts = np.zeros(width, dtype=np.int64) if width <= _COUNTERS else None
        self._collected: list[np.ndarray] = []
        self._size = 0

    def see(self, values: Tensor) -> None:
        """Count the values of one batch, (n,) float32 on the CPU."""
        array = values.numpy()
        if not len(array) or (self.low == -np.inf and array.min() > self.high):
            return
        if self.high == np.inf and array.max() < self.low:  # at the ends of a distribution most batches hold nothing
            self._below += len(array)
            return
        self._below += int(np.count_nonzero(array < self.low))
        if self._counts is None and self._size > _COLLECTED:
            return  # too many: `answer` will say so
        mask = array >= self.low
        mask &= array <= self.high
        inside = array[np.flatnonzero(mask)]
        if self._counts is not None:
            keys = _key(inside) - self._first
            if 8 * len(keys) < len(self._counts):  # a bincount would touch every counter for a few values
                np.add.at(self._counts, keys, 1)
            else:
                self._counts += np.bincount(keys, minlength=len(self._counts))
        else:
            self._collected.append(inside)
            self._size += len(inside)

    def answer(self) -> float | None:
        """The value of the rank; None if it lies outside the bracket, or the bracket holds too many values."""
        within = self.rank - self._below
        if within < 0:
            return None
        if self._counts is not None:
            cumulative = self._counts.cumsum()
            if within >= cumulative[-1]:
                return None
            key = int(self._first) + int(np.searchsorted(cumulative, within, side="right"))
            return float(_float(np.array(key, dtype=np.int32)))
        if self._size > _COLLECTED or within >= self._size:
            return None
        return float(np.partition(np.concatenate(self._collected), within)[within])


def make_brackets(sample: Tensor, ranks: Sequence[int], total: int) -> list[list[Bracket]]:
    """For each row and rank a bracket around the sample's own quantile, wide enough to miss next to never.

    Args:
        sample: (K, m) float32 with m ≥ 1.
        ranks: R zero-based ranks.
        total: the number of values the sample stands for.
    """
    ordered = sample.sort(dim=1).values.numpy()
    size = ordered.shape[1]
    brackets = []
    for row in ordered:
        row_brackets = []
        for rank in ranks:
            share = (rank + 0.5) / total
            # Sixteen standard deviations of an independent sample: neighbours in a weight are alike, so it is not one.
            margin = 16 * (size * share * (1 - share)) ** 0.5 + 8
            first, last = int(share * size - margin), int(share * size + margin) + 1
            low = row[first] if first >= 0 else -np.inf
            high = row[last] if last < size else np.inf
            row_brackets.append(Bracket(low, high, rank))
        brackets.append(row_brackets)
    return brackets


def _key(values: np.ndarray) -> np.ndarray:
    """float32 → int32 in the same order, see `ranks.float_keys`; −0 and +0 share a key, as they are equal."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _float(key: np.ndarray) -> np.ndarray:
    """The inverse of `_key`."""
    return (key ^ ((key >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
