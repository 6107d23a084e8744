"""LoRA and DoRA: a matrix is changed by the product of two small matrices.

Factors are never merged with each other: the product of sums is not the sum of products.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.adapters.changes import BaseReader, Change, Run
from freemerge.checkpoints.memory import flat_range

_BLOCK = 1 << 20  # values of the base that are read at a time to compute the norms of DoRA


@dataclass(frozen=True)
class LowRank(Change):
    """LoRA: ΔW = s · B·A (Hu et al., ICLR 2022, arXiv 2106.09685).

    Args:
        weights: the adapter's file.
        left: the name of B in the file, (m, r) or (m, r, 1, …).
        right: the name of A in the file, (r, n) or (r, n, …).
        scale: s.
        recent: cache of the factors that were read last, for the next chunk of their tensor.
        transposed: whether the base stores the transpose, (n, m).
        fixed: whether `transposed` is known independently of the base's shape.
    """

    weights: Checkpoint
    left: str
    right: str
    scale: float
    recent: dict[str, Tensor] = field(repr=False)
    transposed: bool = False
    fixed: bool = False

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        return self._shape(self.transposed)

    def orientations(self, base: tuple[int, ...]) -> tuple[bool, ...]:
        if self.fixed or len(self._shape(False)) != 2:
            return (self.transposed,)
        return tuple(transposed for transposed in (False, True) if self._shape(transposed) == base)

    def transposed_to(self, transposed: bool) -> LowRank:
        return replace(self, transposed=transposed)

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        """s · left @ right, or a chunk of its values, computed from only the rows that it contains."""
        columns = torch.Size(shape[1:]).numel()
        start, stop = run or (0, shape[0] * columns)
        first, last = start // columns, -(-stop // columns)
        if self.transposed:  # ΔW = (B·A)ᵀ = Aᵀ·Bᵀ
            left = self._factor(self.right).T[first:last]
            right = self._factor(self.left).T
        else:
            rank = self.weights.spec(self.right).shape[0]
            left = self.weights.read_range(self.left, first * rank, last * rank).float().view(last - first, rank)
            right = self._factor(self.right)
        product = (left @ right).mul_(self.scale)
        if run is None:
            return product.reshape(shape)
        return product.reshape(-1)[start - first * columns : stop - first * columns]

    def _shape(self, transposed: bool) -> tuple[int, ...]:
        outer, inner = self.weights.spec(self.left).shape, self.weights.spec(self.right).shape
        return (inner[1], outer[0]) if transposed else (outer[0], *inner[1:])

    def _factor(self, name: str) -> Tensor:
        """A factor as a float32 matrix."""
        if (found := self.recent.get(name)) is None:
            found = self.weights.tensor(name).float().flatten(1)
            if len(self.recent) > 1:
                self.recent.clear()
            self.recent[name] = found
        return found


@dataclass(frozen=True)
class Decomposed(Change):
    """DoRA: W + ΔW = m / ‖W + s·B·A‖ ⊙ (W + s·B·A) (Liu et al., ICML 2024, arXiv 2402.09353).

    The norm is taken over the inputs of each output: along each row of a matrix, along each column of a transposed one.

    Args:
        low_rank: s·B·A.
        stored: the name of m in the adapter's file, one number for each output.
    """

    low_rank: LowRank
    stored: str
    _gains: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    needs_base = True

    @property
    def transposed(self) -> bool:
        return self.low_rank.transposed

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        return self.low_rank.shape(base)

    def orientations(self, base: tuple[int, ...]) -> tuple[bool, ...]:
        return self.low_rank.orientations(base)

    def transposed_to(self, transposed: bool) -> Decomposed:
        return replace(self, low_rank=self.low_rank.transposed_to(transposed))

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        if not self._gains:  # two threads may both compute it, with the same result
            self._gains.append(self._find_gains(shape, base))
        axis = int(self.transposed)
        gains = self._gains[0].view([-1 if dim == axis else 1 for dim in range(len(shape))]).expand(shape)
        before = base(run)
        after = before + self.low_rank.read(shape, run, base)
        return after.mul_(gains if run is None else flat_range(gains, *run)).sub_(before)

    def _find_gains(self, shape: tuple[int, ...], base: BaseReader) -> Tensor:
        """m / ‖W + s·B·A‖ for each output, in one pass over the base's values, in blocks of rows."""
        columns = torch.Size(shape[1:]).numel()
        height = max(1, _BLOCK // max(columns, 1))
        squares = torch.zeros(shape[1] if self.transposed else shape[0], dtype=torch.float64)
        for first in range(0, shape[0], height):
            run = (first * columns, min(first + height, shape[0]) * columns)
            block = (base(run) + self.low_rank.read(shape, run, base)).view(-1, columns)
            if self.transposed:
                squares += block.square().sum(dim=0, dtype=torch.float64)
            else:
                squares[first : first + len(block)] = block.square().sum(dim=1, dtype=torch.float64)
        return (self.low_rank.weights.tensor(self.stored).double().flatten() / squares.sqrt()).float()
