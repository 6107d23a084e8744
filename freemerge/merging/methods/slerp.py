"""SLERP: two models on the arc between them instead of the chord (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.angles import AngleMethod, normalized
from freemerge.merging.methods.base import require, require_number

_PARALLEL = 0.9995  # cosine from which on the arc is treated as the chord


@dataclass(frozen=True)
class Slerp(AngleMethod):
    """τ = sin((1 − t)·θ)/sin θ · v_1 + sin(t·θ)/sin θ · v_2, θ the angle between a tensor's task vectors. One pass.

    The result lies on the arc from v_1 to v_2, so its norm is about theirs, and not smaller as that of their mean.
    Where |cos θ| > 0.9995, or one of them is zero, τ = (1 − t)·v_1 + t·v_2. The arc is centred on the base, as in
    mergekit's `nuslerp` with a base model. For exactly two models; see `KarcherMean` for more.

    Args:
        scale: multiplies the result.
        t: 0 gives the first model, 1 the second.
    """

    linear_in_scale: ClassVar = True

    t: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "t", self.t)
        require(0 <= self.t <= 1, self, f"`t` must lie in [0, 1], got {self.t}")

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if len(labels) != 2:
            raise MergeError(f"Slerp merges two models, got {len(labels)}; KarcherMean and MultiSlerp merge more")

    def weigh(self, products: Tensor) -> Tensor:
        norms, cosines = normalized(products)
        cosine = float(cosines[0, 1])
        if abs(cosine) > _PARALLEL or not bool(norms.all()):
            return torch.tensor([1 - self.t, self.t], dtype=torch.float64)
        angle = math.acos(cosine)
        parts = [math.sin((1 - self.t) * angle), math.sin(self.t * angle)]
        return torch.tensor(parts, dtype=torch.float64) / math.sin(angle)
