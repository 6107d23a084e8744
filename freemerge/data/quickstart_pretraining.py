"""The quickstart's pretraining task: instances as classes, from nothing that a validation or test set uses.

A class is one character, in any of the training fonts and distorted, or one region of a photograph. To tell hundreds
of instances apart, a backbone must learn strokes, their arrangement and textures; it learns none of the tasks.
"""

from __future__ import annotations

import random

import torch

from freemerge.data.augment import Compose, GaussianNoise, RandomAffine
from freemerge.data.canvas import SIDE, Distortion, dataset, render
from freemerge.data.glyphs import coverage, distinct_characters, draw_glyph, stack
from freemerge.data.loaders import derive_seed
from freemerge.data.photographs import PHOTOGRAPHS, cells, crop, random_rectangles
from freemerge.data.quickstart_glyphs import TRAIN_FONTS, script_characters
from freemerge.data.quickstart_pictures import CROP, TEXTURES
from freemerge.data.tasks import Task

# Characters that belong to no task: drawn in several fonts, they teach what a font may change.
EXTRA_RANGES = ((0x0391, 0x03C9), (0x0410, 0x044F), (0x2200, 0x22A5), (0x25A0, 0x25FF))

EXTRA_CHARACTERS = 120
CHARACTERS_PER_SCRIPT = 10
REGIONS_PER_PHOTOGRAPH = 7
PER_CLASS = {"train": 36, "val": 2, "test": 2}


def build_pretraining(seed: int) -> Task:
    """Which character or which region: one class each.

    Args:
        seed: The suite's seed.

    Returns:
        The task. Its own val and test sets are further images of the same classes.
    """
    rng = random.Random(derive_seed(seed, "pretraining"))
    names, sources = [], []  # a source is a list of (font, character) or of (photograph, region)
    extra = sorted({c for first, last in EXTRA_RANGES for c in distinct_characters(first, last)})
    for character in rng.sample(extra, EXTRA_CHARACTERS):
        fonts = [font for font in TRAIN_FONTS if ord(character) in coverage(font) and "Modern" not in font]
        names.append(f"U+{ord(character):04X}")
        sources.append([(font, character) for font in fonts])
    for dealt in script_characters(seed).values():
        for character in rng.sample(dealt["train"], min(CHARACTERS_PER_SCRIPT, len(dealt["train"]))):
            names.append(f"U+{ord(character):04X}")
            sources.append([("DejaVu Sans", character)])
    regions = []
    for name in PHOTOGRAPHS:
        # Only photographs outside `textures` may be used in full.
        parts = cells(name, seed)
        usable = parts["train"] if name in TEXTURES else parts["train"] + parts["val"] + parts["test"]
        for number, region in enumerate(usable[:REGIONS_PER_PHOTOGRAPH]):
            names.append(f"{name} {number}")
            regions.append((name, region))

    glyph = Distortion(degrees=14, scale=(0.75, 1.15), shift=0.08, shear=0.15, noise=0.08)
    photo = Distortion(degrees=0, scale=(1, 1), shift=0, shear=0, noise=0.02, contrast=(0.7, 1.0), brightness=0.1)
    sets = {}
    for split, count in PER_CLASS.items():
        drawn = [draw_glyph(*rng.choice(source)) for source in sources for _ in range(count)]
        images = [render(stack(drawn), glyph, seed, "pretraining glyphs", split)]
        crops = [
            crop(name, square, SIDE)
            for name, region in regions
            for square in random_rectangles(name, [region], count, CROP, rng)
        ]
        images.append(render(torch.stack(crops), photo, seed, "pretraining photographs", split))
        labels = [label for label in range(len(names)) for _ in range(count)]
        augment = Compose(RandomAffine(6, (0.9, 1.1), 0.05), GaussianNoise(0.03)) if split == "train" else None
        sets[split] = dataset(torch.cat(images), labels, augment)
    return Task("pretraining", tuple(names), **sets)
