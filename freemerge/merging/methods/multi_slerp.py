"""Multi-SLERP: the mean direction at the mean norm (Goddard, mergekit, 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from freemerge.merging.methods.angles import AngleMethod, inverse_of, normalized, require_weights, shares

_OPPOSITE = 1e-8  # of the mean direction's length


@dataclass(frozen=True)
class MultiSlerp(AngleMethod):
    """τ = n · m/‖m‖ for each tensor, with m = Σ_k w_k · v_k/‖v_k‖ and n = Σ_k w_k · ‖v_k‖. One pass.

    This is mergekit's `multislerp` with a base model: it projects the directions onto the sphere's tangent space at m,
    averages there and projects back, which leads to m itself, as that average is zero. `KarcherMean` iterates to the
    mean on the sphere. Where directions cancel out, m = 0, τ = Σ_k w_k · v_k.

    Args:
        scale: multiplies the result.
        coefficients: w, one number per model, divided by their sum; None for equal ones.
    """

    linear_in_scale: ClassVar = True

    coefficients: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self, self.coefficients)

    def weigh(self, products: Tensor) -> Tensor:
        norms, cosines = normalized(products)
        weights = shares(self.coefficients, len(norms))
        length = float((weights @ cosines @ weights).clamp(min=0).sqrt())
        if length < _OPPOSITE:
            return weights
        return weights * inverse_of(norms) * (float(weights @ norms) / length)
