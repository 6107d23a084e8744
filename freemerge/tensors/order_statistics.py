"""Exact order statistics of a stream that does not fit in memory.

- With a sample: one pass. The sample brackets each answer; the pass counts what lies below the bracket, and counts or
  collects what lies in it. If the bracket missed (its counts show it), without.
- Without: two passes. One counts all values by the upper 16 bits of their float32 patterns, which leaves a bracket with
  at most 2¹⁶ numbers; the next counts these.
- What fits into one batch is partitioned in memory.
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

_PARTITIONED = 1 << 20  # values of a row that are partitioned in memory if they are all; with a sample fewer
_PARTITIONED_DESPITE_SAMPLE = 1 << 14
_BATCH = 1 << 17  # values of a row compared with the brackets at a time: they fit in the cache

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
    """Ascending order statistics of every row of a matrix that is only seen in blocks.

    Args:
        scan: makes a pass: calls what it is given with blocks (K, n) float32 without NaN, the same values in every
            pass, in any order, from several threads at once if it likes; their memory may be used again.
        ranks: R zero-based ranks, the same for every row.
        shape: (K, D), the number of rows, and of the values of each in all processes together.
        sample: (K, m) float32, some of the values of each row, the same in all processes. The better it represents
            them, the likelier one pass is enough; the result does not depend on it.
        gather: returns a value of this process and those of the others, if each scans a share of the matrix.

    Returns:
        (K, R) float32: for each row its values of these ranks in ascending order, on the CPU.

    Raises:
        ValueError: a rank that no value has.
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
    assert found is not None  # brackets that are made without a sample hold every value
    return found


def tensor_sample(values: Tensor) -> Tensor:
    """Some of the columns of a matrix in memory, (K, n) → (K, m), a view, as a sample for `order_statistics`."""
    stride = max(37, values.shape[1] >> 15 | 1)  # odd, so that it visits all columns of most weights
    return values[:, ::stride]


def _bracketed(
    scan: Scan, ranks: Sequence[int], shape: tuple[int, int], sample: Tensor, gather: Gather
) -> Tensor | None:
    """Passes until every bracket has its answer; None if one does not hold it."""
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
    """What all processes have counted, made from fresh brackets so that all of them have the same."""
    total = gathered[0]
    for other in gathered[1:]:
        for place, bracket in total.items():
            bracket.add(other[place])
    return total
