"""TIES-Merging: trim, elect a sign, average the entries that agree (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from freemerge.merging.methods.base import require, require_number
from freemerge.merging.methods.trimming import TrimmingMethod


@dataclass(frozen=True)
class Ties(TrimmingMethod):
    """Keep each model's largest entries, elect a sign per entry, average the entries of that sign.

    1. Trim: v_k keeps its entries with |v| ≥ t_k, its ⌊density·D⌋-th largest magnitude (ties with t_k are kept too).
    2. Elect: γ = sign(Σ_k v_k).
    3. Disjoint mean: τ = scale · mean of {v_k : sign(v_k) = γ}; zero where no entry is left.

    With coefficients w, w_k · v_k replaces v_k in the election, and the mean is Σ w_k · v_k / Σ w_k over the entries of
    the elected sign, as in mergekit.

    Two passes, the first to find t_k exactly within a bracket from a sample; one pass if nothing is trimmed. More if
    the sampled bounds miss t_k.

    Args:
        density: fraction of the entries to keep, in (0, 1], one for all models or one per model.
        scale: λ, multiplies the result.
        scope: where the density applies: to the whole "model", as in the paper, or to each "tensor" separately.
        coefficients: w, one number per model; None for equal ones.
        mean: divide by the entries' coefficients; false takes the sum of the entries of the elected sign.
    """

    linear_in_scale: ClassVar = True

    density: float | list[float] = 0.2
    coefficients: list[float] | None = None
    mean: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients is not None:
            require(isinstance(self.coefficients, (list, tuple)), self, "`coefficients` must be a list of numbers")
            require_number(self, "coefficients", self.coefficients)
        require(isinstance(self.mean, bool), self, f"`mean` must be true or false, got {self.mean!r}")

    def merge_trimmed_(self, values: Tensor) -> Tensor:
        if self.coefficients is None:
            return elected_mean_(values) if self.mean else elected_sum_(values)
        for row, coefficient in zip(values, self.coefficients, strict=True):
            row.mul_(coefficient)
        return elected_mean_(values, self.coefficients) if self.mean else elected_sum_(values)


def elected_mean_(values: Tensor, coefficients: Sequence[float] | None = None) -> Tensor:
    """Elect a sign per entry by the sum, and average the entries of that sign.

    Args:
        values: (K, n), overwritten.
        coefficients: K numbers that the values were multiplied by, and whose sum divides instead of the number of
            entries; None for a plain mean.

    Returns:
        (n,); zero where no entry is left.
    """
    total = elected_sum_(values)  # leaves the entries of the elected sign, as magnitudes
    agreeing = values.sign_()
    if coefficients is None:
        return total.div_(agreeing.sum(0).clamp_(min=1))
    for row, coefficient in zip(agreeing, coefficients, strict=True):
        row.mul_(coefficient)
    divisor = agreeing.sum(0)
    return total.div_(divisor.masked_fill_(divisor == 0, 1))


def elected_sum_(values: Tensor) -> Tensor:
    """Elect a sign per entry by the sum, and add up the entries of that sign: (K, n), overwritten → (n,)."""
    sign = values.sum(0).sign_()
    # Where the sum is zero no entry is left, and theirs is zero too.
    agreeing = values.mul_(sign).clamp_(min=0)
    return agreeing.sum(0).mul_(sign)
