"""RegMean: the matrix nearest to all models' outputs on their own data (Jin et al., ICLR 2023, arXiv 2212.09849)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint
from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.measured import MeasuredMethod, read_values
from freemerge.tensors.covariances import divide


@dataclass(frozen=True)
class RegMean(MeasuredMethod):
    """τ = scale · (Σ_k v_k G_k)(Σ_k G_k)⁻¹ for the matrices of linear layers and convolutions. One pass.

    G_k = XᵀX over the inputs X of the layer, (samples, inputs), on a few batches of task k; its entries off the
    diagonal are multiplied by α. A matrix is (outputs, inputs), as torch has it. A convolution over images is one,
    (outputs, channels · height · width of its kernel), and a row of X is a patch; the paper averages convolutions.

    Args:
        statistics: see `MeasuredMethod`; G_k, (inputs, inputs).
        scale: multiplies the result.
        alpha: α, in [0, 1]; the authors' 0.9.
    """

    statistics_fields: ClassVar = ("statistics",)
    linear_in_scale: ClassVar = True
    measures: ClassVar = "gram_matrices"

    alpha: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "alpha", self.alpha)
        require(0 <= self.alpha <= 1, self, f"`alpha` must lie in [0, 1], got {self.alpha}")

    def measured_shape(self, shape: torch.Size) -> torch.Size | None:
        inputs = shape[1:].numel()
        return torch.Size([inputs, inputs]) if len(shape) in (2, 4) else None

    def combine(self, name: str, deltas: Tensor, statistics: list[Checkpoint]) -> Tensor:
        if not statistics[0].has(name) or deltas[0].numel() == 0:
            return weighted_sum(deltas, self.scale / len(deltas))
        matrices = deltas.flatten(2)  # (K, outputs, inputs)
        products = torch.zeros_like(matrices[0])
        total = deltas.new_zeros(matrices.shape[2], matrices.shape[2])
        for file, delta in zip(statistics, matrices, strict=True):
            own = read_values(file, file.tensor(name), name).to(deltas.device, copy=True)
            diagonal = own.diagonal().clone()
            own.mul_(self.alpha).diagonal().copy_(diagonal)
            products.addmm_(delta, own)
            total += own
        return divide(products, total).mul_(self.scale).reshape(deltas.shape[1:])
