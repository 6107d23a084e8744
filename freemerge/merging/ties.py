"""TIES-Merging: trim, elect a sign, average those who agree (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from freemerge.merging.method import MergeMethod, require, require_number
from freemerge.merging.ranks import order_statistics, tensor_order_statistics
from freemerge.merging.vectors import Vectors, flat


@dataclass(frozen=True)
class Ties(MergeMethod):
    """Keep each model's largest entries, elect a sign per entry, average the entries of that sign.

    1. Trim: v_k keeps its entries with |v| ≥ t_k, its ⌊density·D⌋-th largest magnitude (equals of t_k are kept too).
    2. Elect: γ = sign(Σ_k v_k).
    3. Disjoint mean: τ = scale · mean of {v_k : sign(v_k) = γ}; zero where no entry is left.

    Two passes with scope "model" (one to find t_k exactly, from a bracket that a sample gives), one with "tensor".

    Args:
        density: fraction of the entries to keep, in (0, 1].
        scale: λ, multiplies the result.
        scope: over what the density counts: the whole "model", as in the paper, or each "tensor" by itself.
    """

    survey_fields: ClassVar = ("density", "scope")

    density: float = 0.2
    scale: float = 1.0
    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        require_number(self, "density", self.density)
        require(0 < self.density <= 1, self, f"`density` must lie in (0, 1], got {self.density}")
        require_number(self, "scale", self.scale)
        require(self.scope in ("model", "tensor"), self, f'`scope` must be "model" or "tensor", got {self.scope!r}')

    @property
    def elementwise(self) -> bool:
        return self.scope == "model"

    @property
    def passes(self) -> int:
        return 2 if self.scope == "model" and self.density < 1 else 1

    def survey(self, vectors: Vectors) -> Tensor | None:
        """Find t_k over the whole model, (K,) float32; None with scope "tensor" or if nothing is trimmed."""
        if self.scope == "tensor" or self.density == 1 or vectors.numel == 0:
            return None
        total = vectors.numel
        rank = total - max(1, int(total * self.density))

        shape = (len(vectors.labels), total)

        def scan(see):
            vectors.scan(lambda deltas: see(deltas.abs_()))

        return order_statistics(scan, [rank], shape, vectors.sample().abs_(), vectors.gather)[:, 0]

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | None) -> Tensor:
        values = flat(deltas)
        if values.shape[1] == 0:
            return deltas[0].clone()
        if self.density < 1:
            magnitudes = values.abs()
            if statistics is None:
                total = values.shape[1]
                rank = total - max(1, int(total * self.density))
                statistics = tensor_order_statistics(magnitudes, [rank])[:, 0]
            values.masked_fill_(magnitudes < statistics.to(values.device)[:, None], 0.0)
        # Where the sum is zero no entry has its sign but those that are zero themselves, and their mean is zero too.
        agrees = (values.sign() == values.sum(0).sign_()).to(values.dtype)
        merged = values.mul_(agrees).sum(0).div_(agrees.sum(0).clamp_(min=1)).mul_(self.scale)
        return merged.reshape(deltas.shape[1:])
