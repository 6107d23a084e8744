"""NearSwap: adopt another model's changes where they are small, and at most t of larger ones (alchemonaut, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod, require, require_number


@dataclass(frozen=True)
class NearSwap(MergeMethod):
    """τ = w · v with w = min(t/|v|, 1): each entry moves from the base to the other model, by at most t. One pass.

    So τ is v clamped to ± t. For exactly one model besides the base.

    Args:
        t: the largest change of an entry, above 0.
    """

    statistics_fields: ClassVar = ()

    t: float = 1e-3

    def __post_init__(self) -> None:
        require_number(self, "t", self.t)
        require(self.t > 0, self, f"`t` must be above 0, got {self.t}")

    @property
    def elementwise(self) -> bool:
        return True

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if len(labels) != 1:
            raise MergeError(f"NearSwap merges one model into the base, got {len(labels)}")

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        return deltas[0].clamp(-self.t, self.t)
