"""Merge the weights themselves with any method, instead of their differences to the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.wrapper import MethodWrapper
from freemerge.merging.task_vectors import Vectors


class WeightStatistics(NamedTuple):
    """The function that reads the base's values of a tensor, and the statistics of the inner method."""

    read_base: Callable[[str], Tensor]
    inner: Any


@dataclass(frozen=True)
class WholeWeights(MethodWrapper):
    """θ = scale · M(θ_1, …, θ_K): the inner method sees each model's weights in place of its task vector.

    The origin is zero instead of the base, which only names the tensors: spheres are centred there (mergekit's
    `karcher`, `multislerp` without a base model), and a sum of weights need not be an average (its `linear` with
    `normalize: false`). As many passes as the inner method, over whole tensors.

    Args:
        method: merges the weights.
        scale: multiplies the result.
    """

    statistics_fields: ClassVar = ("method",)

    method: MergeMethod
    scale: float = 1.0

    def collect_statistics(self, vectors: Vectors) -> WeightStatistics:
        """Collect the inner method's statistics on the weights."""
        whole = vectors.through(lambda name, deltas: _whole_(deltas, vectors.read_base(name)))
        return WeightStatistics(vectors.read_base, self.method.collect_statistics(whole))

    def combine(self, name: str, deltas: Tensor, statistics: WeightStatistics) -> Tensor:
        base = statistics.read_base(name).to(deltas.device, deltas.dtype)
        merged = self.method.combine(name, _whole_(deltas, base), statistics.inner)
        return merged.mul_(self.scale).sub_(base.reshape(merged.shape))


def _whole_(deltas: Tensor, base: Tensor) -> Tensor:
    """θ_k = θ_base + v_k: (K, *shape) float32 in place, and (*shape) of any dtype."""
    return deltas.add_(base.to(deltas.device, deltas.dtype).reshape(deltas.shape[1:]))
