"""Exact order statistics of a stream that does not fit in memory.

- Radix selection on the bit patterns of float32: one pass counts the upper 16 bits of every value, a second the lower
  16 bits of those values that share the upper half of an answer. Two passes, 65 536 counters per row and rank.
- Exact: the same value as a full sort gives, ties, zeros and denormals included.
- What fits into one batch is simply sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16
_BATCH = 1 << 20  # values of a row handled at a time: bounds the temporaries, and small tensors share the counting

Stream = Callable[[], Iterable[Tensor]]


def order_statistics(stream: Stream, ranks: Sequence[int]) -> Tensor:
    """Ascending order statistics of every row of a streamed matrix.

    Args:
        stream: a function that starts a new pass; each pass yields blocks (K, n) float32 without NaN, the same values
            every time.
        ranks: R zero-based ranks, the same for every row.

    Returns:
        (K, R) float32: for each row its values of these ranks in ascending order, on the CPU.

    Raises:
        ValueError: a rank that no value has.
    """
    upper: Tensor | None = None
    previous: Tensor | None = None
    for batch in _batches(stream()):
        if previous is not None:
            upper = _add_upper(upper, previous)
        previous = batch
    if previous is None:
        previous = torch.zeros(1, 0)
    if upper is None:
        _check_ranks(ranks, previous.shape[1])
        return previous.sort(dim=1).values[:, list(ranks)]
    upper = _add_upper(upper, previous)
    del previous
    _check_ranks(ranks, int(upper[0].sum()))

    # For each row and rank: the upper half of the answer, and the rank among the values which share it.
    wanted = torch.tensor(list(ranks), dtype=torch.int64).expand(len(upper), -1).contiguous()
    cumulative = upper.cumsum(1)
    high = torch.searchsorted(cumulative, wanted, right=True)
    within = wanted - (cumulative - upper).gather(1, high)
    lower = _count_lower(stream, high)
    low = torch.zeros_like(high)
    for row, (halves, row_ranks) in enumerate(zip(high.tolist(), within, strict=True)):
        for column, half in enumerate(halves):
            low[row, column] = torch.searchsorted(lower[row][half].cumsum(0), row_ranks[column], right=True)
    return _values((((high - _BINS // 2) << 16) | low).to(torch.int32))


def _check_ranks(ranks: Sequence[int], total: int) -> None:
    for rank in ranks:
        if not 0 <= rank < total:
            raise ValueError(f"there is no value of rank {rank} among {total}")


def _batches(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Blocks (K, n) cut and joined to batches of about `_BATCH` values a row, on the CPU."""
    waiting: list[Tensor] = []
    count = 0
    for block in blocks:
        for piece in block.cpu().split(_BATCH, dim=1):
            if piece.shape[1] == _BATCH:
                yield piece
                continue
            waiting.append(piece)
            count += piece.shape[1]
            if count >= _BATCH:
                yield torch.cat(waiting, dim=1)
                waiting, count = [], 0
    if waiting:
        yield torch.cat(waiting, dim=1)


def _add_upper(counts: Tensor | None, batch: Tensor) -> Tensor:
    """Count the upper halves of the keys: (K, 65536) int64."""
    if counts is None:
        counts = torch.zeros(len(batch), _BINS, dtype=torch.int64)
    for row, values in enumerate(batch):
        counts[row] += torch.bincount((_keys(values) >> 16) + _BINS // 2, minlength=_BINS)
    return counts


def _count_lower(stream: Stream, high: Tensor) -> list[dict[int, Tensor]]:
    """For each row: upper half of an answer → counts of the lower halves of the keys that share it."""
    counts = [{half: torch.zeros(_BINS, dtype=torch.int64) for half in row} for row in high.tolist()]
    for batch in _batches(stream()):
        for values, row_counts in zip(batch, counts, strict=True):
            keys = _keys(values)
            upper = (keys >> 16) + _BINS // 2
            for half, half_counts in row_counts.items():
                half_counts += torch.bincount(keys[upper == half] & (_BINS - 1), minlength=_BINS)
    return counts


def _keys(values: Tensor) -> Tensor:
    """int32 keys in the order of the float32 values: the bits themselves, with those of negative numbers reversed."""
    bits = values.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _values(keys: Tensor) -> Tensor:
    """The float32 values of `_keys`; the map is its own inverse."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)
