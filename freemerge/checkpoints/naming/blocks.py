"""The location of one tensor's values in others: blocks, each a strided part of two tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Values with constant strides in a source and in a target, both flattened.

    Args:
        source: the source's name.
        sizes: number of values along each dimension of the block.
        offset: position of the first value in the source.
        strides: distance of consecutive values in the source, along each dimension.
        place: position of the first value in the target.
        steps: distance of consecutive values in the target, along each dimension; descending.
    """

    source: str
    sizes: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    place: int
    steps: tuple[int, ...]

    @staticmethod
    def make(
        source: str, sizes: Sequence[int], offset: int, strides: Sequence[int], place: int, steps: Sequence[int]
    ) -> Block:
        """Make a block with the fewest possible dimensions, in the order of the target."""
        dims = sorted(zip(steps, sizes, strides, strict=True), key=lambda dim: -dim[0])
        merged: list[tuple[int, int, int]] = []
        for step, size, stride in dims:
            if size == 1:
                continue
            if merged and merged[-1][0] == step * size and merged[-1][2] == stride * size:
                merged[-1] = (step, merged[-1][1] * size, stride)
            else:
                merged.append((step, size, stride))
        merged = merged or [(1, 1, 1)]
        steps, sizes, strides = zip(*merged, strict=True)
        return Block(source, sizes, offset, strides, place, steps)

    def inverted(self, target: str) -> Block:
        """The same values with source and target exchanged; `target` is the new source's name."""
        return Block.make(target, self.sizes, self.place, self.steps, self.offset, self.strides)

    def within(self, start: int, stop: int) -> Block | None:
        """A part with all values whose places are from `start` to `stop`, and few others; None if there are none."""
        place, offset, sizes = self.place, self.offset, list(self.sizes)
        for dim, (step, stride) in enumerate(zip(self.steps, self.strides, strict=True)):
            below = sum((size - 1) * each for size, each in zip(sizes[dim + 1 :], self.steps[dim + 1 :], strict=True))
            # Row i covers the places from place + i·step to place + i·step + below.
            first = max(0, -(-(start - below - place) // step))
            last = min(sizes[dim], -(-(stop - place) // step))
            if first >= last:
                return None
            place, offset, sizes[dim] = place + first * step, offset + first * stride, last - first
            if last - first > 1:
                break
        return self._replace(sizes=tuple(sizes), place=place, offset=offset)

    @property
    def end(self) -> int:
        """The position in the target after the last value."""
        return self.place + _reach(self.sizes, self.steps)

    def read(self, run: Callable[[str, int, int], Tensor]) -> Tensor:
        """Read the values, in the block's dimensions.

        Args:
            run: reads the flat values between two positions of a source.
        """
        values = run(self.source, self.offset, self.offset + _reach(self.sizes, self.strides))
        return values.as_strided(self.sizes, [stride * values.stride(0) for stride in self.strides])


def assemble(blocks: Sequence[Block], start: int, stop: int, read: Callable[[Block], Tensor]) -> Tensor:
    """Read the flat values of a target from `start` to `stop`; zero where no block has any.

    Args:
        blocks: the blocks of the target.
        start: the first position, in row-major order.
        stop: the position after the last.
        read: reads a block's values, see `Block.read`.
    """
    parts = [part for block in blocks if (part := block.within(start, stop)) is not None]
    if len(parts) == 1 and parts[0].steps == (1,) and parts[0].place <= start and stop <= parts[0].end:
        # contiguous in the source, so no copy is needed
        return read(parts[0])[start - parts[0].place : stop - parts[0].place]
    first = min((start, *(part.place for part in parts)))
    last = max((stop, *(part.end for part in parts)))
    result: Tensor | None = None
    for part in parts:
        values = read(part)
        if result is None:
            result = torch.zeros(last - first, dtype=values.dtype, device=values.device)
        result.as_strided(part.sizes, part.steps, part.place - first).copy_(values)
    if result is None:  # differences that are all zero here: only the dtype is needed
        block = blocks[0]
        values = read(block._replace(sizes=(1,) * len(block.sizes)))
        result = torch.zeros(stop - start, dtype=values.dtype, device=values.device)
    return result[start - first : stop - first]


def _reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
