"""Classes of somebody's own, as a configuration names them by their import paths."""

from __future__ import annotations

from torch import Tensor, nn

from freemerge.models import Backbone
from freemerge.training import FineTuner


class OwnNet(nn.Module):
    """A network that says how wide its features are, and nothing of what it is made of."""

    def __init__(self, width: int = 8, slope: float = 0.1) -> None:
        super().__init__()
        self.linear = nn.Linear(64, width)
        self.feature_dim = width
        self.slope = slope  # in no tensor: only the constructor's argument tells

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.linear(images.flatten(1)), self.slope)


class OwnBackbone(Backbone):
    """One with a recipe."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(OwnNet(width), width, pretrained=True)
        self.width = width

    def recipe(self) -> dict[str, int]:
        return {"width": self.width}


class OwnTuner(FineTuner):
    """Its heads have a hidden layer, and end without a bias."""

    def make_head(self, num_outputs: int) -> nn.Module:
        width = self.backbone.feature_dim
        return nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, num_outputs, bias=False))


class CosineHead(nn.Module):
    """Cosines to class vectors, of no class of torch."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.arguments = {"width": width, "classes": classes}
        self.vectors = nn.Parameter(nn.init.orthogonal_(Tensor(classes, width)))

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=-1) @ nn.functional.normalize(self.vectors, dim=-1).T

    def recipe(self) -> dict[str, int]:
        return self.arguments


class CosineTuner(FineTuner):
    """Its heads are of a class of its own."""

    def make_head(self, num_outputs: int) -> nn.Module:
        return CosineHead(self.backbone.feature_dim, num_outputs)
