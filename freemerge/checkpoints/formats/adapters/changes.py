"""What an adapter does to one tensor of its base: a difference in float32, whole or a run of its values.

Some differences follow from the adapter alone (B·A), some from the base's values as well (a scaled row). A change that
needs the base is given a function that reads it, so that the whole of neither is ever in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.memory import flat_range

Run = tuple[int, int] | None
BaseReader = Callable[[Run], Tensor]  # the base's values of a tensor, or of a run of it, in float32


class Change(ABC):
    """What an adapter does to one tensor."""

    needs_base = False
    optional = False  # where the base has no such tensor, there is no change of it

    @property
    def turned(self) -> bool:
        """Whether the base holds the weight as (inputs, outputs)."""
        return False

    @abstractmethod
    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        """The shape of the difference; as far as it is known, if the base's is not given."""

    @abstractmethod
    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        """The difference, (*shape) float32, or a run (start, stop) of it in row-major order, (stop − start,)."""

    def orientations(self, base: tuple[int, ...]) -> tuple[bool, ...]:
        """What `turned` may be for the change to fit the base; both, if the base's tensor is square, or nothing."""
        return (self.turned,)

    def turn(self, turned: bool) -> Change:
        """The same change for a base that holds the weight so."""
        return self


class Modules(Protocol):
    """Modules of an adapter of which only the base tells what is done to which of its tensors."""

    def changes(self, base: Checkpoint | None) -> Mapping[str, Change]:
        """The changes by the names of the base's tensors; without a base, as far as they are known."""


@dataclass(frozen=True)
class Scaled(Change):
    """(IA)³: every row, or every column, of a weight is multiplied by a number: ΔW = (l − 1) ⊙ W.

    Liu et al., NeurIPS 2022, arXiv 2205.05638.

    Args:
        weights: the adapter's file.
        stored: the name of the vector l in it.
        inputs: whether l scales the inputs of a layer (feed-forward), and not its outputs.
        turned: see `Change`.
        optional: see `Change`.
    """

    weights: Checkpoint
    stored: str
    inputs: bool
    turned: bool = False
    optional: bool = False
    needs_base = True

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        return base or self.weights.spec(self.stored).shape

    def orientations(self, base: tuple[int, ...]) -> tuple[bool, ...]:
        length = torch.Size(self.weights.spec(self.stored).shape).numel()
        if len(base) != 2:  # a convolution has one orientation, and so has a bias
            return (False,)
        return tuple(turned for turned in (False, True) if base[self._axis(base, turned)] == length)

    def turn(self, turned: bool) -> Scaled:
        return replace(self, turned=turned)

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        axis = self._axis(shape, self.turned)
        factors = self.weights.tensor(self.stored).float().flatten() - 1
        factors = factors.view([-1 if dim == axis else 1 for dim in range(len(shape))]).expand(shape)
        return base(run) * (factors if run is None else flat_range(factors, *run))

    def _axis(self, shape: tuple[int, ...], turned: bool) -> int:
        return int(self.inputs != turned)


@dataclass(frozen=True)
class Rows(Change):
    """Trained tokens: some rows of an embedding are replaced.

    Args:
        weights: the adapter's file.
        stored: the name of the new rows in it, (n, d).
        indices: which rows they replace.
    """

    weights: Checkpoint
    stored: str
    indices: tuple[int, ...]
    needs_base = True

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        width = self.weights.spec(self.stored).shape[1]
        return (max(base[0] if base else 0, max(self.indices, default=-1) + 1), width)

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        width = shape[1]
        start, stop = run or (0, shape[0] * width)
        first, last = start // width, -(-stop // width)
        rows = torch.zeros(last - first, width)
        for position, index in enumerate(self.indices):
            if first <= index < last:
                row = self.weights.read_range(self.stored, position * width, (position + 1) * width).float()
                rows[index - first] = row - base((index * width, (index + 1) * width))
        return rows if run is None else rows.view(-1)[start - first * width : stop - first * width]


@dataclass(frozen=True)
class ScaledVector(Change):
    """A vector that is a difference itself, up to a scale: s · v.

    Args:
        weights: the adapter's file.
        stored: the name of v in it.
        scale: s.
    """

    weights: Checkpoint
    stored: str
    scale: float

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        return self.weights.spec(self.stored).shape

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        values = self.weights.tensor(self.stored) if run is None else self.weights.read_range(self.stored, *run)
        return values.float() * self.scale
