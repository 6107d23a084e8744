"""Makes the quickstart's images from larger originals: distortion, downscaling, contrast, noise, quantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from freemerge.data import ArrayDataset, Augmentation, Compose, GaussianNoise, RandomAffine, RandomContrast, derive_seed

SIDE = 32
"""Side of an image in pixels."""

SPLIT_SEED = 0
"""The seed that divides characters, words and regions of photographs among the splits, whatever the suite's seed is:
the base that freemerge ships was pretrained on training parts only."""

# One normalisation for the whole suite, because one backbone is used for all tasks.
MEAN, STD = 0.3, 0.3


@dataclass(frozen=True)
class Distortion:
    """The ranges of the random distortions of an original.

    Args:
        degrees: rotation, uniform in ±degrees.
        scale: zoom, uniform in [low, high].
        shift: shift in x and y, uniform in ±shift of the side.
        shear: horizontal shear, uniform in ±shear.
        noise: standard deviation of the pixel noise on the scale [0, 1].
        contrast: factor of the contrast, uniform in [low, high].
        brightness: brightness, uniform in ±brightness.
    """

    degrees: float = 10.0
    scale: tuple[float, float] = (0.8, 1.1)
    shift: float = 0.06
    shear: float = 0.1
    noise: float = 0.04
    contrast: tuple[float, float] = (0.75, 1.0)
    brightness: float = 0.05


def render(originals: Tensor, distortion: Distortion, seed: int, *keys: object) -> Tensor:
    """Make one image of each original, with random distortions.

    Args:
        originals: uint8 (N, 1, H, W).
        distortion: the ranges of the distortions.
        seed: the suite's seed.
        *keys: keys of the random stream, such as a task and a split.

    Returns:
        uint8 (N, 1, SIDE, SIDE).
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "render", *keys))
    warp = RandomAffine(distortion.degrees, distortion.scale, distortion.shift, distortion.shear, generator)
    light = Compose(
        RandomContrast(distortion.contrast, distortion.brightness, generator),
        GaussianNoise(distortion.noise, generator),
    )
    parts = []
    for part in originals.split(1024):  # bounds the memory of the sampling grids
        images = warp(part.float() / 255)
        images = F.interpolate(images, (SIDE, SIDE), mode="area")
        parts.append((light(images) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def dataset(images: Tensor, labels: list[int], augment: Augmentation | None = None) -> ArrayDataset:
    """Make a dataset of the suite.

    Args:
        images: uint8 (N, 1, SIDE, SIDE).
        labels: N class indices.
        augment: augmentation; for training sets only.

    Returns:
        The dataset, with the suite's normalisation.
    """
    return ArrayDataset(images, torch.tensor(labels, dtype=torch.int64), MEAN, STD, augment)
