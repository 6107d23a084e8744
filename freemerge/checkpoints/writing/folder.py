"""Hugging Face folders: weights in one file or in shards with an index, and the small files around them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from freemerge.checkpoints.checkpoint import TensorSpec
from freemerge.checkpoints.formats.safetensors_files import storage_order
from freemerge.errors import CheckpointError

MARKER = "freemerge.json"  # the file that marks a folder as overwritable

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000 or "5GB".

    Raises:
        CheckpointError: the size is invalid or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(size), re.IGNORECASE)
    count = float(found[1]) * _UNITS.get(found[2].upper(), 0) if found else 0
    if count < 1:
        raise CheckpointError(f"shard_size must be a size such as 5GB or 500MB, got {size!r}")
    return int(count)


def plan_shards(
    specs: Mapping[str, TensorSpec], shard_size: int, modules: Iterable[str] = ()
) -> dict[str, dict[str, TensorSpec]]:
    """Divide tensors into files of at most `shard_size` bytes; a larger tensor gets its own file.

    Args:
        specs: shape and dtype by name.
        shard_size: in bytes.
        modules: subfolders of the model that have their own weight file, whatever its size: `2_Dense` holds the tensors
            whose names start with `2_Dense/`.

    Returns:
        file name → specs of its tensors, in storage order.
    """
    parts = {module: {n: spec for n, spec in specs.items() if n.startswith(f"{module}/")} for module in modules}
    inside = {name for part in parts.values() for name in part}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in specs.items():
        if name in inside:
            continue
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    ordered = [{name: specs[name] for name in storage_order({name: specs[name] for name in shard})} for shard in shards]
    own = {f"{module}/model.safetensors": {n: part[n] for n in storage_order(part)} for module, part in parts.items()}
    if len(ordered) == 1:
        return {"model.safetensors": ordered[0], **own}
    return {f"model-{i:05d}-of-{len(ordered):05d}.safetensors": shard for i, shard in enumerate(ordered, 1)} | own


def check_folder(path: Path, overwrite: bool) -> None:
    """Refuse to write a folder over something that would be lost.

    Raises:
        CheckpointError: `path` exists and `overwrite` is not given, or it is not a folder that freemerge wrote.
    """
    if not path.exists():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{path}: exists already; choose another output, or overwrite it with overwrite=True")
    if not (path.is_dir() and (path / MARKER).is_file()):
        raise CheckpointError(
            f"{path}: is not a folder that freemerge wrote (it has no {MARKER}), so it is not overwritten; remove it "
            "yourself"
        )


def read_origin(path: Path) -> dict[str, Any]:
    """The origin of the model in a folder that freemerge wrote, according to its `freemerge.json`."""
    return json.loads((path / MARKER).read_text(encoding="utf-8"))


def make_index(shards: Mapping[str, Mapping[str, TensorSpec]]) -> dict[str, bytes]:
    """The index of a folder's shards, by its file name; none for a single file.

    Args:
        shards: file name → specs of its tensors.
    """
    shards = {file: specs for file, specs in shards.items() if "/" not in file}  # modules are not in the index
    if len(shards) == 1:
        return {}
    specs = (spec for shard in shards.values() for spec in shard.values())
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)
    weight_map = {name: file for file, shard in shards.items() for name in sorted(shard)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {"model.safetensors.index.json": json.dumps(index, indent=2).encode()}
