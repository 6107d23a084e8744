"""FR-Merging: merge the task vectors' components above a cutoff frequency (FREE-Merging, arXiv 2411.16815)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number, weighted_sum
from freemerge.merging.methods.filters import Filter, NyquistDisc
from freemerge.merging.task_vectors import Vectors
from freemerge.runtime.threads import each
from freemerge.tensors.chunks import at_a_time

_NAMED = ("align", "mean", "uniform")
_EIGHT = 8
_BLOCK = 1 << 16  # values whose copy fits in the cache


@dataclass(frozen=True)
class FRMerging(MergeMethod):
    """τ = Σ_k scale_k · λ_k · G(v_k), where G removes low frequencies, in which the tasks interfere.

    The filter is linear. Whenever the coefficients do not depend on filtered vectors, τ = G(Σ_k scale_k·λ_k·v_k): one
    transform per weight, not one per task. One pass; two with "mean".

    Args:
        filter: G.
        coefficients: λ. "align", the released code: for each tensor, bring every filtered vector to the mean magnitude
            of the largest, λ_k = max_j E|G(v_j)| / E|G(v_k)|. "mean", the paper: λ_k = E|v_k| / Σ_j E|v_j| over the
            whole model. "uniform": λ_k = 1. Or one number per model.
        scale: multiplies the result, or each model's part of it: one number for all models or one per model.
    """

    statistics_fields: ClassVar = ("coefficients",)
    linear_in_scale: ClassVar = True

    filter: Filter = field(default_factory=NyquistDisc)
    coefficients: Literal["align", "mean", "uniform"] | list[float] = "align"
    scale: float | list[float] = 1.0

    def __post_init__(self) -> None:
        require(isinstance(self.filter, Filter), self, f"`filter` must be a Filter, got {self.filter!r}")
        if isinstance(self.coefficients, str):
            require(
                self.coefficients in _NAMED,
                self,
                f'`coefficients` must be "align", "mean", "uniform" or a list of numbers, got {self.coefficients!r}',
            )
        else:
            require_number(self, "coefficients", self.coefficients)
        require_number(self, "scale", self.scale)

    @property
    def elementwise(self) -> bool:
        return self.coefficients != "align"  # the sum is elementwise; `finish` filters it

    @property
    def finishes(self) -> bool:
        return self.elementwise

    @property
    def passes(self) -> int:
        return 2 if self.coefficients == "mean" else 1

    def collect_statistics(self, vectors: Vectors) -> Tensor | None:
        """The paper's λ over the whole model, (K,) float64; None for the other coefficients."""
        if self.coefficients != "mean":
            return None
        parts: list[list[float]] = [[0.0] * len(vectors.labels)]
        # `fsum` is exact, so the order does not matter
        vectors.scan(lambda deltas: parts.append(_magnitudes_(deltas).tolist()))
        gathered = [row for part in vectors.gather(parts) for row in part]
        totals = torch.tensor([math.fsum(column) for column in zip(*gathered, strict=True)], dtype=torch.float64)
        return totals / totals.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | None) -> Tensor:
        if self.coefficients != "align":
            return self.finish(name, self.combine_chunk(name, 0, deltas, statistics))
        magnitudes = torch.tensor(each(self._filter, list(deltas)), dtype=torch.float64)  # (K, 2)
        weights = alignment(magnitudes[:, 1], magnitudes[:, 0]) * torch.as_tensor(self.scale, dtype=torch.float64)
        return weighted_sum(deltas, weights)

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: Tensor | None) -> Tensor:
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        if statistics is not None:
            weights = statistics * scale
        elif self.coefficients == "uniform":
            weights = scale.expand(len(deltas))
        else:
            weights = torch.tensor(self.coefficients, dtype=torch.float64) * scale
        return weighted_sum(deltas, weights)

    def finish(self, name: str, merged: Tensor) -> Tensor:
        return self.filter.apply_(merged)

    def _filter(self, delta: Tensor) -> tuple[float, float]:
        """Filter one vector in place; E|v| and E|G(v)|."""
        before = magnitude(delta)
        self.filter.apply_(delta)
        return before, magnitude(delta)


def alignment(after: Tensor, before: Tensor) -> Tensor:
    """λ_k = max_j E|G(v_j)| / E|G(v_k)|, for one tensor.

    A vector that is only rounding after the filter gets 0, so that rounding is not amplified.

    Args:
        after: E|G(v_k)|, (K,) float64.
        before: E|v_k|, (K,) float64.

    Returns:
        (K,) float64.
    """
    something = after > before * torch.finfo(torch.float32).eps
    after = torch.where(something, after, 0.0)
    return torch.where(something, after.max() / after, 0.0)


def _magnitudes_(deltas: Tensor) -> Tensor:
    """Σ|v_k| over a chunk, (K, n) float32, which is overwritten: (K,) float64.

    float64 avoids drift over billions of entries, but costs ten times as much as float32, so groups of eight values are
    first added in float32.
    """
    magnitudes = deltas.abs_()
    even = magnitudes.shape[1] // _EIGHT * _EIGHT
    eighths = magnitudes[:, :even].unflatten(1, (_EIGHT, even // _EIGHT)).sum(1)  # (K, n/8)
    return eighths.sum(1, dtype=torch.float64) + magnitudes[:, even:].sum(1, dtype=torch.float64)


def magnitude(delta: Tensor) -> float:
    """E|v|. torch's own norm accumulates in float32, which has an error of 3e-4 in a large weight, and is slower."""
    run = delta.reshape(-1)
    parts = run.split(at_a_time(_BLOCK, delta.device))
    return math.fsum(float(block.abs().sum()) for block in parts) / max(len(run), 1)
