"""How positions and values become few bytes.

Positions: ascending, coded by their differences in base 255: a difference 255·q + r is q bytes of 255 followed by the
byte r, so that positions are the running sum of the bytes wherever the byte is not 255. At density 0.01 nearly all
differences fit one byte, which is within a few per cent of their entropy.

Values: `int8` or `int4` with one scale per part, `bf16`, or `float32`. Scales have 11 significant bits, so that decoded
values are exact and coding them again gives the same bytes.

In files both are deflated too: the bytes of small values and differences are more frequent than the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Encoding = Literal["int4", "int8", "bf16", "float32"]
ENCODINGS: tuple[Encoding, ...] = ("int4", "int8", "bf16", "float32")
_ESCAPE = 255
_LEVELS = {"int4": 7, "int8": 127}  # on either side of zero
# What part of the largest magnitude the last level stands for: with few levels it is better to cut off what is rare.
_CLIPS = {"int4": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), "int8": (1.0,)}
_SMALLEST = 2.0**-100  # below it a part counts as zeros: its scale would have fewer significant bits


def encode_positions(positions: Tensor) -> Tensor:
    """Ascending int64 positions (n,) → uint8 differences (≥ n,)."""
    gaps = positions.diff(prepend=positions.new_zeros(1))
    ends = (gaps // _ESCAPE + 1).cumsum(0)  # each difference is some bytes of 255 and one closing byte
    coded = torch.full((int(ends[-1]) if len(ends) else 0,), _ESCAPE, dtype=torch.uint8, device=positions.device)
    coded[ends - 1] = (gaps % _ESCAPE).to(torch.uint8)
    return coded


def decode_positions(coded: Tensor) -> Tensor:
    """uint8 differences → ascending int64 positions (n,)."""
    return coded.cumsum(0, dtype=torch.int64)[coded != _ESCAPE]


def encode_values(parts: Sequence[Tensor], encoding: str) -> tuple[Tensor, Tensor]:
    """Values of several parts → codes, laid end to end, and a scale for each part.

    Args:
        parts: P float tensors of any shapes.
        encoding: of the values, one of `ENCODINGS`.

    Returns:
        Codes (n,) of dtype int8 (for int4 too: from −7 to 7, whose frequencies make half bytes of them in a deflated
        file), bfloat16 or float32, and scales (P,) float32, all ones unless int8 or int4.

    Raises:
        ValueError: for an unknown encoding or values that are not finite.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"values must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    flat = [part.detach().reshape(-1).float() for part in parts]
    if not all(bool(part.isfinite().all()) for part in flat):
        raise ValueError("an expert's values must be finite; training it has diverged")
    device = flat[0].device if flat else None
    scales = torch.ones(len(flat), device=device)
    if encoding not in _LEVELS:
        dtype = torch.bfloat16 if encoding == "bf16" else torch.float32
        return torch.cat([part.to(dtype) for part in flat]), scales
    codes = []
    for index, part in enumerate(flat):
        largest = float(part.abs().max()) if part.numel() else 0.0
        if largest <= _SMALLEST:
            codes.append(torch.zeros_like(part, dtype=torch.int8))
            continue
        levels = _LEVELS[encoding]
        errors: list[tuple[float, int, float, Tensor]] = []
        for clip in _CLIPS[encoding]:
            scale = _short(clip * largest / levels)
            rounded = (part / scale).round_().clamp_(-levels, levels)
            errors.append((float((rounded * scale - part).square().sum()), len(errors), scale, rounded))
        _, _, scale, rounded = min(errors, key=lambda candidate: candidate[:2])
        scales[index] = scale
        codes.append(rounded.to(torch.int8))
    return torch.cat(codes), scales


def _short(scale: float) -> float:
    """Rounded up to 11 significant bits."""
    mantissa, exponent = np.frexp(scale)
    return float(np.ldexp(np.ceil(mantissa * 2048) / 2048, exponent))


def decode_values(codes: Tensor, scales: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of `encode_values`: P vectors float32 of these sizes."""
    chunks = codes.float().split(list(sizes))
    return [chunk * scale for chunk, scale in zip(chunks, scales, strict=True)]


def deflate(array: Tensor) -> Tensor:
    """A vector on the CPU → its bytes (m,) uint8, deflated.

    The first bytes of all elements come before all second bytes: the exponents of bfloat16 deflate well, its mantissas
    do not.
    """
    planes = array.contiguous().view(torch.uint8).view(-1, array.element_size()).T.contiguous().numpy().tobytes()
    candidates = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        candidates.append(coder.compress(planes) + coder.flush())
    return torch.from_numpy(np.frombuffer(min(candidates, key=len), dtype=np.uint8).copy())


def inflate(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `deflate`, as a vector of `dtype`.

    Raises:
        ValueError: if the bytes are damaged.
    """
    try:
        planes = zlib.decompress(packed.numpy().tobytes(), -15)
    except zlib.error as error:
        raise ValueError(f"damaged data ({error})") from error
    size = torch.empty(0, dtype=dtype).element_size()
    if len(planes) % size:
        raise ValueError(f"{len(planes)} bytes do not make whole values of {size} bytes")
    array = torch.from_numpy(np.frombuffer(planes, dtype=np.uint8).copy())
    return array.view(size, -1).T.contiguous().view(-1).view(dtype)
