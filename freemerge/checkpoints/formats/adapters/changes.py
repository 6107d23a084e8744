"""The change of one base tensor by an adapter: a float32 difference, whole or a chunk of its values.

Some differences depend only on the adapter (B·A), some also on the base's values (a scaled row). A change that needs
the base receives a function that reads it, so that neither is ever in memory as a whole.
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
BaseReader = Callable[[Run], Tensor]  # reads the base's values of a tensor, or of a chunk of it, in float32


class Change(ABC):
    """The change of one tensor by an adapter."""

    needs_base = False
    optional = False  # whether the base may lack the tensor; then there is no change

    @property
    def transposed(self) -> bool:
        """Whether the base stores the weight transposed, as (inputs, outputs)."""
        return False

    @abstractmethod
    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        """The shape of the difference; as far as it is known without the base's shape."""

    @abstractmethod
    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        """The difference, (*shape) float32, or a chunk (start, stop) of it in row-major order, (stop − start,)."""

    def orientations(self, base: tuple[int, ...]) -> tuple[bool, ...]:
        """The values of `transposed` with which the change fits the base: none, one, or both for a square base."""
        return (self.transposed,)

    def transposed_to(self, transposed: bool) -> Change:
        """The same change for a base with this orientation of the weight."""
        return self


class Modules(Protocol):
    """Modules of an adapter whose changes can only be assigned to tensors with the base."""

    def changes(self, base: Checkpoint | None) -> Mapping[str, Change]:
        """The changes by the base's tensor names; without a base, as far as they are known."""


@dataclass(frozen=True)
class Scaled(Change):
    """(IA)³: every row, or every column, of a weight is multiplied by a factor: ΔW = (l − 1) ⊙ W.

    Liu et al., NeurIPS 2022, arXiv 2205.05638.

    Args:
        weights: the adapter's file.
        stored: the name of the vector l in the file.
        inputs: whether l scales the inputs of a layer (feed-forward) rather than its outputs.
        transposed: see `Change`.
        optional: see `Change`.
    """

    weights: Checkpoint
    stored: str
    inputs: bool
    transposed: bool = False
    optional: bool = False
    needs_base = True

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        return base or self.weights.spec(self.stored).shape

    def orientations(self, base: tuple[int, ...]) -> tuple[bool, ...]:
        length = torch.Size(self.weights.spec(self.stored).shape).numel()
        if len(base) != 2:  # convolutions and biases have only one orientation
            return (False,)
        return tuple(transposed for transposed in (False, True) if base[self._axis(base, transposed)] == length)

    def transposed_to(self, transposed: bool) -> Scaled:
        return replace(self, transposed=transposed)

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        axis = self._axis(shape, self.transposed)
        factors = self.weights.tensor(self.stored).float().flatten() - 1
        factors = factors.view([-1 if dim == axis else 1 for dim in range(len(shape))]).expand(shape)
        return base(run) * (factors if run is None else flat_range(factors, *run))

    def _axis(self, shape: tuple[int, ...], transposed: bool) -> int:
        return int(self.inputs != transposed)


@dataclass(frozen=True)
class Rows(Change):
    """Trained tokens: some rows of an embedding are replaced.

    Args:
        weights: the adapter's file.
        stored: the name of the new rows in the file, (n, d).
        indices: the rows that they replace.
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
    """A vector that is a difference up to a scale: s · v.

    Args:
        weights: the adapter's file.
        stored: the name of v in the file.
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
