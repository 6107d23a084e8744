"""Exact order statistics of a stream that does not fit in memory.

- Radix selection on the bit patterns of float32: one pass counts the upper 16 bits of every value, a second the lower
  16 bits of those values that share the upper half of an answer. Two passes, 65 536 counters per row and rank.
- Exact: the same value as a full sort gives, ties, zeros and denormals included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16
_CHUNK = 1 << 20  # values counted at a time: bounds the temporaries


def order_statistics(stream: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> Tensor:
    """Ascending order statistics of every row of a streamed matrix.

    Args:
        stream: a function that starts a new pass; each pass yields blocks (K, n) float32 without NaN, the same values
            in the same blocks every time.
        ranks: R zero-based ranks, the same for every row.

    Returns:
        (K, R) float32: for each row its values of these ranks in ascending order.

    Raises:
        ValueError: a rank that no value has.
    """
    upper = _count_upper(stream)
    rows = len(upper)
    total = int(upper[0].sum()) if rows else 0
    if any(not 0 <= rank < total for rank in ranks):
        raise ValueError(f"the ranks {list(ranks)} do not all lie within 0 and {total - 1}")

    # For each row and rank: the upper half of the answer, and the rank among the values which share it.
    cumulative = upper.cumsum(1)
    wanted = torch.tensor(list(ranks), dtype=torch.int64).expand(rows, -1).contiguous()
    high = torch.searchsorted(cumulative, wanted, right=True)
    within = wanted - (cumulative.gather(1, high) - upper.gather(1, high))

    halves = [sorted(set(high[row].tolist())) for row in range(rows)]
    counters = [torch.zeros(len(half), _BINS, dtype=torch.int64) for half in halves]
    for block in stream():
        for row, values in enumerate(block):
            for chunk in values.split(_CHUNK):
                keys = _keys(chunk)
                top = keys >> 16
                for index, half in enumerate(halves[row]):
                    low = keys[top == half - _BINS // 2] & (_BINS - 1)
                    counters[row][index] += torch.bincount(low, minlength=_BINS)

    result = torch.empty(rows, len(ranks), dtype=torch.int32)
    for row in range(rows):
        for column in range(len(ranks)):
            half = int(high[row, column])
            counts = counters[row][halves[row].index(half)].cumsum(0)
            low = int(torch.searchsorted(counts, within[row, column], right=True))
            result[row, column] = ((half - _BINS // 2) << 16) | low
    return _values(result)


def _count_upper(stream: Callable[[], Iterable[Tensor]]) -> Tensor:
    counts: Tensor | None = None
    for block in stream():
        if counts is None:
            counts = torch.zeros(len(block), _BINS, dtype=torch.int64)
        for row, values in enumerate(block):
            for chunk in values.split(_CHUNK):
                counts[row] += torch.bincount((_keys(chunk) >> 16) + _BINS // 2, minlength=_BINS)
    return torch.zeros(0, _BINS, dtype=torch.int64) if counts is None else counts


def _keys(values: Tensor) -> Tensor:
    """int32 keys in the order of the float32 values: the bits themselves, with those of negative numbers reversed."""
    bits = values.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _values(keys: Tensor) -> Tensor:
    """The float32 values of `_keys`; the map is its own inverse."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)
