"""User-made classes from outside freemerge: a backbone, a head, a router and an expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from freemerge.experts import Expert
from freemerge.models import Backbone, Router, TransformersBackbone


class OwnBackbone(Backbone):
    """A small network with a recipe."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width)), width)
        self.width = width

    def recipe(self) -> dict[str, Any]:
        return {"width": self.width}


class SilentBackbone(OwnBackbone):
    """A backbone without a recipe."""

    def recipe(self) -> None:
        return None


class OwnViT(TransformersBackbone):
    """A subclass of a freemerge backbone with another forward pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


class OwnHead(nn.Module):
    """Cosines between features and class vectors."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.arguments = {"width": width, "classes": classes}
        self.vectors = nn.Parameter(torch.randn(classes, width))

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=-1) @ nn.functional.normalize(self.vectors, dim=-1).T

    def recipe(self) -> dict[str, Any]:
        return self.arguments


class OwnRouter(Router):
    """Routes by the mean of each column."""

    KIND = "columns"

    def __init__(self, num_tasks: int, hidden: int = 4, directions: int = 2) -> None:
        super().__init__(num_tasks, 8, hidden, directions)

    def features(self, inputs: Tensor, backbone: Backbone | None = None) -> Tensor:
        return inputs.mean(dim=(1, 2))


@dataclass(frozen=True)
class ShiftExpert(Expert):
    """Adds one number to all entries of a tensor."""

    shifts: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    KIND: ClassVar[str] = "shift"

    @classmethod
    def extract(cls, residual: Mapping[str, Tensor], factor: float = 1.0) -> ShiftExpert:
        shapes = {name: tuple(tensor.shape) for name, tensor in residual.items() if tensor.is_floating_point()}
        return cls({name: factor * residual[name].float().mean().view(1) for name in shapes}, shapes)

    def parts(self) -> dict[str, Tensor]:
        return self.shifts

    def with_parts(self, parts: dict[str, Tensor]) -> ShiftExpert:
        return ShiftExpert({name: parts[name].view(1) for name in self.shifts}, self.shapes, self.metadata)

    def added(self, name: str, weight: Tensor) -> Tensor:
        return (weight.float() + self.shifts[name]).to(weight.dtype)

    def structure(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"layout": [[name, list(shape)] for name, shape in self.shapes.items()]}, {}

    @classmethod
    def restored(cls, plain: Any, arrays: Any, parts: Any, metadata: Any) -> ShiftExpert:
        shapes = {name: tuple(shape) for name, shape in plain["layout"]}
        return cls({name: parts[name].view(1) for name in shapes}, shapes, dict(metadata))
