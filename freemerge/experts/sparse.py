"""Sparse experts: the few entries of a weight residual that a task needs most.

Notation: r = θ_k − θ_merged is the residual of task k against the merged backbone, d the density, D the number of
floating-point parameters. An expert keeps d·D entries of r: where they are (the support) and what is added there
(the values). FREE-Merging (arXiv 2411.16815, section 4.2) calls this M(v, d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["model", "tensor", "row"]


@dataclass(frozen=True)
class SparseExpert:
    """What one task adds to the merged backbone, at few positions.

    Args:
        indices: tensor name → ascending positions (n,) int64 in the flattened tensor; no empty entries.
        values: tensor name → what is added there, (n,) float32.
        shapes: tensor name → shape of the whole tensor.
        metadata: strings that travel with the file: task, density, hash of the merged backbone it belongs to.
    """

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.indices.keys() == self.values.keys() == self.shapes.keys()):
            raise ValueError("SparseExpert: indices, values and shapes must name the same tensors")
        for name, index in self.indices.items():
            if index.shape != self.values[name].shape or index.dim() != 1:
                raise ValueError(
                    f"SparseExpert: tensor {name!r} has indices of shape {tuple(index.shape)} "
                    f"and values of shape {tuple(self.values[name].shape)}; expected two vectors of one length"
                )

    @property
    def num_values(self) -> int:
        """How many values the expert holds."""
        return sum(value.numel() for value in self.values.values())

    def to(self, device: torch.device | str) -> SparseExpert:
        """The expert on another device; itself if it is there already."""
        if all(value.device == torch.device(device) for value in self.values.values()):
            return self
        return replace(
            self,
            indices={name: index.to(device) for name, index in self.indices.items()},
            values={name: value.to(device) for name, value in self.values.items()},
        )

    def scaled(self, factor: float) -> SparseExpert:
        """The expert with all its values multiplied by `factor`."""
        return replace(self, values={name: value * factor for name, value in self.values.items()})

    def with_values(self, values: Tensor) -> SparseExpert:
        """The expert with other values: one vector (num_values,) in the order of `flat_values`."""
        parts = values.split([value.numel() for value in self.values.values()])
        return replace(self, values=dict(zip(self.values, parts, strict=True)))

    def flat_values(self) -> Tensor:
        """All values as one vector (num_values,) float32."""
        return torch.cat(list(self.values.values()))

    def dense(self) -> dict[str, Tensor]:
        """The expert as full tensors, zero outside its support."""
        result = {}
        for name, shape in self.shapes.items():
            flat = self.values[name].new_zeros(math.prod(shape))
            result[name] = flat.index_copy(0, self.indices[name], self.values[name]).view(shape)
        return result


def extract(
    residual: Mapping[str, Tensor],
    density: float,
    *,
    scope: Scope = "model",
    rescale: Literal["none", "released"] = "none",
    metadata: Mapping[str, str] | None = None,
) -> SparseExpert:
    """Keep the top-d entries of a residual by magnitude: M(r, d).

    Args:
        residual: tensor name → r of any shape, floating point; usually θ_k − θ_merged.
        density: share d ∈ (0, 1] of entries to keep.
        scope: rank magnitudes over the whole `model`, within each `tensor`, or within each `row` (dim 0, as released;
            tensors with fewer than 2 dimensions count as one row).
        rescale: `none` keeps the entries as they are; `released` multiplies them by μ = −E|kept|·log10(d) / E|r|,
            per tensor, as FREE-Merging's released code does.
        metadata: strings to travel with the expert; the density is added.

    Returns:
        The expert. Exactly max(1, round(d·D)) entries for scope `model`, so many per tensor or row otherwise; among
        equal magnitudes the earlier tensor and position wins.

    Raises:
        ValueError: for a density outside (0, 1] or a residual without floating-point entries.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"extract: density must be in (0, 1], got {density}")
    floating = {name: tensor.detach().float() for name, tensor in residual.items() if tensor.is_floating_point()}
    floating = {name: tensor for name, tensor in floating.items() if tensor.numel() > 0}
    if not floating:
        raise ValueError("extract: the residual has no floating-point entries")
    scores = {name: tensor.abs() for name, tensor in floating.items()}
    if scope == "model":
        indices = _top_of_model(scores, density)
    elif scope in ("tensor", "row"):
        indices = {name: _top_of_rows(_rows(score, scope), density) for name, score in scores.items()}
    else:
        raise ValueError(f"extract: scope must be 'model', 'tensor' or 'row', got {scope!r}")
    values = {name: floating[name].reshape(-1)[index] for name, index in indices.items()}
    if rescale == "released":
        values = {name: value * _released_factor(value, floating[name], density) for name, value in values.items()}
    elif rescale != "none":
        raise ValueError(f"extract: rescale must be 'none' or 'released', got {rescale!r}")
    return SparseExpert(
        indices=indices,
        values=values,
        shapes={name: tuple(floating[name].shape) for name in indices},
        metadata={**(metadata or {}), "density": repr(density)},
    )


def _top_of_model(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    whole = torch.cat([score.reshape(-1) for score in scores.values()])  # (D,)
    keep = _top(whole, max(1, round(density * whole.numel())))
    sizes = torch.tensor([score.numel() for score in scores.values()], device=keep.device)
    ends = sizes.cumsum(0)
    owner = torch.bucketize(keep, ends, right=True)  # which tensor each kept position falls into
    indices = {name: keep[owner == i] - (ends[i] - sizes[i]) for i, name in enumerate(scores)}
    return {name: index for name, index in indices.items() if index.numel() > 0}


def _rows(tensor: Tensor, scope: Scope) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1) if scope == "row" and tensor.dim() >= 2 else tensor.reshape(1, -1)


def _top_of_rows(rows: Tensor, density: float) -> Tensor:
    """(R, n) → ascending flat positions of each row's top entries."""
    count = max(1, round(density * rows.shape[1]))
    starts = range(0, rows.numel(), rows.shape[1])
    return torch.cat([_top(row, count) + start for row, start in zip(rows, starts, strict=True)])


def _top(scores: Tensor, count: int) -> Tensor:
    """Ascending positions of exactly `count` largest entries; among equals the earlier position wins."""
    threshold = scores.kthvalue(scores.numel() - count + 1).values
    above = (scores > threshold).nonzero().squeeze(1)
    equal = (scores == threshold).nonzero().squeeze(1)[: count - above.numel()]
    return torch.cat([above, equal]).sort().values


def _released_factor(kept: Tensor, whole: Tensor, density: float) -> float:
    """μ = −E|kept|·log10(d) / E|whole|; 1 for a tensor of zeros, whose kept entries are zero anyway."""
    mean = whole.abs().mean().item()
    return -kept.abs().mean().item() * math.log10(density) / mean if mean > 0 else 1.0
