"""Karcher mean: the direction with the smallest squared angles to all models, at the mean norm (Karcher, 1977)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.angles import AngleMethod, inverse_of, normalized, require_weights, shares
from freemerge.merging.methods.base import require, require_number

_SMALL = 1e-8  # radians; of the mean direction's length


@dataclass(frozen=True)
class KarcherMean(AngleMethod):
    """τ = n · m for each tensor: m on the unit sphere minimizes Σ_k w_k · θ(m, v_k)², n = Σ_k w_k · ‖v_k‖. One pass.

    Starting at the mean direction, m moves along the arc of Σ_k w_k · θ_k/sin θ_k · (v_k/‖v_k‖ − cos θ_k · m) until
    that is shorter than the tolerance. Only the vectors' inner products are used. For two models it is SLERP at equal
    norms. The sphere is centred on the base.

    Args:
        scale: multiplies the result.
        coefficients: w, one number per model, divided by their sum; None for equal ones.
        iterations: maximum number of iterations.
        tolerance: length of the last step, in radians.
    """

    linear_in_scale: ClassVar = True

    coefficients: list[float] | None = None
    iterations: int = 10
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self, self.coefficients)
        whole = isinstance(self.iterations, int) and not isinstance(self.iterations, bool) and self.iterations >= 0
        require(whole, self, f"`iterations` must be an integer of at least 0, got {self.iterations!r}")
        require_number(self, "tolerance", self.tolerance)

    def weigh(self, products: Tensor) -> Tensor:
        norms, cosines = normalized(products)
        weights = shares(self.coefficients, len(norms))
        length = _length(weights, cosines)
        if length < _SMALL:  # directions cancel out
            return weights
        mean = weights / length  # as coefficients of the unit vectors
        for _ in range(self.iterations):
            toward = (cosines @ mean).clamp(-1, 1)  # cos θ_k
            angles = toward.acos()
            pull = weights * torch.where(angles > _SMALL, angles / angles.sin().clamp(min=_SMALL), 1.0) * (norms > 0)
            step = pull - float(pull @ toward) * mean
            size = _length(step, cosines)
            if size < self.tolerance:
                break
            mean = torch.cos(torch.tensor(size)) * mean + torch.sin(torch.tensor(size)) / size * step
            mean = mean / _length(mean, cosines)
        return mean * inverse_of(norms) * float(weights @ norms)


def _length(coefficients: Tensor, cosines: Tensor) -> float:
    """‖Σ_k c_k · v_k/‖v_k‖‖."""
    return float((coefficients @ cosines @ coefficients).clamp(min=0).sqrt())
