"""TIES-Merging: trim, elect a sign, average the entries that agree (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from freemerge.merging.methods.trimming import TrimmingMethod


@dataclass(frozen=True)
class Ties(TrimmingMethod):
    """Keep each model's largest entries, elect a sign per entry, average the entries of that sign.

    1. Trim: v_k keeps its entries with |v| ≥ t_k, its ⌊density·D⌋-th largest magnitude (ties with t_k are kept too).
    2. Elect: γ = sign(Σ_k v_k).
    3. Disjoint mean: τ = scale · mean of {v_k : sign(v_k) = γ}; zero where no entry is left.

    Two passes, the first to find t_k exactly within a bracket from a sample; one pass if nothing is trimmed. More if
    the sampled bounds miss t_k.

    Args:
        density: fraction of the entries to keep, in (0, 1].
        scale: λ, multiplies the result.
        scope: where the density applies: to the whole "model", as in the paper, or to each "tensor" separately.
    """

    linear_in_scale: ClassVar = True

    density: float = 0.2

    def merge_trimmed_(self, values: Tensor) -> Tensor:
        return elected_mean_(values)


def elected_mean_(values: Tensor) -> Tensor:
    """Elect a sign per entry by the sum, and average the entries of that sign: (K, n), overwritten → (n,)."""
    sign = values.sum(0).sign_()
    # Entries of the elected sign, as magnitudes. Where the sum is zero there are none, and their mean is zero too.
    agreeing = values.mul_(sign).clamp_(min=0)
    total = agreeing.sum(0)
    return total.mul_(sign).div_(agreeing.sign_().sum(0).clamp_(min=1))
