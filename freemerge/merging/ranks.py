"""Exact order statistics of a stream that does not fit in memory.

- With a sample: one pass. The sample brackets each answer; the pass counts what lies below the bracket, and counts or
  collects what lies in it. If the bracket missed (its counts show it), without.
- Without: two passes of radix selection on the bit patterns of float32. One counts the upper 16 bits of every value,
  the next the lower 16 bits of those that share the upper half of an answer.
- What fits into one batch is partitioned in memory.
- Exact: the same value as a full sort gives, ties, zeros and denormals included, whatever the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from freemerge.merging.brackets import Bracket, make_brackets

_BINS = 1 << 16
_BATCH = 1 << 20  # values of a row whose keys are counted at a time, or partitioned if they are all
_BRACKETED = 1 << 15  # values of a row compared with the brackets at a time: they fit in the cache
_SMALL = 1 << 14  # partitioned even if there is a sample

Stream = Callable[[], Iterable[Tensor]]


def order_statistics(stream: Stream, ranks: Sequence[int], total: int, sample: Tensor | None = None) -> Tensor:
    """Ascending order statistics of every row of a streamed matrix.

    Args:
        stream: a function that starts a new pass; each pass yields blocks (K, n) float32 without NaN, the same values
            every time.
        ranks: R zero-based ranks, the same for every row.
        total: the number of values of a row.
        sample: (K, m) float32, some of the values of each row. The better it represents them, the likelier one pass is
            enough; the result does not depend on it.

    Returns:
        (K, R) float32: for each row its values of these ranks in ascending order, on the CPU.

    Raises:
        ValueError: a rank that no value has.
    """
    for rank in ranks:
        if not 0 <= rank < total:
            raise ValueError(f"there is no value of rank {rank} among {total}")
    sampled = sample is not None and sample.shape[1] > 0
    if total <= (_SMALL if sampled else _BATCH):
        values = torch.cat([block.cpu() for block in stream()], dim=1).numpy()
        return torch.from_numpy(np.partition(values, sorted(set(ranks)), axis=1)[:, list(ranks)])
    if sampled:
        found = _bracketed(stream, make_brackets(sample.cpu(), ranks, total))
        if found is not None:
            return found
    return _radix(stream, ranks)


def _bracketed(stream: Stream, brackets: list[list[Bracket]]) -> Tensor | None:
    """One pass; None if a bracket does not hold its answer, or too much besides it."""
    for batch in _batches(stream(), _BRACKETED):
        for values, row in zip(batch, brackets, strict=True):
            for bracket in row:
                bracket.see(values)
    answers = [[bracket.answer() for bracket in row] for row in brackets]
    if any(answer is None for row in answers for answer in row):
        return None
    return torch.tensor(answers, dtype=torch.float32)


def _radix(stream: Stream, ranks: Sequence[int]) -> Tensor:
    """Two passes, whatever the values."""
    upper: Tensor | None = None
    for batch in _batches(stream(), _BATCH):
        if upper is None:
            upper = torch.zeros(len(batch), _BINS, dtype=torch.int64)
        for counts, values in zip(upper, batch, strict=True):
            counts += torch.bincount((float_keys(values) >> 16) + _BINS // 2, minlength=_BINS)

    # For each row and rank: the upper half of the answer, and the rank among the values which share it.
    wanted = torch.tensor(list(ranks), dtype=torch.int64).expand(len(upper), -1).contiguous()
    cumulative = upper.cumsum(1)
    high = torch.searchsorted(cumulative, wanted, right=True)
    within = wanted - (cumulative - upper).gather(1, high)

    lower = [{half: torch.zeros(_BINS, dtype=torch.int64) for half in row} for row in high.tolist()]
    for batch in _batches(stream(), _BATCH):
        for values, row in zip(batch, lower, strict=True):
            keys = float_keys(values)
            halves = (keys >> 16) + _BINS // 2
            for half, counts in row.items():
                counts += torch.bincount(keys[halves == half] & (_BINS - 1), minlength=_BINS)

    low = torch.zeros_like(high)
    for row, (halves, row_ranks) in enumerate(zip(high.tolist(), within, strict=True)):
        for column, half in enumerate(halves):
            low[row, column] = torch.searchsorted(lower[row][half].cumsum(0), row_ranks[column], right=True)
    return key_floats((((high - _BINS // 2) << 16) | low).to(torch.int32))


def _batches(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Blocks (K, n) cut and joined to batches of about `size` values a row, on the CPU."""
    waiting: list[Tensor] = []
    count = 0
    for block in blocks:
        for piece in block.cpu().split(size, dim=1):
            if 2 * piece.shape[1] >= size:  # large enough to be worth no copy
                yield piece
                continue
            waiting.append(piece)
            count += piece.shape[1]
            if count >= size:
                yield torch.cat(waiting, dim=1)
                waiting, count = [], 0
    if waiting:
        yield torch.cat(waiting, dim=1)


def float_keys(values: Tensor) -> Tensor:
    """int32 keys in the order of the float32 values: the bits themselves, with those of negative numbers reversed."""
    bits = values.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def key_floats(keys: Tensor) -> Tensor:
    """The float32 values of `float_keys`; the map is its own inverse."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)
