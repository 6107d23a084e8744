"""Brackets: intervals that contain an order statistic, with exact counts of the values in them.

Few float32 numbers lie between two that differ by a few per cent: a bracket around a quantile in the bulk of the values
is narrow enough for one counter per number, however many values there are and however many of them are equal. Where few
values are expected, as in the tails of a distribution, they are collected instead. Where neither is possible, values
are counted coarsely, by the upper bits of the numbers; this gives a bracket that is narrow enough for a second pass.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Keys = TypeVar("_Keys", np.ndarray, Tensor)

_COUNTERS = 1 << 21  # one counter per number up to this width: 8 MiB a bracket, 16 for 2³¹ values and more
_COLLECTED = 1 << 23  # values collected in a wide bracket, half of them expected: 16 to 32 MiB
_COARSE_BITS = 16  # otherwise 2¹⁶ counters of at most 2¹⁶ numbers each
_SORTED_BITS = 12  # 2¹² counters tell which of the collected values have to be sorted
_BLOCK = 1 << 17  # collected values that are counted at a time


class Bracket:
    """Counts values against an interval [low, high] to find the value of a rank, if that lies in the interval.

    `see` may be called from several threads at once.

    Args:
        low: lower end, float32; −inf for none.
        high: upper end, float32, not below `low`; +inf for none.
        rank: zero-based ascending rank among all the values that will be seen.
        expected: estimated number of values in the interval.
        total: upper bound on the number of values that will be seen.
    """

    def __init__(self, low: float, high: float, rank: int, expected: float, total: int) -> None:
        self.low, self.high, self.rank = np.float32(low), np.float32(high), rank
        self._total = total
        self._below = 0
        self._first = int(_key(self.low))
        self._lock = threading.Lock()
        width = int(_key(self.high)) - self._first + 1
        self._collected: np.ndarray | None = None
        self._size = 0
        self._shift = 0
        if expected < min(2 * width, _COLLECTED / 2):  # collecting takes less memory than counting
            self._collected = _buffer()
            return
        if width > _COUNTERS:
            self._shift = max(width.bit_length() - _COARSE_BITS, 0)
        dtype = np.int32 if total < 1 << 31 else np.int64
        self._counts: np.ndarray = np.zeros(((width - 1) >> self._shift) + 1, dtype=dtype)

    def see(self, values: Tensor) -> None:
        """Count the values of one batch, (n,) float32."""
        if values.device.type != "cpu" and self._collected is None:
            self._see_on_device(values)
            return
        within, below = _within(values, self.low, self.high)
        if self._collected is None and len(within):
            within = self._bins(_key(within).astype(np.int64))
            bins, counts = np.unique(within, return_counts=True) if 8 * len(within) < len(self._counts) else (within, 1)
        with self._lock:
            self._below += below
            if self._collected is not None:
                self._collect(self._collected, within)
            elif len(within):
                self._count(bins, counts)

    def _see_on_device(self, values: Tensor) -> None:
        """Count the values on their device, copying only the counts."""
        within, below = _within_on_device(values, self.low, self.high)
        bits = (within + 0.0).view(torch.int32)
        bins = self._bins((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long())
        counts = torch.bincount(bins, minlength=len(self._counts)).cpu().numpy()
        with self._lock:
            self._below += below
            self._counts += counts

    def _bins(self, keys: _Keys) -> _Keys:
        """The counter index of each key, in place: int64, because the difference of two keys may not fit into int32."""
        keys -= self._first
        keys >>= self._shift
        return keys

    def add(self, other: Bracket) -> None:
        """Add the counts of the same bracket from another process."""
        self._below += other._below
        if self._collected is not None and other._collected is not None:
            self._collect(self._collected, other._collected[: min(other._size, _COLLECTED)])
            self._size += max(0, other._size - _COLLECTED)
        else:
            self._counts += other._counts

    def __getstate__(self) -> dict[str, object]:
        """The state to pickle: without the lock, and with only the used part of the buffer."""
        state = {**self.__dict__, "_lock": None}
        if self._collected is not None:
            state["_collected"] = self._collected[: min(self._size, _COLLECTED)].copy()
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        if self._collected is not None:
            held, self._collected = self._collected, _buffer()
            self._collected[: len(held)] = held

    def _collect(self, collected: np.ndarray, values: np.ndarray) -> None:
        self._size += len(values)
        if self._size <= _COLLECTED:  # beyond that size `answer` gives up
            collected[self._size - len(values) : self._size] = values

    def _count(self, bins: np.ndarray, counts: np.ndarray | int) -> None:
        if isinstance(counts, int):  # many values: counting all at once is cheaper than sorting first
            self._counts += np.bincount(bins, minlength=len(self._counts))
        else:
            self._counts[bins] += counts

    def answer(self) -> float | Bracket | None:
        """The value of the rank, or a narrower bracket for another pass; None if the value lies outside the bracket."""
        within = self.rank - self._below
        if within < 0:
            return None
        if self._collected is not None:
            if self._size > _COLLECTED or within >= self._size:
                return None
            return _of_rank(self._collected[: self._size], within)
        cumulative = self._counts.cumsum(dtype=np.int64)
        if within >= cumulative[-1]:
            return None
        index = int(np.searchsorted(cumulative, within, side="right"))
        key = self._first + (index << self._shift)
        if self._shift == 0:
            return _float(key)
        last = min(key + (1 << self._shift) - 1, int(_key(self.high)))
        return Bracket(_float(key), _float(last), self.rank, float(self._counts[index]), self._total)


def _of_rank(values: np.ndarray, rank: int) -> float:
    """The value of a zero-based ascending rank among (n,) float32 values.

    NumPy's partition takes thirty times as long where many values are equal, as in differences of bfloat16 weights. So
    values are counted coarsely first, and only those near the rank are sorted.
    """
    first, last = int(_key(values.min())), int(_key(values.max()))
    shift = max((last - first).bit_length() - _SORTED_BITS, 0)
    counts = np.zeros(((last - first) >> shift) + 1, dtype=np.int64)
    for start in range(0, len(values), _BLOCK):
        # the difference of two keys may not fit into int32
        keys = _key(values[start : start + _BLOCK]).astype(np.int64)
        counts += np.bincount((keys - first) >> shift, minlength=len(counts))
    cumulative = counts.cumsum()
    index = int(np.searchsorted(cumulative, rank, side="right"))
    low = first + (index << shift)
    high = min(low + (1 << shift) - 1, last)
    held = values[(values >= _float(low)) & (values <= _float(high))]
    return float(np.sort(held)[rank - int(cumulative[index]) + len(held)])


def _buffer() -> np.ndarray:
    """A buffer for collected values; the system allocates its pages as they are used.

    Small arrays kept from every batch would fragment the heap, and NumPy's own allocation would use huge pages.
    """
    return torch.empty(_COLLECTED, dtype=torch.float32).numpy()


def _within(values: Tensor, low: np.float32, high: np.float32) -> tuple[np.ndarray, int]:
    """The values in [low, high], and the number of values below."""
    if values.device.type != "cpu":  # only few values are copied
        within, below = _within_on_device(values, low, high)
        return within.cpu().numpy(), below
    array = values.numpy()
    mask = None
    below = 0
    if low > -np.inf:
        mask = array >= low
        below = len(array) - int(np.count_nonzero(mask))
        if below == len(array):
            return array[:0], below  # in the tails of a distribution most batches have no values
    if high < np.inf:
        mask = array <= high if mask is None else np.logical_and(mask, array <= high, out=mask)
    return (array if mask is None else array[np.flatnonzero(mask)]), below


def _within_on_device(values: Tensor, low: np.float32, high: np.float32) -> tuple[Tensor, int]:
    """The same on the device of the values."""
    least, greatest = float(low), float(high)
    return values[(values >= least) & (values <= greatest)], int((values < least).sum())


def make_brackets(sample: Tensor, ranks: Sequence[int], total: int) -> list[list[Bracket]]:
    """For each row and rank, a bracket around the sample's quantile, wide enough that it almost never misses.

    Args:
        sample: (K, m) float32; with m = 0 the brackets contain all values.
        ranks: R zero-based ranks.
        total: the number of values that the sample represents.
    """
    ordered = np.sort(sample.numpy(), axis=1)  # many times as fast as torch's sort
    size = ordered.shape[1]
    brackets = []
    for row in ordered:
        row_brackets = []
        for rank in ranks:
            share = (rank + 0.5) / total
            # Six standard deviations of an independent sample, because neighbouring weights are correlated.
            margin = 6 * (size * share * (1 - share)) ** 0.5 + 8
            first, last = int(share * size - margin), int(share * size + margin) + 1
            low = row[first] if first >= 0 and size else -np.inf
            high = row[last] if last < size else np.inf
            # An end that the sample holds many times (the zeros of frozen weights) is taken as exact.
            if low == -np.inf and size and row[0] == high:
                low = row[0]
            if high == np.inf and size and row[-1] == low:
                high = row[-1]
            held = np.searchsorted(row, high, side="right") - np.searchsorted(row, low)
            row_brackets.append(Bracket(low, high, rank, total * held / size if size else total, total))
        brackets.append(row_brackets)
    return brackets


def _key(values: np.ndarray | np.float32) -> np.ndarray:
    """float32 → int32 in the same order: the bits, with those of negative numbers reversed; −0 and +0 are one."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


def _float(key: int) -> float:
    """The inverse of `_key`, which is its own inverse on bits."""
    bits = np.array(key, dtype=np.int32)
    return float((bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32))
