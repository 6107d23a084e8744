"""The router: which task does an input belong to?

R(x) → task logits (FREE-Merging, arXiv 2411.16815, section 4.2). It looks at the input alone, so that a sample is
routed before any expert is switched in, at a small share of a forward pass of the backbone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """A small classifier of tasks: a linear head on cheap features of the image.

    The features are those of three strided convolutions, their mean and their maximum over all places: what kinds of
    edges and textures there are, wherever they are. Images of any size will do.

    Args:
        num_tasks: number of tasks K.
        channels: channels C of the images.
        width: channels of the first convolution; the others have twice as many.
    """

    def __init__(self, num_tasks: int, channels: int, width: int = 16) -> None:
        super().__init__()
        self.config = {"num_tasks": num_tasks, "channels": channels, "width": width}
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

    def forward(self, images: Tensor) -> Tensor:
        """Task logits (B, K) of images (B, C, H, W)."""
        return self.head(self.features(images))
