"""PCB-Merging: parameter competition balancing (Du et al., NeurIPS 2024, arXiv 2410.02396)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number, require_scope, weighted_sum
from freemerge.merging.methods.filters import Filter
from freemerge.merging.task_vectors import Vectors
from freemerge.runtime.threads import each
from freemerge.tensors.differences import blocks, flat
from freemerge.tensors.order_statistics import Gather, Scan, order_statistics, tensor_sample

_LINEAR = np.float32(3e-4)  # x − tanh x ≈ x³/3 is less than half a unit in the last place of a float32


class PCBStatistics(NamedTuple):
    """PCB-Merging's statistics of the whole model; each (K, 1) float32."""

    low: Tensor  # magnitudes are clamped to [low, high]
    high: Tensor
    threshold: Tensor  # the smallest score that takes part
    maximum: Tensor  # the largest score


@dataclass(frozen=True)
class PCBMerging(MergeMethod):
    """Weigh each entry of each task vector by its importance within its task and its agreement with the others.

    With K models of D merged parameters and rank(q) the ascending order statistic at index ⌊D·q⌋, all of it over the
    whole model:

    1. m_k = |v_k| clamped to its order statistics at ⌊D·clip⌋ and ⌊D·(1 − clip) − 1⌋; c_k = sign(v_k)·m_k.
    2. score_k = exp(K·n_k²) · inter_k, where n_k = (m_k − min m_k)/(max m_k − min m_k).
    3. w_k = (max(score_k, t_k) − t_k)/(max score_k − t_k), with t_k = rank(1 − ratio) of score_k.
    4. τ = Σ_k λ_k·c_k·w_k / max(Σ_k w_k, 1e-12).

    Where all magnitudes of a task are equal, n_k = 0; where all scores that take part are equal, w_k is 1 for those
    above zero (the formulas divide zero by zero there).

    Three passes: one for the clamp, one for the scores, one to merge. Five with a filter, because no sample brackets
    the ranks. One with scope "tensor".

    Args:
        ratio: fraction of each task vector's entries that take part, in (0, 1].
        scale: λ, one number for all models or one per model. The authors use 1.2 for CLIP ViT.
        clip: fraction of the smallest and of the largest magnitudes that are clamped, in [0, 0.5).
        inter: agreement with the other tasks. "sum": tanh(v_k·Σ_j v_j), the released code. "normalized":
            tanh(s_k·Σ_j s_j) with s = sign(v)·n, the released vision code. "pairwise": Σ_j tanh(s_k·s_j), the
            released evolutionary search.
        filter: a high-pass filter for the task vectors' matrices, before anything else (FR-Merging with balancing).
        scope: where ranks, minima and maxima are taken: over the whole "model", as the authors do, or in each "tensor"
            separately.
    """

    statistics_fields: ClassVar = ("ratio", "clip", "inter", "filter", "scope")
    linear_in_scale: ClassVar = True

    ratio: float = 0.1
    scale: float | list[float] = 1.0
    clip: float = 1e-4
    inter: Literal["sum", "normalized", "pairwise"] = "sum"
    filter: Filter | None = None
    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        for name in ("ratio", "scale", "clip"):
            require_number(self, name, getattr(self, name))
        require(0 < self.ratio <= 1, self, f"`ratio` must lie in (0, 1], got {self.ratio}")
        require(0 <= self.clip < 0.5, self, f"`clip` must lie in [0, 0.5), got {self.clip}")
        require(
            self.inter in ("sum", "normalized", "pairwise"),
            self,
            f'`inter` must be "sum", "normalized" or "pairwise", got {self.inter!r}',
        )
        valid = self.filter is None or isinstance(self.filter, Filter)
        require(valid, self, f"`filter` must be a Filter or None, got {self.filter!r}")
        require_scope(self, self.scope)

    @property
    def elementwise(self) -> bool:
        return self.filter is None and self.scope == "model"

    @property
    def passes(self) -> int:
        if self.scope == "tensor":
            return 1
        return 3 if self.filter is None else 5

    def collect_statistics(self, vectors: Vectors) -> PCBStatistics | None:
        """Find the clamp of the magnitudes and the range of the scores that take part; None with scope "tensor"."""
        if self.scope == "tensor" or vectors.numel == 0:
            return None
        if self.filter is not None:
            vectors = vectors.through(lambda name, deltas: self._filtered(deltas))
        # The sample is empty with a filter: filtered vectors would cost the transforms of a whole pass.
        return self._statistics(vectors.scan, vectors.sample(), vectors.numel, vectors.gather)

    def combine(self, name: str, deltas: Tensor, statistics: PCBStatistics | None) -> Tensor:
        values = self._filtered(deltas)
        if values.shape[1] == 0:
            return deltas[0].clone()
        parts = blocks(values)
        if statistics is None:

            def scan(see: Callable[[Tensor], None]) -> None:
                for block in parts:
                    see(block.clone())

            statistics = self._statistics(scan, tensor_sample(values), values.shape[1])
        return torch.cat(each(lambda block: self._balanced(block, statistics), parts)).reshape(deltas.shape[1:])

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: PCBStatistics) -> Tensor:
        # One block after the other, because every thread already processes its own chunk.
        return torch.cat([self._balanced(block, statistics) for block in blocks(deltas)])

    def _statistics(
        self, scan: Scan, sample: Tensor, total: int, gather: Gather = lambda value: [value]
    ) -> PCBStatistics:
        """Compute the statistics of `total` entries of each task vector; see `order_statistics` for the arguments."""
        first = int(total * self.clip)
        clamp = [first, max(int(total * (1 - self.clip) - 1), first)]
        take = [min(int(total * (1 - self.ratio)), total - 1), total - 1]
        shape = (len(sample), total)

        def magnitudes(see: Callable[[Tensor], None]) -> None:
            scan(lambda deltas: see(deltas.abs_()))

        def scores(see: Callable[[Tensor], None]) -> None:
            scan(lambda deltas: see(self._scores(deltas, _clamped(deltas, low, high), low, high)))

        low, high = order_statistics(magnitudes, clamp, shape, sample.abs(), gather).split(1, dim=1)
        sample = self._scores(sample, _clamped(sample, low, high), low, high)  # overwrites an array of the same size
        range_ = order_statistics(scores, take, shape, sample, gather)
        return PCBStatistics(low, high, *range_.split(1, dim=1))

    def _balanced(self, values: Tensor, statistics: PCBStatistics) -> Tensor:
        """Σ_k λ_k·c_k·w_k / Σ_k w_k: (K, n) → (n,)."""
        low, high, threshold, maximum = (bound.to(values.device) for bound in statistics)
        clamped = _clamped(values, low, high)
        scores = self._scores(values, clamped, low, high)
        spread = maximum - threshold
        level = (spread <= 0) & (scores >= threshold) & (scores > 0) if bool((spread <= 0).any()) else None
        weights = scores.sub_(threshold).clamp_(min=0).div_(torch.where(spread > 0, spread, 1.0))
        if level is not None:
            weights.masked_fill_(level, 1.0)
        total = weights.sum(0).clamp_(min=1e-12)
        return weighted_sum(clamped.mul_(values.sign_()).mul_(weights), self.scale).div_(total)

    def _filtered(self, deltas: Tensor) -> Tensor:
        """(K, *shape) → (K, n), through the filter if there is one, which works in place."""
        if self.filter is not None:
            each(self.filter.apply_, list(deltas))
        return flat(deltas)

    def _scores(self, values: Tensor, clamped: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Task vectors and their clamped magnitudes, (K, n), and bounds, (K, 1) → (K, n) scores in new memory."""
        low, high = low.to(values.device), high.to(values.device)
        spread = high - low
        agreement = _tanh_(values * values.sum(0)) if self.inter == "sum" else None
        normalized = (clamped - low).div_(torch.where(spread > 0, spread, 1.0))
        if agreement is None:
            signed = values.sign().mul_(normalized)
            if self.inter == "normalized":
                agreement = signed.mul_(signed.sum(0)).tanh_()
            else:
                agreement = torch.stack([(signed * row).tanh_().sum(0) for row in signed])
        return normalized.square_().mul_(len(values)).exp_().mul_(agreement)


def _clamped(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Magnitudes of (K, n) clamped to the rows' bounds, (K, 1); in new memory."""
    low, high = low.to(values.device), high.to(values.device)
    magnitudes = values.abs()  # in two steps: `clamp_` with tensor bounds takes six times as long
    torch.maximum(magnitudes, low, out=magnitudes)
    return torch.minimum(magnitudes, high, out=magnitudes)


def _tanh_(values: Tensor) -> Tensor:
    """tanh in place of contiguous values, fast where most are small: below _LINEAR it is x itself to the last bit."""
    if values.device.type != "cpu":
        return values.tanh_()
    if values.numel() == 0:
        return values
    least, most = values.aminmax()
    if max(-least, most) < _LINEAR:  # in most chunks all values are small
        return values
    far = np.flatnonzero(values.abs().numpy() >= _LINEAR)
    if 8 * len(far) > values.numel():
        return values.tanh_()
    run = values.view(-1)
    run[far] = run[far].tanh()
    return values
