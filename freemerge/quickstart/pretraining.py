"""The quickstart's pretraining task: instance discrimination, on data that no validation or test set uses.

A class is one character in any of the training fonts, one text in one font, or one region of a photograph. To
distinguish hundreds of instances, a backbone must learn strokes, their arrangement and textures, but none of the tasks.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

import numpy as np
import torch

from freemerge.data import Compose, GaussianNoise, RandomAffine, Task, derive_seed
from freemerge.quickstart.canvas import SIDE, Distortion, dataset, render
from freemerge.quickstart.glyph_tasks import SCRIPT_FONT, TRAIN_FONTS, script_characters, typeface_words
from freemerge.quickstart.glyphs import distinct_characters, draw_glyph, draw_text, shape, stack
from freemerge.quickstart.image_tasks import CROP
from freemerge.quickstart.photographs import PHOTOGRAPHS, Rectangle, cells, crop, random_rectangles

# Characters of no task (Greek, Cyrillic, mathematics). Drawn in several fonts, they teach invariance to the font.
EXTRA_RANGES = ((0x0391, 0x03C9), (0x0410, 0x044F), (0x2200, 0x22A5))

LETTERS = 15
EXTRA_CHARACTERS = 24
CHARACTERS_PER_SCRIPT = 6
TEXTS = 5
TEXT_FONTS = 8
REGIONS_PER_PHOTOGRAPH = 4
PER_CLASS = {"train": 44, "val": 2, "test": 2}


@dataclass(frozen=True)
class Source:
    """One class of drawings: a character (one line) or a text (two lines), in one of several fonts."""

    fonts: tuple[str, ...]
    lines: tuple[str, ...]

    def draw(self, rng: random.Random) -> np.ndarray:
        """Make a new drawing of the class.

        Args:
            rng: chooses the font and its size.

        Returns:
            uint8 (CANVAS, CANVAS).
        """
        font = rng.choice(self.fonts)
        if len(self.lines) == 1:
            return draw_glyph(font, self.lines[0], rng.randint(36, 50))
        return draw_text(font, self.lines, rng.randint(29, 33))


def _glyph_sources(rng: random.Random) -> dict[str, Source]:
    """Class name → source of its drawings, for characters and texts."""
    scripts = script_characters()
    held_out = {shape(SCRIPT_FONT, c) for splits in scripts.values() for c in splits["val"] + splits["test"]}
    letters = "".join(rng.sample(string.ascii_lowercase, LETTERS))
    latin, words = letters + letters.upper(), typeface_words()["train"]
    extra = distinct_characters(EXTRA_RANGES, taken=frozenset(held_out))
    sources: dict[str, Source] = {}
    for character in [*latin, *string.digits, *rng.sample(extra, EXTRA_CHARACTERS)]:
        # Computer Modern's fonts have other symbols at the code points of most non-Latin characters.
        families = TRAIN_FONTS if character.isascii() else [f for f in TRAIN_FONTS if "Modern" not in f]
        # In the scripts' font, an O may look exactly like a character of a script's test set.
        fonts = tuple(font for font in families if shape(font, character) not in held_out | {b""})
        sources[f"character {character}"] = Source(fonts, (character,))
    for splits in scripts.values():
        for character in rng.sample(splits["train"], min(CHARACTERS_PER_SCRIPT, len(splits["train"]))):
            sources[f"character {character}"] = Source((SCRIPT_FONT,), (character,))
    for _ in range(TEXTS):
        lines = tuple(rng.sample(words, 2))
        for font in rng.sample(TRAIN_FONTS, TEXT_FONTS):
            sources[f"text {' '.join(lines)} in {font}"] = Source((font,), lines)
    return sources


def _regions() -> dict[str, tuple[str, Rectangle]]:
    """Class name → (photograph, a cell that is not used by validation or test crops of `textures`)."""
    regions = {}
    for name in PHOTOGRAPHS:
        for number, region in enumerate(cells(name)["train"][:REGIONS_PER_PHOTOGRAPH]):
            regions[f"{name} {number}"] = (name, region)
    return regions


def build_pretraining(seed: int) -> Task:
    """Build the pretraining task: recognise a character, text or region; each is a class.

    Args:
        seed: the suite's seed.

    Returns:
        The task. Its val and test sets have other images of the same classes.
    """
    rng = random.Random(derive_seed(seed, "pretraining"))
    sources, regions = _glyph_sources(rng), _regions()
    names = (*sources, *regions)
    glyph = Distortion(degrees=12, scale=(0.8, 1.15), shift=0.07, shear=0.15)
    photo = Distortion(degrees=0, scale=(1, 1), shift=0, shear=0, noise=0.02, contrast=(0.85, 1.0), brightness=0.04)
    augment = Compose(RandomAffine(5, (0.92, 1.08), 0.05), GaussianNoise(0.03))
    sets = {}
    for split, count in PER_CLASS.items():
        drawn = stack([source.draw(rng) for source in sources.values() for _ in range(count)])
        crops = [
            crop(name, square, SIDE)
            for name, region in regions.values()
            for square in random_rectangles(name, [region], count, CROP, rng)
        ]
        images = [
            render(drawn, glyph, seed, "pretraining glyphs", split),
            render(torch.stack(crops), photo, seed, "pretraining photographs", split),
        ]
        labels = [label for label in range(len(names)) for _ in range(count)]
        sets[split] = dataset(torch.cat(images), labels, augment if split == "train" else None)
    return Task("pretraining", names, sets["train"], sets["val"], sets["test"])
