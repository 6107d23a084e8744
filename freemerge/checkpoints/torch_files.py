"""Files of `torch.save`, read without running their code: state dicts (.pt, .pth, .bin) and Lightning's .ckpt."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.errors import CheckpointError
from freemerge.checkpoints.index import Index
from freemerge.checkpoints.memory import from_tensors
from freemerge.checkpoints.ties import find_left_out

NESTED = ("state_dict", "model_state_dict", "model", "module")  # where training frameworks keep the weights


def open_torch(paths: list[Path], label: str, index: Index | None = None) -> Checkpoint:
    """One checkpoint over the tensors of one or several `torch.save` files.

    The tensors stay in the file (memory-mapped) unless it has the format of before torch 1.6.

    Args:
        paths: the file, or all shards.
        label: how messages call this model.
        index: of the shards, to compare them with.

    Raises:
        CheckpointError: a file is missing, broken, holds code, or holds no state dict; two shards hold the same tensor,
            or the index does not fit.
    """
    tensors: dict[str, Tensor] = {}
    place: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _state_dict(_load(path), path).items():
            if name in place:
                raise CheckpointError(f"{path}: the tensor '{name}' is also in {place[name]}; keep one of them")
            place[name], tensors[name] = path, tensor
    if index is not None:
        missing = [name for name in index.files if name not in place]
        tied = find_left_out(index.path.parent, missing, place) if missing else {}
        index.check(place, tied)
        return from_tensors(tensors, label).tying(tied)
    return from_tensors(tensors, label)


def _load(path: Path) -> object:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # what torch raises for a broken file depends on where it is broken
        if isinstance(error, pickle.UnpicklingError) and "weights" in str(error).lower():
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors, and loading them could run code; save its state dict "
                "alone, best as .safetensors"
            ) from None
        raise CheckpointError(f"{path}: truncated or not a torch file; copy or download it again") from None


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        for key in NESTED:
            if isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
                break
        # Modules may keep state of other kinds (`_extra_state`) beside their tensors; only tensors can be merged.
        tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
        found = ", ".join(str(key) for key in list(loaded)[:8]) or "nothing"
    else:
        found = f"a {type(loaded).__name__}"
    raise CheckpointError(f"{path}: holds no state dict (found: {found}); save model.state_dict()")
