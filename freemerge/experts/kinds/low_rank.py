"""Low-rank experts: two factors of rank r per weight, and whole changes of small tensors.

A weight of shape (O, …) is treated as a matrix (O, I), where I is the product of the other dimensions, and changed to
W + U·V with U (O, r) and V (r, I). No positions are stored. The factors come from a singular value decomposition, as in
Twin-Merging (arXiv 2406.15479), and can then be trained like LoRA's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from freemerge.experts.base import Expert
from freemerge.tensors.differences import working_dtype


@dataclass(frozen=True)
class LowRankExpert(Expert):
    """What one task adds to the merged backbone: W + U·V for weights, a full tensor for others.

    Args:
        left: tensor name → U (O, r) float32.
        right: tensor name → V (r, I) float32.
        whole: name of a tensor that is changed without factors → what is added to it, (*shape) float32.
        shapes: name → shape, of all tensors in `left` and `whole`.
        metadata: strings stored with the expert.

    Raises:
        ValueError: if the names or shapes do not match each other.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    whole: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    KIND = "low_rank"
    MIXES = True

    def __post_init__(self) -> None:
        if self.left.keys() != self.right.keys() or self.left.keys() & self.whole.keys():
            raise ValueError("LowRankExpert: each tensor needs both factors, or is whole")
        if self.shapes.keys() != self.left.keys() | self.whole.keys():
            raise ValueError("LowRankExpert: factors, whole tensors and shapes must name the same tensors")
        for name, left in self.left.items():
            rows, columns = matrix_shape(self.shapes[name])
            right = self.right[name]
            if left.shape != (rows, left.shape[-1]) or right.shape != (left.shape[-1], columns):
                raise ValueError(
                    f"LowRankExpert: tensor {name!r} of shape {self.shapes[name]} has factors of shapes "
                    f"{tuple(left.shape)} and {tuple(right.shape)}; expected ({rows}, r) and (r, {columns})"
                )
        for name, tensor in self.whole.items():
            if tuple(tensor.shape) != tuple(self.shapes[name]):
                raise ValueError(f"LowRankExpert: tensor {name!r} has shape {tuple(tensor.shape)}")

    def parts(self) -> dict[str, Tensor]:
        """The expert's values; see `Expert.parts`."""
        factors = {}
        for name, left in self.left.items():
            factors[f"{name}:left"], factors[f"{name}:right"] = left, self.right[name]
        return factors | self.whole

    def with_parts(self, parts: Mapping[str, Tensor]) -> LowRankExpert:
        """The expert with other values; see `Expert.with_parts`."""
        return replace(
            self,
            left={name: parts[f"{name}:left"] for name in self.left},
            right={name: parts[f"{name}:right"] for name in self.right},
            whole={name: parts[name] for name in self.whole},
        )

    def scaled(self, factor: float) -> LowRankExpert:
        """The expert with its effect multiplied by `factor`, which scales U and whole tensors only."""
        return replace(
            self,
            left={name: left * factor for name, left in self.left.items()},
            whole={name: tensor * factor for name, tensor in self.whole.items()},
        )

    def added(self, name: str, weight: Tensor) -> Tensor:
        """The sum of a weight and the expert; see `Expert.added`."""
        wide = weight.to(working_dtype(weight.dtype))
        if name in self.whole:
            return (wide + self.whole[name]).to(weight.dtype)
        left, right = self.left[name].to(wide.dtype), self.right[name].to(wide.dtype)
        return torch.addmm(wide.reshape(matrix_shape(weight.shape)), left, right).view(weight.shape).to(weight.dtype)

    def structure(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs in addition to the values; see `Expert.structure`."""
        ranks = {name: left.shape[1] for name, left in self.left.items()}
        return {"layout": [[name, list(shape), ranks.get(name, 0)] for name, shape in self.shapes.items()]}, {}

    @classmethod
    def restored(
        cls,
        plain: Mapping[str, Any],
        arrays: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> LowRankExpert:
        """Rebuild an expert from a file; see `Expert.restored`."""
        shapes = {name: tuple(shape) for name, shape, _ in plain["layout"]}
        ranks = {name: rank for name, _, rank in plain["layout"] if rank}
        if {*parts} != {f"{name}:{side}" for name in ranks for side in ("left", "right")} | (shapes.keys() - ranks):
            raise ValueError("factors do not match the layout")
        left, right = {}, {}
        for name, rank in ranks.items():
            rows, columns = matrix_shape(shapes[name])
            left[name], right[name] = parts[f"{name}:left"].view(rows, rank), parts[f"{name}:right"].view(rank, columns)
        whole = {name: parts[name].view(shape) for name, shape in shapes.items() if name not in ranks}
        return cls(left, right, whole, shapes, dict(metadata))

    @classmethod
    def extract(cls, residual: Mapping[str, Tensor], **settings: Any) -> LowRankExpert:
        """Extract an expert by `freemerge.experts.extract_low_rank`.

        Args:
            residual: tensor name → θ_k − θ_merged, (*shape) floating point.
            **settings: the other arguments of `extract_low_rank`.
        """
        from freemerge.experts.extraction import extract_low_rank

        return extract_low_rank(residual, **settings)

    @classmethod
    def mixed(cls, experts: Sequence[LowRankExpert], weights: Sequence[float]) -> LowRankExpert:
        """The weighted sum of experts; see `Expert.mixed`."""
        shapes = {name: shape for expert in experts for name, shape in expert.shapes.items()}
        left, right, whole = {}, {}, {}
        for name, shape in shapes.items():
            own = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if name in expert.shapes]
            if all(name in expert.left for expert, _ in own):
                left[name] = torch.cat([weight * expert.left[name] for expert, weight in own], dim=1)
                right[name] = torch.cat([expert.right[name] for expert, _ in own])
            else:  # a tensor that is whole in one expert is whole in the sum
                zero = torch.zeros(shape, device=own[0][0].flat_values().device)
                whole[name] = sum((weight * expert.added(name, zero) for expert, weight in own), zero)
        return LowRankExpert(left, right, whole, shapes)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix shape of a weight: (O, …) → (O, I), where I is the product of the other dimensions."""
    return shape[0], math.prod(shape[1:])
