"""Exact order statistics of a stream that does not fit in memory.

- With a sample: one pass. The sample brackets each answer; the pass counts the values below the bracket, and counts or
  collects those in it. If a bracket missed, which its counts show, passes without a sample follow.
- Without: two passes. One counts all values by the upper 16 bits of their float32 patterns, which leaves a bracket with
  at most 2¹⁶ numbers; the next pass counts these.
- Values that fit into one batch are partitioned in memory.
- Exact: the same value as a full sort gives, ties, zeros and denormals included, whatever the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from freemerge.tensors.brackets import Bracket, make_brackets
from freemerge.tensors.chunks import at_a_time

_PARTITIONED = 1 << 20  # rows of at most this many values are partitioned in memory; with a sample, fewer
_PARTITIONED_DESPITE_SAMPLE = 1 << 14
_BATCH = 1 << 17  # values of a row that are compared with the brackets at a time: they fit in the cache

_Value = TypeVar("_Value")
Gather = Callable[[_Value], "list[_Value]"]
Scan = Callable[[Callable[[Tensor], None]], None]


def order_statistics(
    scan: Scan,
    ranks: Sequence[int],
    shape: tuple[int, int],
    sample: Tensor | None = None,
    gather: Gather = lambda value: [value],
) -> Tensor:
    """Ascending order statistics of every row of a matrix that is read in blocks.

    Args:
        scan: makes a pass: calls its argument with blocks (K, n) float32 without NaN, the same values in every pass, in
            any order, possibly from several threads at once; the memory of a block may be reused after the call.
        ranks: R zero-based ranks, the same for every row.
        shape: (K, D), the number of rows, and the number of values of each row in all processes together.
        sample: (K, m) float32, some of the values of each row, the same in all processes. The better it represents
            them, the likelier one pass is enough; the result does not depend on it.
        gather: returns the given value of this process and those of all others, where each process scans a part of the
            matrix.

    Returns:
        (K, R) float32: each row's values at these ranks in ascending order, on the CPU.

    Raises:
        ValueError: a rank is out of range.
    """
    rows, total = shape
    for rank in ranks:
        if not 0 <= rank < total:
            raise ValueError(f"there is no value of rank {rank} among {total}")
    if sample is not None and sample.shape[1] == 0:
        sample = None
    if total <= (_PARTITIONED if sample is None else _PARTITIONED_DESPITE_SAMPLE):
        blocks: list[np.ndarray] = [np.empty((rows, 0), dtype=np.float32)]
        scan(lambda block: blocks.append(block.cpu().numpy().copy()))
        values = np.concatenate(gather(np.concatenate(blocks, axis=1)), axis=1)
        return torch.from_numpy(np.partition(values, sorted(set(ranks)), axis=1)[:, list(ranks)])
    found = None if sample is None else _bracketed(scan, ranks, shape, sample.cpu(), gather)
    if found is None:
        found = _bracketed(scan, ranks, shape, torch.empty(rows, 0), gather)
    assert found is not None  # brackets made without a sample contain every value
    return found


def tensor_sample(values: Tensor) -> Tensor:
    """Select columns of a matrix in memory, (K, n) → (K, m), a view, as a sample for `order_statistics`."""
    stride = max(37, values.shape[1] >> 15 | 1)  # an odd step visits all columns of most weights
    return values[:, ::stride]


def _bracketed(
    scan: Scan, ranks: Sequence[int], shape: tuple[int, int], sample: Tensor, gather: Gather
) -> Tensor | None:
    """Make passes until every bracket has its answer; None if a bracket missed."""
    answers = torch.empty(shape[0], len(ranks))
    made = make_brackets(sample, ranks, shape[1])
    brackets = {(i, j): bracket for i, row in enumerate(made) for j, bracket in enumerate(row)}

    def see(block: Tensor) -> None:
        for batch in block.split(at_a_time(_BATCH, block.device), dim=1):
            for (row, _), bracket in brackets.items():
                bracket.see(batch[row])

    while brackets:
        scan(see)
        brackets = _sum(gather(brackets))
        found = {place: bracket.answer() for place, bracket in brackets.items()}
        brackets = {}
        for place, answer in found.items():
            if answer is None:
                return None
            if isinstance(answer, Bracket):
                brackets[place] = answer
            else:
                answers[place] = answer
    return answers


def _sum(gathered: list[dict[tuple[int, int], Bracket]]) -> dict[tuple[int, int], Bracket]:
    """Add up the counts of all processes in fresh brackets, so that all processes have the same ones."""
    total = gathered[0]
    for other in gathered[1:]:
        for place, bracket in total.items():
            bracket.add(other[place])
    return total
