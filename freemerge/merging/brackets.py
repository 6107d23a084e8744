"""Brackets: intervals that hold an order statistic, and exact counts of what lies in them.

float32 numbers that differ by a few per cent have few others between them: a bracket around a quantile in the bulk of
the values is narrow enough for one counter per number, however many values there are and however many of them are
equal. Few values, as in brackets at the ends of a distribution, are collected instead. Where neither fits, values are
counted coarsely, by the upper bits of the numbers, which leaves a bracket for a second pass that is narrow enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_COUNTERS = 1 << 21  # one counter per number up to this width: 16 MiB a bracket
_COLLECTED = 1 << 23  # values collected in a wide bracket, half of them expected: 16 to 32 MiB
_COARSE_BITS = 16  # else 2¹⁶ counters, and at most 2¹⁶ numbers behind each of them


class Bracket:
    """Counts values against an interval [low, high] to find the value of a rank, if it lies there.

    Args:
        low: lower end, float32; −inf for none.
        high: upper end, float32, not below `low`; +inf for none.
        rank: zero-based ascending rank among all the values that will be seen.
        expected: about how many values the interval will hold.
    """

    def __init__(self, low: float, high: float, rank: int, expected: float) -> None:
        self.low, self.high, self.rank = np.float32(low), np.float32(high), rank
        self._below = 0
        self._first = int(_key(self.low))
        width = int(_key(self.high)) - self._first + 1
        self._collected: np.ndarray | None = None
        self._size = 0
        self._shift = 0
        if expected < min(2 * width, _COLLECTED / 2):  # collecting takes less memory than counting
            # One buffer, of which the system gives what is used: small arrays kept from every batch would scatter over
            # the heap and hold it.
            self._collected = np.empty(_COLLECTED, dtype=np.float32)
            return
        if width > _COUNTERS:
            self._shift = max(width.bit_length() - _COARSE_BITS, 0)
        self._counts = torch.zeros(((width - 1) >> self._shift) + 1, dtype=torch.int64)

    def see(self, values: Tensor) -> None:
        """Count the values of one batch, (n,) float32 on the CPU."""
        array = values.numpy()
        if not len(array) or (self.low == -np.inf and self.high < np.inf and array.min() > self.high):
            return
        if self.low > -np.inf and self.high == np.inf and array.max() < self.low:
            self._below += len(array)  # at the ends of a distribution most batches hold nothing
            return
        if self.low > -np.inf or self.high < np.inf:
            self._below += int(np.count_nonzero(array < self.low))
            mask = array >= self.low
            mask &= array <= self.high
            array = array[np.flatnonzero(mask)]
        if self._collected is None:
            self._count(torch.from_numpy(_key(array)))
        else:
            self._size += len(array)
            if self._size <= _COLLECTED:  # beyond that `answer` gives up
                self._collected[self._size - len(array) : self._size] = array

    def _count(self, keys: Tensor) -> None:
        # In two steps, as the distance of two int32 keys may be none.
        bins = (keys.long() - self._first >> self._shift) if self._shift else keys - self._first
        if 8 * len(bins) < len(self._counts):  # a bincount would touch every counter for a few values
            self._counts.index_add_(0, bins, torch.ones(len(bins), dtype=torch.int64))
        else:
            self._counts += torch.bincount(bins, minlength=len(self._counts))

    def answer(self) -> float | Bracket | None:
        """The value of the rank; or a narrower bracket for another pass; None if it lies outside the bracket."""
        within = self.rank - self._below
        if within < 0:
            return None
        if self._collected is not None:
            if self._size > _COLLECTED or within >= self._size:
                return None
            return float(np.partition(self._collected[: self._size], within)[within])
        cumulative = self._counts.cumsum(0)
        if within >= cumulative[-1]:
            return None
        index = int(torch.searchsorted(cumulative, within, right=True))
        key = self._first + (index << self._shift)
        if self._shift == 0:
            return _float(key)
        last = min(key + (1 << self._shift) - 1, int(_key(self.high)))
        return Bracket(_float(key), _float(last), self.rank, expected=float(self._counts[index]))


def make_brackets(sample: Tensor, ranks: Sequence[int], total: int) -> list[list[Bracket]]:
    """For each row and rank a bracket around the sample's own quantile, wide enough to miss next to never.

    Args:
        sample: (K, m) float32; with m = 0 the brackets hold everything.
        ranks: R zero-based ranks.
        total: the number of values the sample stands for.
    """
    ordered = np.sort(sample.numpy(), axis=1)  # many times as fast as torch's
    size = ordered.shape[1]
    brackets = []
    for row in ordered:
        row_brackets = []
        for rank in ranks:
            share = (rank + 0.5) / total
            # Eight standard deviations of an independent sample: neighbours in a weight are alike, so it is not one.
            margin = 8 * (size * share * (1 - share)) ** 0.5 + 8
            first, last = int(share * size - margin), int(share * size + margin) + 1
            low = row[first] if first >= 0 and size else -np.inf
            high = row[last] if last < size else np.inf
            # Ends of which the sample has many equals (the zeros of frozen weights) are taken for the ends.
            if low == -np.inf and size and row[0] == high:
                low = row[0]
            if high == np.inf and size and row[-1] == low:
                high = row[-1]
            held = np.searchsorted(row, high, side="right") - np.searchsorted(row, low)
            row_brackets.append(Bracket(low, high, rank, expected=total * held / size if size else total))
        brackets.append(row_brackets)
    return brackets


def _key(values: np.ndarray | np.float32) -> np.ndarray:
    """float32 → int32 in the same order: the bits, with those of negative numbers reversed; −0 and +0 are one."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _float(key: int) -> float:
    """The inverse of `_key`, which is its own inverse on bits."""
    bits = np.array(key, dtype=np.int32)
    return float((bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).view(np.float32))
