"""Exact order statistics of a stream that does not fit in memory.

- With a sample: one pass. The sample brackets each answer; the pass counts what lies below the bracket, and counts or
  collects what lies in it. If the bracket missed (its counts show it), without.
- Without: two passes. One counts all values by the upper 16 bits of their float32 patterns, which leaves a bracket with
  at most 2¹⁶ numbers; the next counts these.
- What fits into one batch is partitioned in memory.
- Exact: the same value as a full sort gives, ties, zeros and denormals included, whatever the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from freemerge.merging.brackets import Bracket, make_brackets

_PARTITIONED = 1 << 20  # values of a row that are partitioned in memory if they are all; with a sample fewer
_PARTITIONED_DESPITE_SAMPLE = 1 << 14
_BATCH = 1 << 15  # values of a row compared with the brackets at a time: they fit in the cache

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
    if total <= (_PARTITIONED_DESPITE_SAMPLE if sampled else _PARTITIONED):
        values = torch.cat([block.cpu() for block in stream()], dim=1).numpy()
        return torch.from_numpy(np.partition(values, sorted(set(ranks)), axis=1)[:, list(ranks)])
    found = _bracketed(stream, ranks, total, sample.cpu()) if sampled else None
    return _bracketed(stream, ranks, total, None) if found is None else found


def tensor_order_statistics(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """Ascending order statistics of every row of a matrix in memory, faster than by sorting it.

    Args:
        values: (K, n) float32 without NaN, n ≥ 1.
        ranks: R zero-based ranks, the same for every row.

    Returns:
        (K, R) float32, on the device of the values.
    """
    total = values.shape[1]
    stride = max(37, total >> 15 | 1)  # odd, so that it visits all columns of most weights
    return order_statistics(lambda: [values], ranks, total, values[:, ::stride]).to(values.device)


def _bracketed(stream: Stream, ranks: Sequence[int], total: int, sample: Tensor | None) -> Tensor | None:
    """Passes until every bracket has its answer; None if one does not hold it."""
    answers: dict[tuple[int, int], float] = {}
    brackets: dict[tuple[int, int], Bracket] | None = None
    while brackets is None or brackets:
        for batch in _batches(stream(), _BATCH):
            if brackets is None:
                nothing = torch.empty(len(batch), 0)
                rows = make_brackets(nothing if sample is None else sample, ranks, total)
                brackets = {(i, j): bracket for i, row in enumerate(rows) for j, bracket in enumerate(row)}
            for (row, _), bracket in brackets.items():
                bracket.see(batch[row])
        found = {place: bracket.answer() for place, bracket in brackets.items()}
        if any(answer is None for answer in found.values()):
            return None
        brackets = {place: answer for place, answer in found.items() if isinstance(answer, Bracket)}
        answers |= {place: answer for place, answer in found.items() if not isinstance(answer, Bracket)}
    rows = 1 + max(row for row, _ in answers)
    return torch.tensor([[answers[row, column] for column in range(len(ranks))] for row in range(rows)])


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
