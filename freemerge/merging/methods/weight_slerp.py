"""SLERP of the weights themselves: the arc between two models, as mergekit's `slerp` (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod, require, require_number, weighted_sum
from freemerge.merging.methods.slerp import Slerp
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.chunks import at_a_time
from freemerge.tensors.differences import flat

_BLOCK = 1 << 16


@dataclass(frozen=True)
class WeightSlerp(MergeMethod):
    """θ = sin((1 − t)·φ)/sin φ · θ_1 + sin(t·φ)/sin φ · θ_2, φ the angle between a tensor's weights. One pass.

    For one fine-tuned model, θ_1 is the base and θ_2 the model, as in mergekit; for two, they are the two models, and
    the base only names the tensors. Where |cos φ| > 0.9995, or one of them is zero, θ = (1 − t)·θ_1 + t·θ_2: nearly
    always so if the models were fine-tuned from the base. `Slerp` is the arc of the task vectors.

    Args:
        t: 0 gives θ_1, 1 gives θ_2.
    """

    statistics_fields: ClassVar = ()

    t: float = 0.5

    def __post_init__(self) -> None:
        require_number(self, "t", self.t)
        require(0 <= self.t <= 1, self, f"`t` must lie in [0, 1], got {self.t}")

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if len(labels) > 2:
            raise MergeError(f"WeightSlerp merges one model into the base, or two models, got {len(labels)}")

    def collect_statistics(self, vectors: Vectors) -> Callable[[str], Tensor]:
        """The function that reads the base's values of a tensor."""
        return vectors.read_base

    def combine(self, name: str, deltas: Tensor, statistics: Callable[[str], Tensor]) -> Tensor:
        base = statistics(name).to(deltas.device, deltas.dtype).reshape(-1)
        weights = Slerp(t=self.t).weigh(_products(base, flat(deltas)))
        own = weights[1:] if len(deltas) == 1 else weights  # the base itself has a task vector of zeros
        merged = weighted_sum(deltas, own)
        merged.view(-1).add_(base, alpha=float(weights.sum()) - 1)
        return merged


def _products(base: Tensor, deltas: Tensor) -> Tensor:
    """⟨θ_i, θ_j⟩ of the two ends of the arc, (2, 2) float64 on the CPU, from (n,) and (K, n) float32."""
    total = torch.zeros(2, 2, dtype=torch.float64, device=deltas.device)
    size = at_a_time(_BLOCK, deltas.device, 2)
    for start, part in zip(base.split(size), deltas.split(size, dim=1), strict=True):
        ends = start.double() + part.double()  # (K, ≤ size)
        if len(deltas) == 1:
            ends = torch.cat([start.double()[None], ends])
        total.addmm_(ends, ends.T)
    return total.cpu()
