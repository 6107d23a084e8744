"""The one place where a method merges: whatever a merge is for, its values and its errors come from here."""

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
    """A method with the statistics that it has collected.

    Args:
        method: how to merge.
        statistics: what the method's `collect_statistics` returned.
        averaged: names of the tensors of which the mean is taken, whatever the method: statistics of batch norms.
    """

    def __init__(self, method: MergeMethod, statistics: Any, averaged: Collection[str] = frozenset()) -> None:
        self.method = method
        self._statistics = statistics
        self._averaged = averaged

    @classmethod
    def of(cls, method: MergeMethod, vectors: Vectors, averaged: Collection[str] = frozenset()) -> Combiner:
        """Collect the method's statistics of these vectors, without the averaged ones, which methods are not shown."""
        shown = vectors.subset(name for name in vectors.shapes if name not in averaged)
        return cls(method, method.collect_statistics(shown if averaged else vectors), averaged)

    def of_method(self, method: MergeMethod) -> Combiner:
        """Another method with these statistics, whose `statistics_key` is the same."""
        return Combiner(method, self._statistics, self._averaged)

    def whole(self, name: str, deltas: Tensor) -> Tensor:
        """Merge a whole tensor: (K, *shape) float32, which may be overwritten → (*shape)."""
        if name in self._averaged:
            return deltas.mean(dim=0)
        shape = deltas.shape[1:]
        return self._checked(name, self.method.combine(name, deltas, self._statistics), shape)

    def chunk(self, name: str, start: int, deltas: Tensor) -> Tensor:
        """Merge a run of a tensor's values, from `start` on, for elementwise methods: (K, n) float32 → (n,)."""
        if name in self._averaged:
            return deltas.mean(dim=0)
        shape = deltas.shape[1:]
        return self._checked(name, self.method.combine_chunk(name, start, deltas, self._statistics), shape)

    def finish(self, name: str, merged: Tensor) -> Tensor:
        """Finish a whole tensor that was merged by chunks: (*shape) float32 → (*shape)."""
        shape = merged.shape
        return self._checked(name, self.method.finish(name, merged), shape)

    def difference(self, name: str, deltas: Tensor) -> Tensor:
        """`whole`, and every value is finite: for results that are not added to a base at once."""
        return to_stored(self.whole(name, deltas), torch.float32, name, self.method)

    def _checked(self, name: str, merged: Tensor, shape: torch.Size) -> Tensor:
        if merged.shape != shape:
            raise MergeError(
                f"{type(self.method).__name__}.combine returned shape {list(merged.shape)} for the tensor '{name}', "
                f"expected {list(shape)}"
            )
        return merged
