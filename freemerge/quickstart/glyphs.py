"""Characters and words as pictures, from the fonts that ship inside matplotlib's wheel.

Everything is drawn white on black on a canvas twice the final size, so that the distortions which follow (see
`freemerge.data.augment`) can be made on it and then averaged down without jagged edges. Pillow's own layout engine is
used, because the other one (Raqm) is there on some machines only and would draw different pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from freemerge.quickstart.photographs import NotShipped

CANVAS = 64
"""Side of a canvas in pixels."""

# Fonts with the whole Latin alphabet, under the names that reports show.
FONTS: dict[str, str] = {
    "DejaVu Sans": "DejaVuSans",
    "DejaVu Sans Bold": "DejaVuSans-Bold",
    "DejaVu Sans Oblique": "DejaVuSans-Oblique",
    "DejaVu Sans Bold Oblique": "DejaVuSans-BoldOblique",
    "DejaVu Mono": "DejaVuSansMono",
    "DejaVu Mono Bold": "DejaVuSansMono-Bold",
    "DejaVu Mono Oblique": "DejaVuSansMono-Oblique",
    "DejaVu Mono Bold Oblique": "DejaVuSansMono-BoldOblique",
    "DejaVu Serif": "DejaVuSerif",
    "DejaVu Serif Bold": "DejaVuSerif-Bold",
    "DejaVu Serif Italic": "DejaVuSerif-Italic",
    "DejaVu Serif Bold Italic": "DejaVuSerif-BoldItalic",
    "STIX": "STIXGeneral",
    "STIX Bold": "STIXGeneralBol",
    "STIX Italic": "STIXGeneralItalic",
    "STIX Bold Italic": "STIXGeneralBolIta",
    "Computer Modern Roman": "cmr10",
    "Computer Modern Bold": "cmb10",
    "Computer Modern Sans": "cmss10",
    "Computer Modern Italic": "cmti10",
    "Computer Modern Typewriter": "cmtt10",
    "Computer Modern Math": "cmmi10",
}


def font_path(font: str) -> Path:
    """The file of a font.

    Args:
        font: A key of `FONTS`.

    Returns:
        Its path inside the installed matplotlib.

    Raises:
        NotShipped: If this matplotlib does not ship it.
    """
    import matplotlib  # here, because only those who draw glyphs should wait for it

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FONTS[font]}.ttf")
    if not path.is_file():
        raise NotShipped(f"matplotlib {matplotlib.__version__} does not ship {path}: reinstall matplotlib ≥ 3.8")
    return path


@lru_cache(maxsize=256)
def _load(font: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(font)), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=32)
def coverage(font: str) -> frozenset[int]:
    """The code points that a font has a glyph for.

    Args:
        font: A key of `FONTS`.

    Returns:
        The code points.
    """
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font_path(font))).get_charmap())


def draw_glyph(font: str, character: str, size: int = 40, limit: int = 54) -> np.ndarray:
    """One character, its ink centred.

    Args:
        font: A key of `FONTS`.
        character: What to draw; a short string works too.
        size: Font size in canvas pixels.
        limit: If the ink is wider or higher than this, the font is made smaller until it fits.

    Returns:
        uint8 (CANVAS, CANVAS), 255 is ink. All zero for a character without ink, such as a space.
    """
    face = _load(font, size)
    left, top, right, bottom = face.getbbox(character)
    extent = max(right - left, bottom - top)
    if extent > limit:
        face = _load(font, max(1, size * limit // extent))
        left, top, right, bottom = face.getbbox(character)
    canvas = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - (right - left)) // 2 - left, (CANVAS - (bottom - top)) // 2 - top)
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=face)
    return np.asarray(canvas)


def draw_grid(font: str, characters: Sequence[str]) -> np.ndarray:
    """Four characters, each centred in its quarter.

    Args:
        font: A key of `FONTS`.
        characters: Top left, top right, bottom left, bottom right.

    Returns:
        uint8 (CANVAS, CANVAS), 255 is ink.
    """
    # A glyph smaller than a quarter has nothing in the rows and columns that the roll wraps around.
    quarter = CANVAS // 4
    places = [(-quarter, -quarter), (-quarter, quarter), (quarter, -quarter), (quarter, quarter)]
    parts = [
        np.roll(draw_glyph(font, character, 30, 2 * quarter - 4), place, (0, 1))
        for character, place in zip(characters, places, strict=True)
    ]
    return np.maximum.reduce(parts)


def draw_text(font: str, lines: tuple[str, ...], size: int) -> np.ndarray:
    """Short lines of text, one under another, each centred.

    Args:
        font: A key of `FONTS`.
        lines: What to draw; what does not fit on the canvas is cut off.
        size: Font size in canvas pixels.

    Returns:
        uint8 (CANVAS, CANVAS), 255 is ink.
    """
    face = _load(font, size)
    canvas = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(canvas)
    pitch = CANVAS / len(lines)
    for number, line in enumerate(lines):
        # "mm": the anchor is the middle between ascender and descender, which does not depend on the letters.
        draw.text((CANVAS / 2, pitch * (number + 0.5)), line, fill=255, font=face, anchor="mm")
    return np.asarray(canvas)


@lru_cache(maxsize=4096)
def shape(font: str, character: str) -> bytes:
    """What a character looks like, for comparing.

    Args:
        font: A key of `FONTS`.
        character: The character.

    Returns:
        A hash of its picture; empty if it has no glyph or no ink.
    """
    if ord(character) not in coverage(font):
        return b""
    picture = draw_glyph(font, character)
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest() if picture.any() else b""


def distinct_characters(
    ranges: tuple[tuple[int, int], ...], font: str = "DejaVu Sans", taken: frozenset[bytes] = frozenset()
) -> tuple[str, ...]:
    """The characters of some Unicode ranges that look different from each other.

    Scripts contain the same shape several times (compatibility forms, characters that differ in meaning alone). A
    shape must not be in the training set under one code point and in the test set under another.

    Args:
        ranges: First and last code point of each range, both included.
        font: A key of `FONTS`.
        taken: Shapes (see `shape`) to leave out.

    Returns:
        Characters with a glyph of their own, in order, the first of each shape.
    """
    seen: dict[bytes, str] = {}
    for first, last in ranges:
        for code in range(first, last + 1):
            look = shape(font, chr(code))
            if look and look not in taken:
                seen.setdefault(look, chr(code))
    return tuple(seen.values())


def stack(pictures: list[np.ndarray]) -> Tensor:
    """Pictures as one tensor.

    Args:
        pictures: uint8 (H, W) each.

    Returns:
        uint8 (N, 1, H, W).
    """
    return torch.from_numpy(np.stack(pictures)).unsqueeze(1)
