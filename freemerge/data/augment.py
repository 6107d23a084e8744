"""Random augmentations of whole batches, on the CPU, in a few tensor operations.

Each is a callable of float32 images (B, C, H, W) in [0, 1] that returns images of the same shape and range. Random
numbers come from `generator`, or from torch's global generator if it is None: training is then reproducible under
`seed_everything`, and each `DataLoader` worker draws numbers of its own, because torch seeds workers differently.

Transforms of `torchvision.transforms.v2` can be used as well (`freemerge.data.transforms`). These classes stay because
the quickstart's images are made with them, and because they process a whole batch at once, where torchvision draws one
set of random parameters per call and must be applied to one image at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from freemerge.data.arrays import Augmentation
from freemerge.data.transforms import batched


class Compose:
    """Applies several augmentations in order.

    Args:
        *steps: batched augmentations or transforms of torchvision.
    """

    def __init__(self, *steps: Augmentation) -> None:
        self.steps = tuple(map(batched, steps))

    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, C, H, W) in [0, 1] → the output of the last step."""
        for step in self.steps:
            images = step(images)
        return images


class RandomAffine:
    """Rotates, scales, shears and shifts each image by its own random amount (bilinear; edge pixels are repeated).

    Args:
        degrees: the rotation is uniform in ±degrees.
        scale: the zoom factor is uniform in [low, high]; above 1 enlarges.
        shift: the shift in x and y is uniform in ±shift, as a fraction of the side.
        shear: the horizontal shear is uniform in ±shear (1 is 45°).
        generator: source of random numbers; None is torch's global generator.

    Raises:
        ValueError: if `scale` is not a pair 0 < low ≤ high.
    """

    def __init__(
        self,
        degrees: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        shift: float = 0.0,
        shear: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be (low, high) with 0 < low ≤ high, got {scale}")
        self.degrees = degrees
        self.scale = scale
        self.shift = shift
        self.shear = shear
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, C, H, W) → float32 (B, C, H, W)."""
        n = len(images)
        angle, zoom, shear, shift_x, shift_y = torch.rand(5, n, generator=self.generator) * 2 - 1
        angle = angle * math.radians(self.degrees)
        low, high = self.scale
        # affine_grid maps output coordinates to input coordinates, hence the reciprocal of the zoom.
        zoom = 1 / ((high + low) / 2 + (high - low) / 2 * zoom)
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        shear = shear * self.shear
        # Grid coordinates span [-1, 1], so a fraction of the side is twice that number in grid units.
        top = torch.stack([cos, shear * cos - sin, shift_x * 2 * self.shift], dim=1)
        bottom = torch.stack([sin, shear * sin + cos, shift_y * 2 * self.shift], dim=1)
        theta = torch.stack([top, bottom], dim=1)  # (B, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (B, H, W, 2)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class RandomFlip:
    """Mirrors each image left to right, and optionally top to bottom, each with probability 1/2.

    Args:
        vertical: whether to flip top to bottom as well.
        generator: source of random numbers; None is torch's global generator.
    """

    def __init__(self, vertical: bool = False, generator: torch.Generator | None = None) -> None:
        self.vertical = vertical
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        dims = (3, 2) if self.vertical else (3,)
        for dim in dims:
            chosen = torch.rand(len(images), 1, 1, 1, generator=self.generator) < 0.5
            images = torch.where(chosen, images.flip(dim), images)
        return images


class RandomContrast:
    """Scales each image's contrast around its mean value, then shifts its brightness; clamps to [0, 1].

    Args:
        contrast: the contrast factor is uniform in [low, high].
        brightness: the brightness shift is uniform in ±brightness.
        generator: source of random numbers; None is torch's global generator.
    """

    def __init__(
        self,
        contrast: tuple[float, float] = (1.0, 1.0),
        brightness: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.contrast = contrast
        self.brightness = brightness
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, C, H, W) in [0, 1] → float32 (B, C, H, W) in [0, 1]."""
        low, high = self.contrast
        factor, offset = torch.rand(2, len(images), 1, 1, 1, generator=self.generator)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        shifted = mean + (offset * 2 - 1) * self.brightness
        return ((images - mean) * (low + (high - low) * factor) + shifted).clamp_(0, 1)


class GaussianNoise:
    """Adds independent Gaussian noise to every pixel value; clamps to [0, 1].

    Args:
        std: standard deviation of the noise on the scale [0, 1].
        generator: source of random numbers; None is torch's global generator.
    """

    def __init__(self, std: float, generator: torch.Generator | None = None) -> None:
        self.std = std
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, C, H, W) in [0, 1] → float32 (B, C, H, W) in [0, 1]."""
        noise = torch.randn(images.shape, generator=self.generator)
        return noise.mul_(self.std).add_(images).clamp_(0, 1)
