"""The router: which task does an input belong to?

R(x) → task logits (FREE-Merging, arXiv 2411.16815, section 4.2). It sees the input before any expert is switched in, at
a small share of a forward pass of the backbone:

- `ConvRouter` is a separate small network over images;
- `EarlyRouter` looks at what the merged backbone itself makes of any input at an early point, its embeddings or its
  first block, and leaves the rest of the pass out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from freemerge.inputs import Inputs
from freemerge.models.backbones import Backbone


class Router(nn.Module):
    """Base class of routers.

    Args:
        num_tasks: number of tasks K.
        config: all arguments of the class, from which `from_config` makes it again.
    """

    KIND: ClassVar[str]

    def __init__(self, num_tasks: int, **config: Any) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.config = {"kind": self.KIND, "num_tasks": num_tasks, **config}

    @abstractmethod
    def forward(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """Task logits (B, K) of a batch; `backbone` is the merged one, for those who look at its features."""


class ConvRouter(Router):
    """A small network over images: a linear head on cheap features.

    The features are those of three strided convolutions, their mean and their maximum over all places: what kinds of
    edges and textures there are, wherever they are. Images of any size will do.

    Args:
        num_tasks: number of tasks K.
        channels: channels C of the images.
        width: channels of the first convolution; the others have twice as many.
    """

    KIND = "conv"

    def __init__(self, num_tasks: int, channels: int, width: int = 16) -> None:
        super().__init__(num_tasks, channels=channels, width=width)
        self.stem = nn.Sequential(
            nn.BatchNorm2d(channels),  # standardises the pixels by the training data's statistics
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.head = nn.Linear(4 * width, num_tasks)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 4·width)."""
        maps = self.stem(images).flatten(2)  # (B, 2·width, places)
        return torch.cat([maps.mean(dim=2), maps.amax(dim=2)], dim=1)

    def forward(self, inputs: Tensor, backbone: Backbone | None = None) -> Tensor:
        """Task logits (B, K) of images (B, C, H, W)."""
        return self.head(self.features(inputs))


class EarlyRouter(Router):
    """A small head on what the merged backbone makes of an input at an early point.

    What comes out there, tokens (B, N, F) or maps (B, F, H, W), is summed up by its mean, its spread and its maximum
    over tokens or places (for texts: where `attention_mask` is 1), standardised by the training data's statistics.

    Args:
        num_tasks: number of tasks K.
        point: name of the submodule of the backbone's model whose output is looked at; nothing after it runs.
        width: F, channels of that output; `feature_width` finds it.
        hidden: width of the head's hidden layer; 0 makes it linear.
    """

    KIND = "early"

    def __init__(self, num_tasks: int, point: str, width: int, hidden: int = 64) -> None:
        super().__init__(num_tasks, point=point, width=width, hidden=hidden)
        self.point = point
        self.standardise = nn.BatchNorm1d(3 * width, affine=False)
        if hidden:
            self.head = nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, num_tasks))
        else:
            self.head = nn.Linear(3 * width, num_tasks)

    def forward(self, inputs: Inputs, backbone: Backbone | None = None) -> Tensor:
        """Task logits (B, K).

        Raises:
            ValueError: without a backbone.
        """
        if backbone is None:
            raise ValueError("EarlyRouter: looks at the backbone's features; give the backbone")
        with torch.no_grad():
            features = early_features(inputs, backbone, self.point)
        return self.head(self.standardise(features.to(self.standardise.running_mean.dtype)))


def make_router(config: Mapping[str, Any]) -> Router:
    """An untrained router from its `config`."""
    settings = dict(config)
    kinds = {kind.KIND: kind for kind in (ConvRouter, EarlyRouter)}
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"unknown kind of router {kind!r}; kinds: {', '.join(kinds)}")
    return kinds[kind](**settings)


def early_features(inputs: Inputs, backbone: Backbone, point: str) -> Tensor:
    """Mean, spread and maximum of a submodule's output over tokens or places: (B, 3·F).

    Args:
        inputs: a batch; nothing is computed for an empty one.
        backbone: the backbone; the rest of its pass, after the submodule, is left out.
        point: name of the submodule of `backbone.model`.

    Raises:
        ValueError: if there is no such submodule, it does not run, or its output is neither tokens nor maps.
    """
    try:
        layer = backbone.model.get_submodule(point)
    except AttributeError as error:
        near = ", ".join(name for name, _ in list(backbone.model.named_modules())[1:6])
        raise ValueError(f"router: the backbone has no submodule {point!r}; it has {near}, …") from error

    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(stop)
    try:
        backbone(inputs)
    except _Reached as reached:
        found = reached.output
    else:
        raise ValueError(f"router: the backbone's submodule {point!r} does not run in a forward pass")
    finally:
        handle.remove()
    if not isinstance(found, Tensor) or found.dim() not in (3, 4):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"router: {point!r} puts out {shape}; expected tokens (B, N, F) or maps (B, F, H, W)")
    tokens = found.flatten(2).transpose(1, 2) if found.dim() == 4 else found  # (B, N, F)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    tokens = tokens.float()
    if mask is None:
        count, largest = tokens.shape[1], tokens.amax(dim=1)
    else:
        kept = mask.to(tokens.dtype)[:, :, None]  # (B, N, 1)
        count, largest = kept.sum(dim=1).clamp(min=1), tokens.masked_fill(kept == 0, float("-inf")).amax(dim=1)
        tokens = tokens * kept
    mean, square = tokens.sum(dim=1) / count, tokens.square().sum(dim=1) / count  # many times as fast as `std`
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt(), largest], dim=1)


def feature_width(inputs: Inputs, backbone: Backbone, point: str) -> int:
    """F of `EarlyRouter`, by looking at a batch."""
    with torch.no_grad():
        return early_features(inputs, backbone, point).shape[1] // 3


def choose_threshold(logits: Tensor, share: float = 0.99) -> float:
    """The confidence below which a router abstains, from validation data.

    Args:
        logits: (N, K), of samples of the suite that the router was not trained on.
        share: share of these that must stay above the threshold.

    Returns:
        The largest such threshold of the most likely task's probability; 0 for a share of 1.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"the share of samples to route must be in (0, 1], got {share}")
    confidence = logits.float().softmax(dim=1).amax(dim=1).sort().values
    below = int((1 - share) * len(confidence) + 1e-9)
    return float(confidence[below]) if below > 0 else 0.0


class _Reached(Exception):
    """Carries an early output out of the forward pass."""

    def __init__(self, output: Any) -> None:
        super().__init__("reached")
        self.output = output
