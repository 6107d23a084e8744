"""Arcee Fusion: take over a model's most important changes, and nothing else (Arcee AI, 2025, in mergekit)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.task_vectors import Vectors
from freemerge.runtime.pages import fresh
from freemerge.runtime.threads import each
from freemerge.tensors.chunks import at_a_time

_EPSILON = 1e-8  # added to probabilities, as in mergekit
_BLOCK = 1 << 16  # values at a time, which are in float64


@dataclass(frozen=True)
class ArceeFusion(MergeMethod):
    """τ = v where an entry is important, and 0 elsewhere. One pass, without parameters; for exactly one model.

    Within each tensor, with rows along its last dimension:

    1. Importance of an entry: |v| · KL(softmax(θ) ‖ softmax(θ_base)) of its row, 1e-8 added to each probability.
    2. Threshold: median + 1.5 · (third quartile − first quartile) of the importances, order statistics at ⌊q·(n − 1)⌋.
    3. Entries whose importance is at least the threshold are taken over.

    mergekit computes in the storage dtype, and quantiles of more than a million values from a random sample; here
    divergences are in float64, because those of nearly equal rows are mostly rounding otherwise, and quantiles exact.
    """

    statistics_fields: ClassVar = ()

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if len(labels) != 1:
            raise MergeError(f"ArceeFusion merges one model into the base, got {len(labels)}")

    def collect_statistics(self, vectors: Vectors) -> Callable[[str], Tensor]:
        """The function that reads the base's values of a tensor."""
        return vectors.read_base

    def combine(self, name: str, deltas: Tensor, statistics: Callable[[str], Tensor]) -> Tensor:
        delta = deltas[0]
        if delta.numel() == 0:
            return delta.clone()
        width = delta.shape[-1] if delta.ndim else 1
        base = statistics(name).to(delta.device).reshape(-1, width)
        rows = delta.reshape(-1, width)
        importance = fresh(rows.shape, rows.dtype, rows.device)
        size = max(1, at_a_time(_BLOCK, rows.device) // width)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        each(lambda part: importance[part].copy_(_importance(base[part], rows[part])), parts)
        return torch.where(importance >= _threshold(importance), rows, 0.0).reshape(delta.shape)


def _importance(base: Tensor, rows: Tensor) -> Tensor:
    """|v| · KL of each row: (r, c) of any floating-point dtype and (r, c) float32 → (r, c) float64."""
    base, rows = base.double(), rows.double()
    own = torch.softmax(base + rows, dim=-1) + _EPSILON
    before = torch.softmax(base, dim=-1) + _EPSILON
    divergence = (own * (own / before).log()).sum(dim=-1, keepdim=True)
    return rows.abs_() * divergence


def _threshold(importance: Tensor) -> float:
    """Median + 1.5 · interquartile range of (r, c) float32, from exact order statistics."""
    values = importance.reshape(-1).cpu().numpy()
    ranks = [int(fraction * (len(values) - 1)) for fraction in (0.25, 0.5, 0.75)]
    first, median, third = np.partition(values, ranks)[ranks].tolist()
    return float(median + 1.5 * (third - first))
