"""Photographs that ship inside the wheels of scikit-image and scikit-learn, and crops of them from separate regions.

Files are read by path: scikit-image's own loaders may copy to a cache folder or download. A photograph is divided into
a grid of cells, and each cell belongs to one split; a crop lies inside one cell and keeps a margin from its border, so
crops of different splits never share a pixel nor a JPEG block's bleeding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from freemerge.data import derive_seed

# Name → (package, folder in it, file, whole-number reduction).
PHOTOGRAPHS: dict[str, tuple[str, str, str, int]] = {
    "astronaut": ("skimage", "data", "astronaut.png", 1),
    "brick": ("skimage", "data", "brick.png", 1),
    "camera": ("skimage", "data", "camera.png", 1),
    "cat": ("skimage", "data", "chelsea.png", 1),
    "coffee": ("skimage", "data", "coffee.png", 1),
    "coins": ("skimage", "data", "coins.png", 1),
    "grass": ("skimage", "data", "grass.png", 1),
    "gravel": ("skimage", "data", "gravel.png", 1),
    "galaxies": ("skimage", "data", "hubble_deep_field.jpg", 2),
    "tissue": ("skimage", "data", "ihc.png", 1),
    "moon": ("skimage", "data", "moon.png", 1),
    "motorcycle": ("skimage", "data", "motorcycle_left.png", 1),
    "page": ("skimage", "data", "page.png", 1),
    "retina": ("skimage", "data", "retina.jpg", 2),
    "rocket": ("skimage", "data", "rocket.jpg", 1),
    "handwriting": ("skimage", "data", "text.png", 1),
    "temple": ("sklearn", "datasets/images", "china.jpg", 1),
    "flower": ("sklearn", "datasets/images", "flower.jpg", 1),
}

Rectangle = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom are excluded."""

SPLITS = ("train", "val", "test")


class NotShipped(FileNotFoundError, ValueError):
    """A file of another package is not there; a ValueError, so that a command says so in one line."""


def packaged_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, found without importing the package.

    Args:
        package: Import name, such as "skimage".
        *parts: Path below the package's folder.

    Returns:
        Its path.

    Raises:
        NotShipped: If the package or the file is missing.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise NotShipped(
            f"{package} is not installed, and the quickstart takes pictures from its wheel: "
            f"pip install 'freemerge[quickstart]'"
        )
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise NotShipped(f"this version of {package} does not ship {path}: install the wheel from PyPI")
    return path


@lru_cache(maxsize=32)
def photograph(name: str) -> np.ndarray:
    """A photograph in grey.

    Args:
        name: A key of `PHOTOGRAPHS`.

    Returns:
        uint8 (H, W), read-only.
    """
    package, folder, file, reduction = PHOTOGRAPHS[name]
    with Image.open(packaged_file(package, folder, file)) as image:
        return np.asarray(image.convert("L").reduce(reduction))


def cells(
    name: str, seed: int, grid: int = 5, margin: int = 2, shares: Sequence[int] = (14, 4, 7)
) -> dict[str, list[Rectangle]]:
    """Divides a photograph into cells and deals them out to the splits.

    Args:
        name: A key of `PHOTOGRAPHS`.
        seed: Determines which cell goes where.
        grid: Cells per side.
        margin: Pixels left out along each side of each cell.
        shares: How many cells train, val and test get; their sum is grid².

    Returns:
        split → its rectangles.

    Raises:
        ValueError: If the shares do not add up.
    """
    if sum(shares) != grid * grid:
        raise ValueError(f"shares {tuple(shares)} must add up to {grid * grid} cells")
    height, width = photograph(name).shape
    xs = [width * i // grid for i in range(grid + 1)]
    ys = [height * i // grid for i in range(grid + 1)]
    every = [
        (xs[i] + margin, ys[j] + margin, xs[i + 1] - margin, ys[j + 1] - margin)
        for j in range(grid)
        for i in range(grid)
    ]
    random.Random(derive_seed(seed, "cells", name)).shuffle(every)
    ends = [sum(shares[: i + 1]) for i in range(3)]
    return {split: every[end - share : end] for split, share, end in zip(SPLITS, shares, ends, strict=True)}


def crop(name: str, rectangle: Rectangle, size: int) -> Tensor:
    """A part of a photograph, resized to a square.

    Args:
        name: A key of `PHOTOGRAPHS`.
        rectangle: Which part.
        size: Side of the result in pixels.

    Returns:
        uint8 (1, size, size).
    """
    left, top, right, bottom = rectangle
    pixels = torch.from_numpy(photograph(name)[top:bottom, left:right].astype(np.float32))
    if pixels.shape != (size, size):
        pixels = F.interpolate(pixels[None, None], (size, size), mode="bilinear", antialias=True)[0, 0]
    return pixels.round().clamp(0, 255).to(torch.uint8).unsqueeze(0)


def random_rectangles(
    name: str, within: Sequence[Rectangle], count: int, side: int, generator: random.Random, least_contrast: float = 0.0
) -> list[Rectangle]:
    """Squares at random places inside the given cells, taken from them in turn.

    Args:
        name: A key of `PHOTOGRAPHS`.
        within: Rectangles to stay inside, such as a split's cells.
        count: How many squares.
        side: Their side in pixels; in a cell too small for it, the largest square that fits.
        generator: Source of randomness.
        least_contrast: Squares whose grey values have a smaller standard deviation (0 to 255) are drawn again, up to
            thirty times: an evenly black square shows nothing of the photograph that it comes from.

    Returns:
        The squares.
    """
    picture = photograph(name)
    squares = []
    for number in range(count):
        for attempt in range(30):
            # A cell that has no contrast anywhere passes its turn to the next.
            left, top, right, bottom = within[(number + attempt // 5) % len(within)]
            fit = min(side, right - left, bottom - top)
            x, y = generator.randint(left, right - fit), generator.randint(top, bottom - fit)
            if picture[y : y + fit, x : x + fit].std() >= least_contrast:
                break
        squares.append((x, y, x + fit, y + fit))
    return squares
