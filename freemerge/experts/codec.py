"""Encoding of an expert's positions and values in few bytes.

Positions are ascending and stored as differences in base 255: a difference 255·q + r is q bytes of 255 followed by the
byte r. The positions are the cumulative sum of the bytes at every byte other than 255. At density 0.01 nearly all
differences fit into one byte, and the size is within a few per cent of their entropy.

Values are stored as `int8` or `int4` with one scale per part, as `bf16`, or as `float32`. Scales have 11 significant
bits, so decoded values are exact products and encoding them again gives the same bytes.

Files deflate both, because small values and differences are more frequent than large ones. The code of positions is
our own because the indices of torch's sparse tensors take eight bytes each.
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
_LEVELS = {"int4": 7, "int8": 127}  # largest code
# Candidates for the fraction of the largest magnitude that the largest code represents: with few levels, clipping rare
# large values reduces the total error.
_CLIPS = {"int4": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), "int8": (1.0,)}
_SMALLEST = 2.0**-100  # parts with smaller values are stored as zeros: a scale would lose significant bits


def encode_positions(positions: Tensor) -> Tensor:
    """Encode positions as differences.

    Args:
        positions: (n,) int64, ascending.

    Returns:
        (m,) uint8 with m ≥ n.
    """
    gaps = positions.diff(prepend=positions.new_zeros(1))
    ends = (gaps // _ESCAPE + 1).cumsum(0)  # a difference is any number of bytes 255 and one final byte
    coded = torch.full((int(ends[-1]) if len(ends) else 0,), _ESCAPE, dtype=torch.uint8, device=positions.device)
    coded[ends - 1] = (gaps % _ESCAPE).to(torch.uint8)
    return coded


def decode_positions(coded: Tensor) -> Tensor:
    """Decode the result of `encode_positions`.

    Args:
        coded: (m,) uint8.

    Returns:
        (n,) int64, ascending.
    """
    return coded.cumsum(0, dtype=torch.int64)[coded != _ESCAPE]


def encode_values(parts: Sequence[Tensor], encoding: str) -> tuple[Tensor, Tensor]:
    """Encode the values of several parts: part ≈ codes · scale.

    Args:
        parts: P floating-point tensors of any shape.
        encoding: one of `ENCODINGS`.

    Returns:
        The concatenated codes (n,), and scales (P,) float32, which are 1 for `bf16` and `float32`. Codes are int8 for
        `int8` and `int4` (−7 to 7, which deflating reduces to about half a byte each), bfloat16 or float32.

    Raises:
        ValueError: if the encoding is unknown or a value is not finite.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"the encoding of values must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    flat = [part.detach().reshape(-1).float() for part in parts]
    if not all(bool(part.isfinite().all()) for part in flat):
        raise ValueError("an expert's values must be finite; its training diverged")
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
            scale = _round_up(clip * largest / levels)
            rounded = (part / scale).round_().clamp_(-levels, levels)
            errors.append((float((rounded * scale - part).square().sum()), len(errors), scale, rounded))
        _, _, scale, rounded = min(errors, key=lambda candidate: candidate[:2])
        scales[index] = scale
        codes.append(rounded.to(torch.int8))
    return torch.cat(codes), scales


def _round_up(scale: float) -> float:
    """A scale rounded up to 11 significant bits."""
    mantissa, exponent = np.frexp(scale)
    return float(np.ldexp(np.ceil(mantissa * 2048) / 2048, exponent))


def decode_values(codes: Tensor, scales: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Decode the result of `encode_values`.

    Args:
        codes: (n,), the concatenated codes.
        scales: (P,) float32.
        sizes: number of values of each of the P parts.

    Returns:
        P vectors float32 of these sizes.
    """
    chunks = codes.float().split(list(sizes))
    return [chunk * scale for chunk, scale in zip(chunks, scales, strict=True)]


def deflate(array: Tensor) -> Tensor:
    """Compress a vector with zlib.

    The first bytes of all elements precede all second bytes, because the exponents of bfloat16 compress well and its
    mantissas do not.

    Args:
        array: (n,) of any dtype, on the CPU.

    Returns:
        The compressed bytes (m,) uint8.
    """
    planes = array.contiguous().view(torch.uint8).view(-1, array.element_size()).T.contiguous().numpy().tobytes()
    candidates = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        candidates.append(coder.compress(planes) + coder.flush())
    return torch.from_numpy(np.frombuffer(min(candidates, key=len), dtype=np.uint8).copy())


def inflate(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Decompress the result of `deflate`.

    Args:
        packed: (m,) uint8, on the CPU.
        dtype: dtype of the vector.

    Returns:
        (n,) of this dtype.

    Raises:
        ValueError: if the bytes are damaged.
    """
    try:
        planes = zlib.decompress(packed.numpy().tobytes(), -15)
    except zlib.error as error:
        raise ValueError(f"damaged data ({error})") from error
    size = torch.empty(0, dtype=dtype).element_size()
    if len(planes) % size:
        raise ValueError(f"{len(planes)} bytes are no multiple of the value size of {size} bytes")
    array = torch.from_numpy(np.frombuffer(planes, dtype=np.uint8).copy())
    return array.view(size, -1).T.contiguous().view(-1).view(dtype)
