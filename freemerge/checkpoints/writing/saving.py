"""Save tensors in memory as one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from freemerge.checkpoints.formats.safetensors_files import storage_order, write_safetensors
from freemerge.checkpoints.memory import from_tensors


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically: an interruption leaves either the old file or the complete new one.

    Tied tensors are stored once, under the first of their names; the header's metadata maps the others to it, as
    safetensors itself does, and `load_checkpoint` ties them again. Views and non-contiguous tensors are stored as
    separate tensors.

    Args:
        path: the file to write; its folder is created.
        tensors: name → tensor, any shape, on any device.
        metadata: strings to keep in the header.

    Raises:
        CheckpointError: a value is not a tensor, the format does not support its dtype, or the file cannot be written.
    """
    checkpoint = from_tensors(tensors, str(path))
    tied = checkpoint.tied
    specs = {name: checkpoint.spec(name) for name in checkpoint.names if name not in tied}
    stream = ((name, checkpoint.tensor(name)) for name in storage_order(specs))
    write_safetensors(path, specs, stream, metadata, tied)
