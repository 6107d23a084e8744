"""The quickstart's tasks on characters: `letters`, `scripts` and `typefaces`."""

from __future__ import annotations

import random
import string

from freemerge.data import Compose, GaussianNoise, RandomAffine, Task, derive_seed
from freemerge.quickstart.canvas import SPLIT_SEED, Distortion, dataset, render
from freemerge.quickstart.glyphs import FONTS, distinct_characters, draw_glyph, draw_grid, draw_text, shape, stack

# ---- letters: the fonts of each split. Every family has fonts in the training set, but no test font is among them.
VAL_FONTS = ("DejaVu Serif Italic", "DejaVu Mono Bold", "STIX Bold")
TEST_FONTS = (
    "DejaVu Sans Bold Oblique",
    "DejaVu Serif Bold",
    "STIX Bold Italic",
    "Computer Modern Bold",
    "Computer Modern Sans",
)
TRAIN_FONTS = tuple(font for font in FONTS if font not in VAL_FONTS + TEST_FONTS)

# ---- scripts and notations: Unicode ranges of DejaVu Sans whose characters stand alone and rarely look Latin.
SCRIPT_FONT = "DejaVu Sans"
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "Arabic": ((0x0621, 0x063A), (0x0641, 0x064A), (0x066E, 0x06D3)),
    "Braille": ((0x2801, 0x28FF),),
    "dominoes": ((0x1F030, 0x1F093),),
    "frames": ((0x2500, 0x257F),),
    "Georgian": ((0x10D0, 0x10F0), (0x10A0, 0x10C5)),
    "Hebrew": ((0x05D0, 0x05EA), (0xFB1D, 0xFB4F)),
    "hexagrams": ((0x4DC0, 0x4DFF),),
    "Lao": ((0x0E81, 0x0EAE), (0x0ED0, 0x0EDD)),
    "Ogham": ((0x1681, 0x169A),),
    "arrows": ((0x2190, 0x21FF),),
}

# ---- typefaces: upright and slanted, light and bold, with and without serifs.
TYPEFACES = (
    "DejaVu Sans",
    "DejaVu Sans Bold Oblique",
    "DejaVu Serif",
    "DejaVu Serif Bold",
    "STIX",
    "STIX Bold Italic",
    "Computer Modern Typewriter",
    "Computer Modern Italic",
)

_AUGMENT = Compose(RandomAffine(8, (0.9, 1.1), 0.06, 0.08), GaussianNoise(0.04))


def build_letters(seed: int) -> Task:
    """Build the task `letters`: recognise a capital letter. 26 classes; the test set has fonts of its own.

    Args:
        seed: the suite's seed.

    Returns:
        The task.
    """
    distortion = Distortion(degrees=12, scale=(0.8, 1.1), shift=0.07, shear=0.15)
    sets = {}
    for split, fonts, per_class in (("train", TRAIN_FONTS, 84), ("val", VAL_FONTS, 10), ("test", TEST_FONTS, 20)):
        drawn, labels = [], []
        for label, letter in enumerate(string.ascii_uppercase):
            drawn += [draw_glyph(fonts[number % len(fonts)], letter, size=50) for number in range(per_class)]
            labels += [label] * per_class
        images = render(stack(drawn), distortion, seed, "letters", split)
        sets[split] = dataset(images, labels, _AUGMENT if split == "train" else None)
    return Task("letters", tuple(string.ascii_uppercase), sets["train"], sets["val"], sets["test"])


def script_characters() -> dict[str, dict[str, tuple[str, ...]]]:
    """Divide the characters of each script among the splits, with `SPLIT_SEED`.

    Returns:
        script → split → characters; 60 % train, 20 % val, the rest test.
    """
    characters_of: dict[str, dict[str, tuple[str, ...]]] = {}
    taken: set[bytes] = set()  # a shape that occurs in two scripts belongs to the first
    for script, ranges in SCRIPTS.items():
        characters = list(distinct_characters(ranges, SCRIPT_FONT, frozenset(taken)))
        taken |= {shape(SCRIPT_FONT, character) for character in characters}
        random.Random(derive_seed(SPLIT_SEED, "scripts", script)).shuffle(characters)
        first, second = len(characters) * 60 // 100, len(characters) * 80 // 100
        characters_of[script] = {
            "train": tuple(characters[:first]),
            "val": tuple(characters[first:second]),
            "test": tuple(characters[second:]),
        }
    return characters_of


def build_scripts(seed: int) -> Task:
    """Build the task `scripts`: recognise the script of four characters.

    10 classes; the test set has characters of its own.

    Args:
        seed: the suite's seed.

    Returns:
        The task.
    """
    distortion = Distortion(degrees=6, scale=(0.9, 1.1), shift=0.05, shear=0.08)
    characters_of = script_characters()
    sets = {}
    for split, per_class in (("train", 200), ("val", 25), ("test", 50)):
        generator = random.Random(derive_seed(seed, "scripts", split))
        drawn, labels = [], []
        for label, script in enumerate(SCRIPTS):
            drawn += [
                draw_grid(SCRIPT_FONT, generator.sample(characters_of[script][split], 4)) for _ in range(per_class)
            ]
            labels += [label] * per_class
        images = render(stack(drawn), distortion, seed, "scripts", split)
        sets[split] = dataset(images, labels, _AUGMENT if split == "train" else None)
    return Task("scripts", tuple(SCRIPTS), sets["train"], sets["val"], sets["test"])


def typeface_words() -> dict[str, tuple[str, ...]]:
    """Make up the words of `typefaces` and divide them among the splits, with `SPLIT_SEED`.

    Returns:
        split → words of three upper- or lower-case letters; ignoring case, each word is in one split only.
    """
    generator = random.Random(derive_seed(SPLIT_SEED, "typefaces"))
    words = [a + b + c for a in string.ascii_lowercase for b in string.ascii_lowercase for c in string.ascii_lowercase]
    generator.shuffle(words)
    cased = ["".join(generator.choice((c, c.upper())) for c in word) for word in words[:3000]]
    return {"train": tuple(cased[:2000]), "val": tuple(cased[2000:2400]), "test": tuple(cased[2400:])}


def build_typefaces(seed: int) -> Task:
    """Build the task `typefaces`: recognise the typeface of two words. 8 classes; the test set has words of its own.

    Args:
        seed: the suite's seed.

    Returns:
        The task.
    """
    distortion = Distortion(degrees=3, scale=(0.9, 1.1), shift=0.05, shear=0.0)
    augment = Compose(RandomAffine(2, (0.95, 1.05), 0.06), GaussianNoise(0.03))
    words = typeface_words()
    sets = {}
    for split, per_class in (("train", 260), ("val", 30), ("test", 60)):
        generator = random.Random(derive_seed(seed, "typefaces", split))
        drawn, labels = [], []
        for label, font in enumerate(TYPEFACES):
            for _ in range(per_class):
                lines = tuple(generator.sample(words[split], 2))
                drawn.append(draw_text(font, lines, generator.randint(29, 33)))
                labels.append(label)
        images = render(stack(drawn), distortion, seed, "typefaces", split)
        sets[split] = dataset(images, labels, augment if split == "train" else None)
    return Task("typefaces", TYPEFACES, sets["train"], sets["val"], sets["test"])
