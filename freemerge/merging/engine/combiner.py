"""The only place that calls a method, so that all kinds of merges have the same values and errors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.rounding import to_stored


class Combiner:
    """A method with its collected statistics.

    Args:
        method: how to merge.
        statistics: the result of the method's `collect_statistics`.
        averaged: names of the tensors that are averaged by every method: batch-norm statistics.
    """

    def __init__(self, method: MergeMethod, statistics: Any, averaged: Collection[str] = frozenset()) -> None:
        self.method = method
        self._statistics = statistics
        self._averaged = averaged

    @classmethod
    def of(cls, method: MergeMethod, vectors: Vectors, averaged: Collection[str] = frozenset()) -> Combiner:
        """Collect the method's statistics of these vectors, except the averaged ones, which methods do not see."""
        shown = vectors.subset(name for name in vectors.shapes if name not in averaged)
        return cls(method, method.collect_statistics(shown if averaged else vectors), averaged)

    def of_method(self, method: MergeMethod) -> Combiner:
        """Another method with the same `statistics_key`, using these statistics."""
        return Combiner(method, self._statistics, self._averaged)

    def whole(self, name: str, deltas: Tensor) -> Tensor:
        """Merge a whole tensor: (K, *shape) float32, which may be overwritten → (*shape)."""
        if name in self._averaged:
            return deltas.mean(dim=0)
        shape = deltas.shape[1:]
        return self._checked(name, self.method.combine(name, deltas, self._statistics), shape)

    def chunk(self, name: str, start: int, deltas: Tensor) -> Tensor:
        """Merge a chunk of a tensor's values, from `start` on, for elementwise methods: (K, n) float32 → (n,)."""
        if name in self._averaged:
            return deltas.mean(dim=0)
        shape = deltas.shape[1:]
        return self._checked(name, self.method.combine_chunk(name, start, deltas, self._statistics), shape)

    def finish(self, name: str, merged: Tensor) -> Tensor:
        """Finish a whole tensor that was merged in chunks: (*shape) float32 → (*shape)."""
        shape = merged.shape
        return self._checked(name, self.method.finish(name, merged), shape)

    def difference(self, name: str, deltas: Tensor) -> Tensor:
        """Like `whole`, but check that every value is finite: for results that are not added to a base directly."""
        return to_stored(self.whole(name, deltas), torch.float32, name, self.method)

    def _checked(self, name: str, merged: Tensor, shape: torch.Size) -> Tensor:
        if merged.shape != shape:
            raise MergeError(
                f"{type(self.method).__name__}.combine returned shape {list(merged.shape)} for the tensor '{name}', "
                f"expected {list(shape)}"
            )
        return merged
