"""AdaMerging: λ of each task and tensor, learned on unlabelled inputs (Yang et al., ICLR 2024, arXiv 2310.02575)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.measured import MeasuredMethod, read_values
from freemerge.merging.task_vectors import Vectors


@dataclass(frozen=True)
class AdaMerging(MeasuredMethod):
    """τ = scale · Σ_k λ_k · v_k for each tensor, with a λ_k of the tensor's own (layer-wise AdaMerging). One pass.

    λ minimizes the mean entropy of the merged model's predictions over all tasks, by Adam: see
    `freemerge.tuning.learn_coefficients`. Learning needs inputs, so only a run learns them, on the tasks' validation
    inputs without their labels; a merge of checkpoints takes the files that a run wrote.

    Args:
        statistics: see `MeasuredMethod`; λ_k of each weight, a single number.
        scale: multiplies the result.
        initial: λ from which learning starts, and that of a weight without a number; the authors' 0.3.
        rate: Adam's learning rate; the authors' 0.001.
        steps: steps of Adam, each on a batch of every task; the authors' 500.
        batch_size: inputs of each task in a step; the authors' 16.
    """

    statistics_fields: ClassVar = ("statistics", "initial")
    linear_in_scale: ClassVar = True
    measures: ClassVar = "coefficients"

    initial: float = 0.3
    rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("initial", "rate"):
            require_number(self, name, getattr(self, name))
        require(0 <= self.initial <= 1, self, f"`initial` must lie in [0, 1], got {self.initial}")
        require(self.rate > 0, self, f"`rate` must be above 0, got {self.rate}")
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, self, f"`{name}` must be at least 1, got {value!r}")

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def collected_as(self) -> str:
        return f"coefficients-{self.initial:g}-{self.rate:g}-{self.steps}-{self.batch_size}"

    def measured_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([])

    def collect_statistics(self, vectors: Vectors) -> Any:
        """λ of each weight that has them: name → K numbers."""
        files = super().collect_statistics(vectors)
        return {
            name: [float(read_values(file, file.tensor(name), name)) for file in files]
            for name in vectors.shapes
            if files[0].has(name)
        }

    def combine(self, name: str, deltas: Tensor, statistics: dict[str, list[float]]) -> Tensor:
        weights = statistics.get(name, [self.initial] * len(deltas))
        return weighted_sum(deltas, [self.scale * weight for weight in weights])
