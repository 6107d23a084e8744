"""Consensus merging: keep entries that several tasks use, by TALL masks (Wang et al., ICML 2024, arXiv 2405.07813)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod, require, require_number
from freemerge.merging.methods.task_arithmetic import TaskArithmetic
from freemerge.merging.methods.wrapper import MethodWrapper


@dataclass(frozen=True)
class Consensus(MethodWrapper):
    """Remove entries that too few tasks use from another method's result: Consensus TA, Consensus TIES.

    With τ the result of the method inside, the multi-task vector:

    1. Task k uses the entries where |v_k| > threshold·|τ − v_k| (its TALL mask).
    2. Entries that fewer than `tasks` tasks use are set to zero: with 1, entries that no task uses ("catastrophic");
       with 2, also entries that a single task uses ("selfish").
    3. The rest is multiplied by the scale.

    As many passes as the method inside.

    Args:
        method: gives the multi-task vector; `TaskArithmetic(1.0)` for Consensus TA, `Ties()` for Consensus TIES. Its
            own scale affects the masks; the scale below does not.
        scale: α, multiplies the result.
        threshold: λ; with a larger value, a task uses fewer entries. The authors search 0.2 to 0.6 by task.
        tasks: how many tasks must use an entry.
    """

    statistics_fields: ClassVar = ("method",)
    linear_in_scale: ClassVar = True

    method: MergeMethod = field(default_factory=lambda: TaskArithmetic(1.0))
    scale: float = 0.3
    threshold: float = 0.4
    tasks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "threshold", self.threshold)
        require(self.threshold >= 0, self, f"`threshold` must be at least 0, got {self.threshold}")
        whole = isinstance(self.tasks, int) and not isinstance(self.tasks, bool) and self.tasks >= 0
        require(whole, self, f"`tasks` must be an integer of at least 0, got {self.tasks!r}")

    @property
    def elementwise(self) -> bool:
        return self.method.elementwise and not self.method.finishes

    def extra_copies(self, models: int) -> int:
        return models + super().extra_copies(models)  # a second copy of all task vectors

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if self.tasks > len(labels):
            raise MergeError(
                f"Consensus: no entry is used by {self.tasks} of {len(labels)} tasks, and the result would be the "
                "base; set `tasks` to at most the number of models"
            )

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        return self._mask_(self.method.combine(name, deltas.clone(), statistics), deltas)

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: Any) -> Tensor:
        return self._mask_(self.method.combine_chunk(name, start, deltas.clone(), statistics), deltas)

    def _mask_(self, merged: Tensor, deltas: Tensor) -> Tensor:
        """Of (*shape) and (K, *shape)."""
        users = torch.zeros(merged.shape, dtype=torch.int32, device=merged.device)
        for delta in deltas:
            users += delta.abs() > (merged - delta).abs_().mul_(self.threshold)
        return merged.masked_fill_(users < self.tasks, 0.0).mul_(self.scale)
