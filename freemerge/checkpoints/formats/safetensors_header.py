"""Parse and validate the header of a safetensors file.

A damaged header must not be read silently as a different one. The format's requirements are checked in full: every
entry has its three fields, sizes agree with shapes and dtypes, and the tensors fill the rest of the file without gaps
and overlaps. Damage to a name, or to a dtype of the same width, still gives a valid header; files written here carry a
digest of the header to detect it.

Other tools that change and re-save a file keep its metadata, including a digest and checksums that no longer match.
Their headers lack the space after the first brace that marks ours, so the digest and the checksums are used only in a
header that has this mark.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from freemerge.checkpoints.checkpoint import TensorSpec
from freemerge.checkpoints.writing.checksums import KEY as SUMS

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DIGEST = "freemerge.table"  # metadata: the digest of the header
MARK = b'{ "__metadata__":'  # the start of our own headers; JSON readers ignore the space

_LARGEST = 2**63 - 1  # bytes of a tensor, as torch counts them


class Header(NamedTuple):
    """The contents of a safetensors file, in the order of the data."""

    specs: dict[str, TensorSpec]
    # positions of the first byte and of the byte after the last, relative to the start of the data
    places: dict[str, tuple[int, int]]
    metadata: dict[str, str]


def parse_header(text: bytes, size: int) -> Header:
    """Parse a header.

    Args:
        text: the JSON of the header.
        size: bytes of data after the header.

    Returns:
        The contents; without digest and checksums if another tool wrote the header.

    Raises:
        ValueError: the header is invalid. The message starts with "truncated" if the only fault is that data are
            missing.
    """
    table = _load(text)
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a table of strings")
    entries = {name: _parse_entry(name, entry) for name, entry in table.items()}
    ordered = sorted(entries, key=lambda name: entries[name][1])
    specs = {name: entries[name][0] for name in ordered}
    places = {name: entries[name][1] for name in ordered}
    end = 0
    for name, (begin, stop) in places.items():
        if begin != end:
            raise ValueError(f"the tensor '{name}' begins at byte {begin:,} of the data, expected at {end:,}")
        end = stop
    if not text.startswith(MARK):
        metadata = {key: value for key, value in metadata.items() if key not in (DIGEST, SUMS)}
    elif DIGEST in metadata and metadata[DIGEST] != digest_table(specs, metadata):
        raise ValueError("its header was changed after it was written")
    if end > size:
        raise ValueError(f"truncated: its header promises {end:,} bytes of data and the file has {size:,}")
    if end < size:
        raise ValueError(f"its header accounts for {end:,} bytes of data and the file has {size:,}")
    return Header(specs, places, metadata)


def digest_table(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> str:
    """A digest of names, dtypes and shapes in the order of the data, and of the metadata: 16 hexadecimal digits.

    Args:
        specs: shape and dtype of the tensors, in the order of the data.
        metadata: the strings of the header; the digest's own entry and the checksums are excluded.
    """
    entries = [[name, str(spec.dtype), list(spec.shape)] for name, spec in specs.items()]
    notes = sorted((key, value) for key, value in metadata.items() if key not in (DIGEST, SUMS))
    return hashlib.sha256(json.dumps([entries, notes]).encode()).hexdigest()[:16]


def _load(text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("its header is not JSON") from None
    except ValueError as error:
        raise ValueError(str(error) if "twice" in str(error) else "its header is not JSON") from None
    if not isinstance(table, dict):
        raise ValueError("its header is not a table")
    return table


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name in table if counts[name] > 1)
        raise ValueError(f"its header has '{repeated}' twice")
    return table


def _parse_entry(name: str, entry: object) -> tuple[TensorSpec, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header is malformed at '{name}': expected dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and isinstance(code, str)):
        raise ValueError(f"its header is malformed at '{name}': shape {shape!r}, data_offsets {offsets!r}")
    if code not in DTYPES:
        raise ValueError(f"the tensor '{name}' has the dtype {code}, which is not supported")
    spec = TensorSpec(tuple(shape), DTYPES[code])
    if offsets[1] - offsets[0] != _bytes(shape, spec.dtype.itemsize):
        raise ValueError(f"the tensor '{name}' has another length than its shape {shape} asks for")
    return spec, (offsets[0], offsets[1])


def _bytes(shape: list[int], width: int) -> int | None:
    """The number of bytes of a tensor; None if it is too large for torch to index.

    A tensor with an axis of size 0 has no bytes, but torch still computes strides along the other axes.
    """
    total = width
    for size in shape:
        total *= max(size, 1)
        if total > _LARGEST:
            return None
    return 0 if 0 in shape else total


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
