"""Hugging Face folders: weights in one file or in shards with an index, and the small files around them.

A folder appears whole or not at all: it is written beside its place, synced, and renamed. An existing folder is swapped
with the new one in a single step where the platform can (Linux), so that even a kill leaves the old or the new.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import TensorSpec
from freemerge.checkpoints.errors import CheckpointError
from freemerge.checkpoints.safetensors_files import storage_order, sync_folder, write_safetensors

MARKER = "freemerge.json"  # what a folder holds that may be overwritten

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_COPIED = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm"}
_NOT_COPIED = {MARKER, "trainer_state.json", "adapter_config.json"}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000 or "5GB".

    Raises:
        CheckpointError: not a positive size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(size), re.IGNORECASE)
    count = float(found[1]) * _UNITS.get(found[2].upper(), 0) if found else 0
    if count < 1:
        raise CheckpointError(f"shard_size must be a size such as 5GB or 500MB, got {size!r}")
    return int(count)


def plan_shards(specs: Mapping[str, TensorSpec], shard_size: int) -> dict[str, list[str]]:
    """Divide tensors into files of at most `shard_size` bytes; a larger tensor gets a file of its own.

    Returns:
        file name → names of its tensors, in the order in which they are to be written.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    ordered = [storage_order({name: specs[name] for name in shard}) for shard in shards]
    if len(ordered) == 1:
        return {"model.safetensors": ordered[0]}
    return {f"model-{i:05d}-of-{len(ordered):05d}.safetensors": shard for i, shard in enumerate(ordered, start=1)}


def companions(folder: Path) -> dict[str, Path]:
    """The files of a model folder that belong to any model of its architecture: configs, tokenizer, code, licence.

    Weights and their index, the README and the state of a training are left out.

    Returns:
        file name → path.
    """
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE")))
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
    }


def check_folder(path: Path, overwrite: bool) -> None:
    """Refuse to write a folder where something is that would be lost.

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


def write_folder(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    files: Mapping[str, bytes],
    *,
    shard_size: int,
    tied: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that `AutoModel.from_pretrained` loads, atomically.

    Args:
        path: the folder; its parent is created.
        specs: shape and dtype of every tensor.
        tensors: the stream of tensors, in the order of `plan_shards(specs, shard_size)`.
        files: the other files, by name.
        shard_size: largest size of a file of weights, in bytes.
        tied: left-out name → stored name, of tensors that share their memory.
        overwrite: replace a folder that freemerge wrote.

    Raises:
        CheckpointError: the folder exists already, or cannot be written.
    """
    check_folder(path, overwrite)
    shards = plan_shards(specs, shard_size)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        stream = iter(tensors)
        for file, names in shards.items():
            own = {name: first for name, first in (tied or {}).items() if first in names}
            part = itertools.islice(stream, len(names))
            write_safetensors(temporary / file, {name: specs[name] for name in names}, part, tied=own)
        _finish(stream, path)
        if len(shards) > 1:
            total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs.values())
            weight_map = {name: file for file, names in shards.items() for name in sorted(names)}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files = {**files, "model.safetensors.index.json": json.dumps(index, indent=2).encode()}
        for name, content in files.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        sync_folder(temporary)
        _put(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _finish(stream: Iterator[tuple[str, Tensor]], path: Path) -> None:
    for name, _ in stream:
        raise ValueError(f"{path}: the tensor '{name}' was not expected")


def _put(temporary: Path, path: Path) -> None:
    """Move the new folder to its place; what was there, if anything, is then at `temporary`."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        # No platform call to swap two folders: for a moment there is neither, but both are still beside the place.
        old = temporary.with_suffix(".old")
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    at_working_directory, exchange = -100, 2
    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        names = [os.fsencode(path) for path in (first, second)]
        return call(at_working_directory, names[0], at_working_directory, names[1], ctypes.c_uint(exchange)) == 0
    return False
