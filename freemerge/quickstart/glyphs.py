"""Drawings of characters and words, with the fonts in matplotlib's wheel.

Everything is drawn white on black on a canvas of twice the final size, so that images can be distorted (see
`freemerge.data.augment`) and then downscaled without jagged edges. Pillow's basic layout engine is used, because the
other one, Raqm, is only available on some machines and draws differently.
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

# Fonts with the complete Latin alphabet: name in reports → name of the file.
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
    """Find the file of a font.

    Args:
        font: a key of `FONTS`.

    Returns:
        Its path inside the installed matplotlib.

    Raises:
        NotShipped: if this matplotlib does not ship it.
    """
    import matplotlib  # slow to import, and only needed for drawing

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FONTS[font]}.ttf")
    if not path.is_file():
        raise NotShipped(
            f"matplotlib {matplotlib.__version__} does not ship {path.name}, one of the quickstart's fonts: "
            f"pip install 'freemerge[quickstart]' (matplotlib ≥ 3.11)"
        )
    return path


@lru_cache(maxsize=256)
def _load(font: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(font)), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=32)
def coverage(font: str) -> frozenset[int]:
    """The code points that a font has a glyph for.

    Args:
        font: a key of `FONTS`.

    Returns:
        The code points.
    """
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font_path(font))).get_charmap())


def draw_glyph(font: str, character: str, size: int = 40, limit: int = 54) -> np.ndarray:
    """Draw one character in the centre of a canvas.

    Args:
        font: a key of `FONTS`.
        character: the character; a short string is possible too.
        size: font size in canvas pixels.
        limit: maximum width and height in canvas pixels; larger characters are drawn in a smaller font size.

    Returns:
        uint8 (CANVAS, CANVAS), 255 is ink; all zeros for a character without ink, such as a space.
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
    """Draw four characters, each in the centre of a quarter of the canvas.

    Args:
        font: a key of `FONTS`.
        characters: top left, top right, bottom left, bottom right.

    Returns:
        uint8 (CANVAS, CANVAS), 255 is ink.
    """
    # The rows and columns that the roll wraps around are empty, because a glyph is smaller than a quarter.
    quarter = CANVAS // 4
    offsets = [(-quarter, -quarter), (-quarter, quarter), (quarter, -quarter), (quarter, quarter)]
    parts = [
        np.roll(draw_glyph(font, character, 30, 2 * quarter - 4), offset, (0, 1))
        for character, offset in zip(characters, offsets, strict=True)
    ]
    return np.maximum.reduce(parts)


def draw_text(font: str, lines: tuple[str, ...], size: int) -> np.ndarray:
    """Draw short lines of text below each other, each centred.

    Args:
        font: a key of `FONTS`.
        lines: the lines; parts outside of the canvas are cut off.
        size: font size in canvas pixels.

    Returns:
        uint8 (CANVAS, CANVAS), 255 is ink.
    """
    face = _load(font, size)
    canvas = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(canvas)
    pitch = CANVAS / len(lines)
    for number, line in enumerate(lines):
        # "mm" anchors the middle between ascender and descender, which is the same for all letters.
        draw.text((CANVAS / 2, pitch * (number + 0.5)), line, fill=255, font=face, anchor="mm")
    return np.asarray(canvas)


@lru_cache(maxsize=4096)
def shape(font: str, character: str) -> bytes:
    """A hash of a character's shape, for comparisons.

    Args:
        font: a key of `FONTS`.
        character: the character.

    Returns:
        A hash of its drawing; empty if the character has no glyph or no ink.
    """
    if ord(character) not in coverage(font):
        return b""
    drawing = draw_glyph(font, character)
    return hashlib.blake2b(drawing.tobytes(), digest_size=16).digest() if drawing.any() else b""


def distinct_characters(
    ranges: tuple[tuple[int, int], ...], font: str = "DejaVu Sans", taken: frozenset[bytes] = frozenset()
) -> tuple[str, ...]:
    """The characters of Unicode ranges, without those that look like another one.

    A script can contain a shape several times (compatibility forms, characters that differ only in meaning). The same
    shape must not be in the training set under one code point and in the test set under another.

    Args:
        ranges: first and last code point of each range, both included.
        font: a key of `FONTS`.
        taken: shapes to skip; see `shape`.

    Returns:
        The first character of each shape, in order.
    """
    seen: dict[bytes, str] = {}
    for first, last in ranges:
        for code in range(first, last + 1):
            look = shape(font, chr(code))
            if look and look not in taken:
                seen.setdefault(look, chr(code))
    return tuple(seen.values())


def stack(drawings: list[np.ndarray]) -> Tensor:
    """Stack drawings in one tensor.

    Args:
        drawings: uint8 (H, W) each.

    Returns:
        uint8 (N, 1, H, W).
    """
    return torch.from_numpy(np.stack(drawings)).unsqueeze(1)
