"""Fisher merging: average weighted by the Fisher information of each entry (Matena & Raffel, arXiv 2111.09832)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint
from freemerge.errors import MergeError
from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.measured import MeasuredMethod, read_values


@dataclass(frozen=True)
class FisherMerging(MeasuredMethod):
    """τ = scale · Σ_k F_k ⊙ v_k / Σ_k F_k, entry by entry, F_k the diagonal of model k's Fisher information. One pass.

    F_k is the mean square of the gradient of log p(y|x) over a few hundred samples of task k, y drawn from the model.

    Args:
        statistics: see `MeasuredMethod`; F_k, of the weight's own shape.
        scale: multiplies the result.
        least: added to every F_k, as a multiple of the mean of a weight's F over the models, so that entries that
            affect no loss are averaged.
    """

    statistics_fields: ClassVar = ("statistics",)
    linear_in_scale: ClassVar = True
    measures: ClassVar = "squared_gradients"

    least: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "least", self.least)
        require(self.least > 0, self, f"`least` must be above 0, got {self.least}")

    def measured_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def combine(self, name: str, deltas: Tensor, statistics: list[Checkpoint]) -> Tensor:
        if not statistics[0].has(name) or deltas[0].numel() == 0:
            return weighted_sum(deltas, self.scale / len(deltas))
        least = self.least * sum(self._mean(file, name) for file in statistics) / len(statistics)
        if least == 0:  # no loss depends on the weight
            return weighted_sum(deltas, self.scale / len(deltas))
        weights = deltas.new_zeros(deltas.shape[1:])
        total = torch.zeros_like(weights)
        for file, delta in zip(statistics, deltas, strict=True):
            own = read_values(file, file.tensor(name), name).to(deltas.device).add_(least)
            weights += own
            total.addcmul_(own, delta)
        return total.div_(weights).mul_(self.scale)

    @staticmethod
    def _mean(file: Checkpoint, name: str) -> float:
        values = read_values(file, file.tensor(name), name)
        if float(values.min()) < 0:
            raise MergeError(f"{file.label}: the statistics of '{name}' are negative, but a mean of squares cannot be")
        return float(values.mean(dtype=torch.float64))
