"""Singular value calibration: correct over-counted shared directions (Li et al., ICML 2026, arXiv 2602.05536)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number
from freemerge.merging.methods.matrices import stack_shape
from freemerge.merging.methods.wrapper import MethodWrapper
from freemerge.tensors.spectra import leading_components, rounding


@dataclass(frozen=True)
class SVC(MethodWrapper):
    """Rescale the singular values of another method's merged matrices where the tasks share directions.

    For each matrix of the result, τ = U diag(σ) Vᵀ, and each of its directions u_r, the response of task k is a_rk =
    u_rᵀv_k and that of the merge is a_r = σ_r v_rᵀ. s_rk = ⟨a_r, a_rk⟩/‖a_rk‖² is above 1 where the merge contains more
    of task k's response than the task vector itself. Then σ_r becomes

    - form "paper": σ_r · K/Σ_k max(alpha, s_rk);
    - form "released", the authors' code: σ_r/max(alpha, mean_k s_rk) if all s_rk > 0, else σ_r.

    Stacked experts are matrices one by one, convolutions are dim 0 × the rest; tensors that are not matrices stay as
    the inner method merged them. As many passes as the inner method.

    Args:
        method: the method whose result is calibrated.
        scale: multiplies the result.
        alpha: lower bound of the weight of a direction.
        form: the equations to use, see above.
    """

    statistics_fields: ClassVar = ("method",)
    linear_in_scale: ClassVar = True

    alpha: float = 0.1
    form: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "alpha", self.alpha)
        require(self.alpha > 0, self, f"`alpha` must be positive, got {self.alpha}")
        require(self.form in ("paper", "released"), self, f'`form` must be "paper" or "released", got {self.form!r}')

    def extra_copies(self, models: int) -> int:
        return models + super().extra_copies(models)  # a second copy of all task vectors

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        merged = self.method.combine(name, deltas.clone(), statistics)
        shape = stack_shape(name, merged.shape)
        if shape is not None and merged.numel():
            stack = merged.contiguous().view(shape)
            tasks = deltas.reshape(len(deltas), *shape)
            for index, matrix in enumerate(stack):
                self._calibrate_(matrix, tasks[:, index])
            merged = stack.view(merged.shape)
        return merged.mul_(self.scale)

    def _calibrate_(self, matrix: Tensor, tasks: Tensor) -> None:
        """(m, n) in place, by (K, m, n)."""
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        side, values, rows = leading_components(wide, len(wide), rounding(*wide.shape))
        left, right = (side, rows) if wide is matrix else (rows.T, side.T)  # (m, r), (r, n)
        answers = (left.T @ task for task in tasks)  # (r, n) each
        counts = torch.stack([_ratio(values * (own * right).sum(1), own.square().sum(1)) for own in answers])
        if self.form == "paper":
            factors = len(tasks) / counts.clamp(min=self.alpha).sum(dim=0)
        else:
            factors = torch.where((counts > 0).all(dim=0), 1 / counts.mean(dim=0).clamp(min=self.alpha), 1.0)
        torch.mm(left * (values * factors), right, out=matrix)


def _ratio(products: Tensor, squares: Tensor) -> Tensor:
    """⟨a_r, a_rk⟩/‖a_rk‖², 0 where task k has no response."""
    return torch.where(squares > 0, products / squares.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)
