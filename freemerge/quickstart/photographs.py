"""Photographs from the wheels of scikit-image and scikit-learn, and crops of separate regions of them.

Files are read by path, because scikit-image's loaders may download files or copy them to a cache folder. A photograph
is divided into a grid of cells, and each cell belongs to one split. A crop lies inside one cell with a margin from its
border, so that crops of different splits share no pixels and no artefacts of JPEG blocks.
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
from freemerge.quickstart.canvas import SPLIT_SEED

# Name → (package, folder in it, file, integer downscaling factor).
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
    """A file of another package is missing. It is a ValueError too, so that commands report it in one line."""


def packaged_file(package: str, *parts: str) -> Path:
    """Find a file in an installed package without importing the package.

    Args:
        package: import name, such as "skimage".
        *parts: path below the package's folder.

    Returns:
        Its path.

    Raises:
        NotShipped: if the package or the file is missing.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise NotShipped(
            f"{package} is not installed, but the quickstart uses images in its wheel: "
            f"pip install 'freemerge[quickstart]'"
        )
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise NotShipped(f"this version of {package} does not ship {path}: install the wheel from PyPI")
    return path


@lru_cache(maxsize=32)
def photograph(name: str) -> np.ndarray:
    """Load a photograph in grey.

    Args:
        name: a key of `PHOTOGRAPHS`.

    Returns:
        uint8 (H, W), read-only.
    """
    package, folder, file, reduction = PHOTOGRAPHS[name]
    with Image.open(packaged_file(package, folder, file)) as image:
        return np.asarray(image.convert("L").reduce(reduction))


def cells(name: str, grid: int = 5, margin: int = 2, counts: Sequence[int] = (14, 4, 7)) -> dict[str, list[Rectangle]]:
    """Divide a photograph into cells, and the cells among the splits, with `SPLIT_SEED`.

    Args:
        name: a key of `PHOTOGRAPHS`.
        grid: cells per side.
        margin: unused pixels along each side of a cell.
        counts: the numbers of cells of train, val and test; their sum must be grid².

    Returns:
        split → rectangles of its cells.

    Raises:
        ValueError: if the counts do not add up.
    """
    if sum(counts) != grid * grid:
        raise ValueError(f"counts {tuple(counts)} must add up to {grid * grid} cells")
    height, width = photograph(name).shape
    xs = [width * i // grid for i in range(grid + 1)]
    ys = [height * i // grid for i in range(grid + 1)]
    every = [
        (xs[i] + margin, ys[j] + margin, xs[i + 1] - margin, ys[j + 1] - margin)
        for j in range(grid)
        for i in range(grid)
    ]
    random.Random(derive_seed(SPLIT_SEED, "cells", name)).shuffle(every)
    ends = [sum(counts[: i + 1]) for i in range(3)]
    return {split: every[end - count : end] for split, count, end in zip(SPLITS, counts, ends, strict=True)}


def crop(name: str, rectangle: Rectangle, size: int) -> Tensor:
    """Crop a photograph, and resize the crop to a square.

    Args:
        name: a key of `PHOTOGRAPHS`.
        rectangle: the part to crop.
        size: side of the result in pixels.

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
    """Draw squares at random positions inside the given rectangles, which are used in turn.

    Args:
        name: a key of `PHOTOGRAPHS`.
        within: the rectangles, such as a split's cells.
        count: the number of squares.
        side: their side in pixels; in a smaller rectangle, the largest square that fits is used.
        generator: source of random numbers.
        least_contrast: squares whose grey values have a smaller standard deviation (0 to 255) are drawn again, up to 30
            times, because a uniform square could come from any photograph.

    Returns:
        The squares.
    """
    image = photograph(name)
    squares = []
    for number in range(count):
        for attempt in range(30):
            # After five attempts in a rectangle without contrast, the next one is used.
            left, top, right, bottom = within[(number + attempt // 5) % len(within)]
            fit = min(side, right - left, bottom - top)
            x, y = generator.randint(left, right - fit), generator.randint(top, bottom - fit)
            if image[y : y + fit, x : x + fit].std() >= least_contrast:
                break
        squares.append((x, y, x + fit, y + fit))
    return squares
