"""Sparse experts: the entries of a weight residual with the largest magnitudes.

FREE-Merging (arXiv 2411.16815, section 4.2) calls them M(v, d). An expert has positions (its support) and the values
that are added there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from freemerge.experts.base import Expert
from freemerge.experts.codec import decode_positions, encode_positions
from freemerge.tensors.differences import working_dtype


@dataclass(frozen=True)
class SparseExpert(Expert):
    """What one task adds to the merged backbone at few positions.

    Args:
        indices: tensor name → ascending positions (n,) int64 in the flattened tensor, n ≥ 1.
        values: tensor name → what is added there, (n,) float32.
        shapes: tensor name → shape of the tensor.
        metadata: strings stored with the expert, such as its task, its density and the hash of the merged backbone.

    Raises:
        ValueError: if the names or shapes do not match each other.
    """

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    KIND = "sparse"
    MIXES = True

    def __post_init__(self) -> None:
        if not (self.indices.keys() == self.values.keys() == self.shapes.keys()):
            raise ValueError("SparseExpert: indices, values and shapes must name the same tensors")
        for name, index in self.indices.items():
            if index.shape != self.values[name].shape or index.dim() != 1:
                raise ValueError(
                    f"SparseExpert: tensor {name!r} has indices of shape {tuple(index.shape)} "
                    f"and values of shape {tuple(self.values[name].shape)}; expected two vectors of one length"
                )

    def parts(self) -> dict[str, Tensor]:
        """The expert's values; see `Expert.parts`."""
        return self.values

    def with_parts(self, parts: Mapping[str, Tensor]) -> SparseExpert:
        """The expert with other values; see `Expert.with_parts`."""
        return replace(self, values={name: parts[name] for name in self.values})

    def to(self, device: torch.device | str) -> SparseExpert:
        """The expert on another device; see `Expert.to`."""
        moved = super().to(device)
        if moved is self:
            return self
        return replace(moved, indices={name: index.to(device) for name, index in self.indices.items()})

    def added(self, name: str, weight: Tensor) -> Tensor:
        """The sum of a weight and the expert; see `Expert.added`."""
        flat = weight.reshape(-1)
        index, value = self.indices[name], self.values[name]
        if weight.dtype == working_dtype(weight.dtype):  # no rounding needed; cheaper in training
            return flat.index_add(0, index, value.to(weight.dtype)).view(weight.shape)
        return flat.index_copy(0, index, (flat[index].float() + value).to(weight.dtype)).view(weight.shape)

    def structure(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs in addition to the values; see `Expert.structure`."""
        offset, positions = 0, []
        for name, shape in self.shapes.items():
            positions.append(self.indices[name].cpu() + offset)
            offset += math.prod(shape)
        layout = [[name, list(shape)] for name, shape in self.shapes.items()]
        return {"layout": layout}, {"gaps": encode_positions(torch.cat(positions))}

    @classmethod
    def restored(
        cls,
        plain: Mapping[str, Any],
        arrays: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> SparseExpert:
        """Rebuild an expert from a file; see `Expert.restored`."""
        shapes = {name: tuple(shape) for name, shape in plain["layout"]}
        positions = decode_positions(arrays["gaps"])
        ends = torch.tensor([math.prod(shape) for shape in shapes.values()], device=positions.device).cumsum(0)
        # number of positions before the end of each tensor, (T,)
        cuts = torch.searchsorted(positions, ends).tolist()
        indices, start = {}, 0
        for (name, shape), end, cut in zip(shapes.items(), ends.tolist(), cuts, strict=True):
            indices[name] = positions[start:cut] - (end - math.prod(shape))
            start = cut
        found = {name: len(index) for name, index in indices.items()}
        if start != len(positions) or found != {name: part.numel() for name, part in parts.items()}:
            raise ValueError("positions and values do not match the layout")
        return cls(indices, dict(parts), shapes, dict(metadata))

    @classmethod
    def extract(cls, residual: Mapping[str, Tensor], **settings: Any) -> SparseExpert:
        """Extract an expert by `freemerge.experts.extract`.

        Args:
            residual: tensor name → θ_k − θ_merged, (*shape) floating point.
            **settings: the other arguments of `extract`.
        """
        from freemerge.experts.extraction import extract

        return extract(residual, **settings)

    @classmethod
    def mixed(cls, experts: Sequence[SparseExpert], weights: Sequence[float]) -> SparseExpert:
        """The weighted sum of experts; see `Expert.mixed`."""
        shapes = {name: shape for expert in experts for name, shape in expert.shapes.items()}
        indices, values = {}, {}
        for name in shapes:
            own = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if name in expert.indices]
            index = torch.cat([expert.indices[name] for expert, _ in own])
            value = torch.cat([weight * expert.values[name] for expert, weight in own])
            indices[name], places = index.unique(return_inverse=True)
            values[name] = value.new_zeros(len(indices[name])).index_add_(0, places, value)
        return SparseExpert(indices, values, shapes)
