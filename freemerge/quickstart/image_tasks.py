"""The quickstart's tasks on photographs and handwriting: `digits`, `textures` and `faces`."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freemerge.data import Compose, GaussianNoise, RandomAffine, RandomContrast, RandomFlip, Task, derive_seed
from freemerge.quickstart.canvas import SIDE, Distortion, dataset, render
from freemerge.quickstart.photographs import Rectangle, cells, crop, packaged_file, random_rectangles

# Photographs of uniform content, so that any crop shows which photograph it comes from.
TEXTURES = (
    "brick",
    "grass",
    "gravel",
    "galaxies",
    "tissue",
    "motorcycle",
    "page",
    "handwriting",
    "retina",
)

CROP = 56
"""Side of a texture crop in pixels of the photograph, before it is downscaled."""


def _enlarge(originals: np.ndarray, side: int) -> Tensor:
    """float (N, h, w) in [0, 1] → uint8 (N, 1, side, side)."""
    images = torch.from_numpy(originals.astype(np.float32)).unsqueeze(1)
    images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def build_digits(seed: int) -> Task:
    """Build the task `digits`: recognise a handwritten digit.

    10 classes; the images are scikit-learn's 8×8 digits, enlarged, rotated and shifted.

    Args:
        seed: the suite's seed.

    Returns:
        The task.
    """
    from sklearn.datasets import load_digits  # imported here, because it takes a second

    data = load_digits()
    # With a border, a rotated digit stays inside the image.
    originals = F.pad(_enlarge(data.images / 16, 52), (6, 6, 6, 6))
    order = list(range(len(originals)))
    random.Random(derive_seed(seed, "digits")).shuffle(order)
    distortion = Distortion(degrees=22, scale=(0.75, 1.1), shift=0.08, shear=0.2)
    augment = Compose(RandomAffine(10, (0.9, 1.1), 0.06, 0.1), GaussianNoise(0.04))
    sets = {}
    for split, part in (("train", order[:1047]), ("val", order[1047:1297]), ("test", order[1297:])):
        images = render(originals[part], distortion, seed, "digits", split)
        sets[split] = dataset(images, data.target[part].tolist(), augment if split == "train" else None)
    return Task("digits", tuple(str(digit) for digit in range(10)), sets["train"], sets["val"], sets["test"])


def texture_rectangles(seed: int) -> dict[str, dict[str, list[Rectangle]]]:
    """The rectangles of the crops of `textures`.

    Args:
        seed: the suite's seed.

    Returns:
        split → photograph → rectangles; rectangles of different splits do not overlap.
    """
    rectangles: dict[str, dict[str, list[Rectangle]]] = {}
    for split, count in (("train", 240), ("val", 28), ("test", 56)):
        rectangles[split] = {}
        for name in TEXTURES:
            generator = random.Random(derive_seed(seed, "textures", name, split))
            rectangles[split][name] = random_rectangles(name, cells(name)[split], count, CROP, generator, 8.0)
    return rectangles


def build_textures(seed: int) -> Task:
    """Build the task `textures`: recognise the photograph that a crop comes from. 9 classes.

    Args:
        seed: the suite's seed.

    Returns:
        The task.
    """
    rectangles = texture_rectangles(seed)
    distortion = Distortion(0, (1, 1), shift=0, shear=0, noise=0.02, contrast=(0.85, 1.0), brightness=0.04)
    augment = Compose(RandomFlip(), RandomAffine(5, (1.0, 1.2), 0.05), RandomContrast((0.9, 1.1), 0.03))
    sets = {}
    for split, photographs in rectangles.items():
        crops = [crop(name, where, SIDE) for name, squares in photographs.items() for where in squares]
        labels = [label for label, squares in enumerate(photographs.values()) for _ in squares]
        images = render(torch.stack(crops), distortion, seed, "textures", split)
        sets[split] = dataset(images, labels, augment if split == "train" else None)
    return Task("textures", TEXTURES, sets["train"], sets["val"], sets["test"])


def _medallion() -> Tensor:
    """A circular mask, uint8 (SIDE, SIDE), that makes images of `faces` look different from crops of `textures`."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    return (axis[:, None] ** 2 + axis[None, :] ** 2 <= (SIDE / 2) ** 2).to(torch.uint8)


def face_parts(seed: int) -> dict[str, list[int]]:
    """Divide the 100 faces among the splits; the same division applies to the 100 images of other things.

    Args:
        seed: the suite's seed.

    Returns:
        split → indices below 100.
    """
    order = list(range(100))
    random.Random(derive_seed(seed, "faces")).shuffle(order)
    return {"train": order[:46], "val": order[46:60], "test": order[60:]}


def build_faces(seed: int) -> Task:
    """Build the task `faces`: recognise the orientation of a face, or that the image is not a face. 5 classes.

    All copies of an original (rotated, mirrored, distorted) are in the same split.

    Args:
        seed: the suite's seed.

    Returns:
        The task.
    """
    originals = np.load(packaged_file("skimage", "data", "lfw_subset.npy"))  # (200, 25, 25): 100 faces, 100 others
    originals = _enlarge(originals, 2 * SIDE)
    distortion = Distortion(degrees=12, scale=(1.0, 1.2), shift=0.04, shear=0.0)
    augment = Compose(RandomAffine(8, (0.95, 1.1), 0.06), RandomContrast((0.7, 1.2), 0.1), GaussianNoise(0.03))
    sets = {}
    for split, part in face_parts(seed).items():
        copies = 2 if split == "train" else 1
        chosen, labels = [], []
        for index in part:
            for label in range(5):
                # Other images are rotated at random; otherwise their upright shadows would reveal the class.
                turns, source = (label - 1, index) if label else (index % 4, index + 100)
                original = originals[source]
                chosen += [view.rot90(turns, (1, 2)) for view in (original, original.flip(2))] * copies
                labels += [label] * (2 * copies)
        images = render(torch.stack(chosen), distortion, seed, "faces", split) * _medallion()
        sets[split] = dataset(images, labels, augment if split == "train" else None)
    return Task(
        "faces",
        ("other", "upright", "turned left", "upside down", "turned right"),
        sets["train"],
        sets["val"],
        sets["test"],
    )
