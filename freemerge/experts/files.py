"""Expert files: one safetensors file, packed so that the file is small, not only the count of its values.

All tensors of the expert are laid end to end (the layout, names and shapes, is in the metadata). `gaps` (uint8) codes
the ascending positions by their differences in base 255: a difference 255·q + r is q bytes of 255 followed by the byte
r, so that positions are the running sum of the bytes wherever the byte is not 255. At density 0.01 nearly all
differences fit one byte. `values` holds the values in the same order, in bfloat16 unless asked otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freemerge.checkpoints import CheckpointError, hash_tensors, save_checkpoint
from freemerge.experts.sparse import SparseExpert

FORMAT = "freemerge-sparse-expert-1"
_ESCAPE = 255


def save_expert(path: str | Path, expert: SparseExpert, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write an expert to a safetensors file, atomically.

    Args:
        path: the file to write; its folder is made if need be.
        expert: the expert; its metadata go into the file's.
        dtype: dtype of the stored values.

    Returns:
        The path.
    """
    offset, positions = 0, []
    for name, shape in expert.shapes.items():
        positions.append(expert.indices[name].cpu().numpy() + offset)
        offset += math.prod(shape)
    gaps = encode_positions(np.concatenate(positions))
    layout = json.dumps([[name, list(shape)] for name, shape in expert.shapes.items()], separators=(",", ":"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        path,
        {"gaps": torch.from_numpy(gaps), "values": expert.flat_values().detach().cpu().to(dtype)},
        metadata={**expert.metadata, "kind": FORMAT, "layout": layout},
    )
    return path


def load_expert(path: str | Path, merged: Mapping[str, Tensor] | None = None) -> SparseExpert:
    """Read an expert; values come back as float32.

    Args:
        path: a file written by `save_expert`.
        merged: weights of the merged backbone; when given, an expert made for other weights is refused.

    Raises:
        CheckpointError: if the file is missing, damaged, no expert, or belongs to another merged backbone.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("kind") != FORMAT:
                raise CheckpointError(
                    f"{path}: not an expert file (kind {metadata.get('kind')!r}, expected {FORMAT!r})"
                )
            gaps, values = file.get_tensor("gaps").numpy(), file.get_tensor("values").float()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such expert file") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); make the expert again") from error
    if merged is not None:
        check_merged_hash(metadata, hash_tensors(merged), path)
    layout = json.loads(metadata.pop("layout"))
    # "format" is safetensors' own, "freemerge.…" guards the file.
    metadata = {
        key: value
        for key, value in metadata.items()
        if key not in ("kind", "format") and not key.startswith("freemerge.")
    }
    ends = np.cumsum([math.prod(shape) for _, shape in layout])
    positions = decode_positions(gaps)
    if len(positions) != values.numel() or (len(positions) and positions[-1] >= ends[-1]):
        raise CheckpointError(f"{path}: positions and values do not match its layout; make the expert again")
    cuts = np.searchsorted(positions, ends)  # (T,) how many positions lie before the end of each tensor
    indices, parts, start = {}, {}, 0
    for (name, shape), end, cut in zip(layout, ends, cuts, strict=True):
        indices[name] = torch.from_numpy(positions[start:cut] - (end - math.prod(shape)))
        parts[name] = values[start:cut]
        start = cut
    return SparseExpert(indices, parts, {name: tuple(shape) for name, shape in layout}, metadata)


def check_merged_hash(metadata: Mapping[str, str], found: str, path: str | Path) -> None:
    """Raise a CheckpointError if an expert's metadata name other merged weights than those with hash `found`."""
    expected = metadata.get("merged_hash")
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{path}: this expert belongs to merged weights {expected[:12]}, the model has {found[:12]}; "
            "load it beside the merged backbone it was made for"
        )


def encode_positions(positions: np.ndarray) -> np.ndarray:
    """Ascending int64 positions (n,) → uint8 gaps (≥ n,)."""
    gaps = np.diff(positions, prepend=0)
    escapes, rest = np.divmod(gaps, _ESCAPE)
    ends = np.cumsum(escapes + 1)  # each gap is `escapes` bytes of 255 and one closing byte
    coded = np.full(int(ends[-1]) if len(ends) else 0, _ESCAPE, dtype=np.uint8)
    coded[ends - 1] = rest
    return coded


def decode_positions(gaps: np.ndarray) -> np.ndarray:
    """uint8 gaps → ascending int64 positions."""
    return np.cumsum(gaps, dtype=np.int64)[gaps != _ESCAPE]
