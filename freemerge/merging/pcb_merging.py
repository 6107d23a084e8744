"""PCB-Merging: parameter competition balancing (Du et al., NeurIPS 2024, arXiv 2410.02396)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from freemerge.merging.filters import Filter
from freemerge.merging.method import MergeMethod, require, require_number, weighted_sum
from freemerge.merging.ranks import order_statistics
from freemerge.merging.threads import each
from freemerge.merging.vectors import Vectors, flat


class PCBStatistics(NamedTuple):
    """What PCB-Merging has to know of the whole model; each (K, 1) float32."""

    low: Tensor  # magnitudes are clamped to [low, high]
    high: Tensor
    threshold: Tensor  # scores from here on take part
    maximum: Tensor  # the largest score


@dataclass(frozen=True)
class PCBMerging(MergeMethod):
    """Weigh each entry of each task vector by its importance within its task and its agreement with the others.

    With K models of D merged parameters and rank(q) the ascending order statistic at index ⌊D·q⌋, all of it over the
    whole model, never per tensor:

    1. m_k = |v_k| clamped to its order statistics at ⌊D·clip⌋ and ⌊D·(1 − clip) − 1⌋; c_k = sign(v_k)·m_k.
    2. score_k = exp(K·n_k²) · inter_k, where n_k = (m_k − min m_k)/(max m_k − min m_k).
    3. w_k = (max(score_k, t_k) − t_k)/(max score_k − t_k), with t_k = rank(1 − ratio) of score_k.
    4. τ = Σ_k λ_k·c_k·w_k / max(Σ_k w_k, 1e-12).

    Where all magnitudes of a task are equal, n_k = 0; where all scores that take part are equal, w_k is 1 for those
    above zero (the formulas divide zero by zero there).

    Three passes: one for the clamp, one for the scores, one to merge. With a filter five, as no sample brackets the
    ranks.

    Args:
        ratio: fraction of each task vector's entries that take part, in (0, 1].
        scale: λ, one number for all models or one per model. The authors use 1.2 for CLIP ViT.
        clip: fraction of the smallest and of the largest magnitudes that are clamped, in [0, 0.5).
        inter: agreement with the other tasks. "sum": tanh(v_k·Σ_j v_j), the released code. "normalized":
            tanh(s_k·Σ_j s_j) with s = sign(v)·n, the released vision code. "pairwise": Σ_j tanh(s_k·s_j), the
            released evolutionary search.
        filter: a high-pass filter for the task vectors' matrices, before anything else (FR-Merging with balancing).
    """

    survey_fields: ClassVar = ("ratio", "clip", "inter", "filter")

    ratio: float = 0.1
    scale: float | list[float] = 1.0
    clip: float = 1e-4
    inter: Literal["sum", "normalized", "pairwise"] = "sum"
    filter: Filter | None = None

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

    @property
    def elementwise(self) -> bool:
        return self.filter is None

    @property
    def passes(self) -> int:
        return 3 if self.filter is None else 5

    def survey(self, vectors: Vectors) -> PCBStatistics | None:
        """Find the clamp of the magnitudes and the range of the scores that take part, exactly."""
        total = vectors.numel
        if total == 0:
            return None

        if self.filter is not None:
            vectors = vectors.through(lambda name, deltas: self._filtered(deltas))
        sample = vectors.sample()  # empty with a filter: filtered vectors would cost the transforms of a whole pass
        shape = (len(vectors.labels), total)

        def magnitudes(see):
            vectors.scan(lambda deltas: see(deltas.abs_()))

        def scores(see):
            vectors.scan(lambda deltas: see(self._scores(deltas, low, high)))

        first = int(total * self.clip)
        last = max(int(total * (1 - self.clip) - 1), first)
        bounds = order_statistics(magnitudes, [first, last], shape, sample.abs(), vectors.gather)
        low, high = bounds[:, :1], bounds[:, 1:]
        ranks = [min(int(total * (1 - self.ratio)), total - 1), total - 1]
        range_ = order_statistics(scores, ranks, shape, self._scores(sample, low, high), vectors.gather)
        return PCBStatistics(low, high, range_[:, :1], range_[:, 1:])

    def combine(self, name: str, deltas: Tensor, statistics: PCBStatistics | None) -> Tensor:
        if statistics is None:
            return deltas[0].clone()
        low, high, threshold, maximum = (bound.to(deltas.device) for bound in statistics)
        values = self._filtered(deltas)
        scores = self._scores(values, low, high)
        spread = maximum - threshold
        level = (spread <= 0) & (scores >= threshold) & (scores > 0) if bool((spread <= 0).any()) else None
        weights = scores.sub_(threshold).clamp_(min=0).div_(torch.where(spread > 0, spread, 1.0))
        if level is not None:
            weights.masked_fill_(level, 1.0)
        total = weights.sum(0).clamp_(min=1e-12)
        clamped = torch.sign(values).mul_(values.abs_().clamp_(low, high))
        merged = weighted_sum(clamped.mul_(weights), self.scale).div_(total)
        return merged.reshape(deltas.shape[1:])

    def _filtered(self, deltas: Tensor) -> Tensor:
        """(K, *shape) → (K, n), through the filter if there is one, which works in place."""
        if self.filter is not None:
            each(self.filter.apply_, list(deltas))
        return flat(deltas)

    def _scores(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """(K, n) task vectors and (K, 1) bounds → (K, n) scores."""
        low, high = low.to(values.device), high.to(values.device)
        spread = high - low
        normalized = values.abs().clamp_(low, high).sub_(low).div_(torch.where(spread > 0, spread, 1.0))
        intra = normalized.square().mul_(len(values)).exp_()
        if self.inter == "sum":
            return intra.mul_((values * values.sum(0)).tanh_())
        signed = normalized.mul_(values.sign())
        if self.inter == "normalized":
            return intra.mul_((signed * signed.sum(0)).tanh_())
        return intra.mul_(torch.stack([(signed * row).tanh_().sum(0) for row in signed]))
