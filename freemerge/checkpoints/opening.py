"""Open a model from any source: a state dict, a module, a file, a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.adapters import open_adapter
from freemerge.checkpoints.formats.distributed_files import METADATA, open_distributed
from freemerge.checkpoints.formats.index import SUFFIX, read_index
from freemerge.checkpoints.formats.safetensors_files import open_safetensors
from freemerge.checkpoints.formats.task_files import open_task_file
from freemerge.checkpoints.formats.torch_files import open_torch
from freemerge.checkpoints.hub import locate
from freemerge.checkpoints.memory import from_tensors
from freemerge.checkpoints.stacking import open_stack, parse_stack
from freemerge.errors import CheckpointError

Source = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_FILES = (  # in the search order of transformers
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def open_checkpoint(source: Source, *, label: str | None = None, prefix: str | None = None) -> Checkpoint:
    """Open a model's tensors lazily: only names, shapes and dtypes are read.

    Args:
        source: a state dict, a module, a checkpoint that is already open, or a path: a `.safetensors` file (a task file
            among them, see `task_files`), a `torch.save` file (`.pt`, `.pth`, `.bin`, or a Lightning `.ckpt`), a
            Hugging Face folder (`model.safetensors`, `pytorch_model.bin`, or the index of their shards), the
            `models--org--name` of its cache or an id of the Hub (`org/name`, `org/name@revision`), the folder of
            a distributed checkpoint (`.metadata` and `.distcp` files, as Lightning's ModelParallelStrategy and FSDP
            write it), or that of a LoRA, DoRA or (IA)³ adapter, whose tensors are then differences to a base (see
            `Checkpoint.deltas` and `Checkpoint.on`). `a[0:16]+b[8:24]` is a model of the layers 0 to 15 of one and 8
            to 23 of the other, see `stacking`.
        label: the model's name in messages; by default its path, or its class.
        prefix: take only the tensors whose names start with it, and strip it (`backbone.model.`).
            `Checkpoint.relative_to` finds it.

    Raises:
        CheckpointError: the checkpoint cannot be opened; one line names the file, what is wrong and what to do.
        TypeError: `source` is none of the above.
    """
    return _open(source, label).with_prefix(prefix or "")


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint into memory; tied ones come back tied.

    Args:
        path: any path that `open_checkpoint` accepts.

    Returns:
        name → tensor, in the stored shapes and dtypes.

    Raises:
        CheckpointError: see `open_checkpoint`; or it is an adapter or a task vector, which need a base.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.deltas:
        kind = "a task vector" if checkpoint.metadata else "an adapter"
        raise CheckpointError(f"{path}: is {kind}, not a model; merge it with its base")
    # A clone does not depend on the file that the values may be mapped from.
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names if name not in checkpoint.tied}
    return tensors | {name: tensors[first] for name, first in checkpoint.tied.items()}


def _open(source: Source, label: str | None) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source if label is None else source.with_label(label)
    if isinstance(source, nn.Module):
        tensors = {name: value for name, value in source.state_dict().items() if isinstance(value, Tensor)}
        buffers = [name for name, _ in source.named_buffers(remove_duplicate=False)]
        return from_tensors(tensors, label or type(source).__name__, buffers)
    if isinstance(source, Mapping):
        return from_tensors(source, label or "state dict")
    if isinstance(source, str) and (pieces := parse_stack(source)) is not None:
        return open_stack(label or source, pieces, open_checkpoint)
    if isinstance(source, (str, os.PathLike)):
        path = locate(source)
        found, folder = _open_path(path, label or str(source)), path if path.is_dir() else path.parent
        described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        return found.with_folder(folder) if described else found
    raise TypeError(f"a model is a state dict, a module or a path, not a {type(source).__name__}")


def _open_path(path: Path, label: str) -> Checkpoint:
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                _check_alone(path / name)
                return _open_path(path / name, label)
        if (path / "adapter_config.json").is_file():
            for name in _ADAPTER_FILES:
                if (path / name).is_file():
                    return open_adapter(path, label, _open_path(path / name, label))
            raise CheckpointError(f"{path}: no weights of the adapter; expected one of {', '.join(_ADAPTER_FILES)}")
        if (path / METADATA).is_file():
            return open_distributed(path, label)
        if any(path.glob("*.distcp")):
            raise CheckpointError(
                f"{path}: a distributed checkpoint that lacks {METADATA}; copy the whole folder again"
            )
        if shards := sorted(path.glob("*-of-*.safetensors")):
            raise CheckpointError(
                f"{path}: has shards ({shards[0].name}) and no model.safetensors{SUFFIX}, as after an interrupted "
                "run; write or download the model again"
            )
        if gone := [name for name in WEIGHT_FILES if (path / name).is_symlink()]:
            link = path / gone[0]
            raise CheckpointError(f"{link}: is a link to {os.readlink(link)}, which does not exist; download it again")
        inside = [f"{folder.name}/" for folder in sorted(path.iterdir()) if (folder / "config.json").is_file()]
        hint = f", or give one of the folders inside: {', '.join(inside[:10])}" if inside else ""
        raise CheckpointError(f"{path}: no weights in this folder; expected one of {', '.join(WEIGHT_FILES)}{hint}")
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; check the path")
    if path.name.endswith(SUFFIX):
        index = read_index(path)
        open_shards = open_safetensors if index.shards[0].suffix == ".safetensors" else open_torch
        return open_shards(index.shards, label, index)
    if path.suffix == ".safetensors":
        return open_task_file(open_safetensors([path], label))
    if path.suffix in _TORCH_SUFFIXES:
        return open_torch([path], label)
    raise CheckpointError(
        f"{path}: unknown kind of file; expected a folder, .safetensors, {', '.join(_TORCH_SUFFIXES)}"
    )


def _check_alone(path: Path) -> None:
    """Refuse a folder with both a whole file and shards: one of them is stale, and it is unknown which."""
    index = path.with_name(path.name + SUFFIX)
    if index.is_file() and path not in read_index(index).files.values():
        raise CheckpointError(
            f"{path.parent}: has both {path.name} and {index.name}, which lists other files; remove the stale one"
        )
