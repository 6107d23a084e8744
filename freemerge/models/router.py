"""The router: which task does an input belong to?

R(x) → task logits (FREE-Merging, arXiv 2411.16815, section 4.2). It looks at the input alone, so that a sample is
routed before any expert is switched in, at a cost that vanishes beside a forward pass of the backbone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Router(nn.Module):
    """A small classifier of tasks on cheap features of the image.

    The features are local means of the pixels and of their horizontal and vertical gradients' magnitudes on a coarse
    grid: what is where, and how busy it is.

    Args:
        num_tasks: number of tasks K.
        channels: channels C of the images.
        grid: side of the coarse grid.
        hidden: width of the one hidden layer.
    """

    def __init__(self, num_tasks: int, channels: int, grid: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.config = {"num_tasks": num_tasks, "channels": channels, "grid": grid, "hidden": hidden}
        self.grid = grid
        num_features = 3 * channels * grid * grid
        self.head = nn.Sequential(
            nn.BatchNorm1d(num_features),  # standardises the features by the training data's statistics
            nn.Linear(num_features, hidden),
            nn.GELU(),
            nn.Linear(hidden, num_tasks),
        )

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 3·C·grid²)."""
        across = F.pad((images[..., 1:] - images[..., :-1]).abs(), (0, 1))
        down = F.pad((images[..., 1:, :] - images[..., :-1, :]).abs(), (0, 0, 0, 1))
        maps = torch.cat([images, across, down], dim=1)  # (B, 3C, H, W)
        return F.adaptive_avg_pool2d(maps, self.grid).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Task logits (B, K) of images (B, C, H, W)."""
        return self.head(self.features(images))
