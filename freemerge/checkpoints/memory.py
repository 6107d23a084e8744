"""State dicts and modules as checkpoints: no copies, ties seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.errors import CheckpointError


def from_tensors(tensors: Mapping[str, Tensor], label: str, buffers: Iterable[str] = ()) -> Checkpoint:
    """A checkpoint over tensors in memory (or in a memory-mapped file); nothing is copied.

    Args:
        tensors: name → tensor, any shape and dtype, on any device.
        label: how messages call this model.
        buffers: which of them are known to be buffers of a module, not its parameters.

    Raises:
        CheckpointError: a value is no tensor, is sparse, or is on the `meta` device and so has no data.
    """
    specs = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{label}: the entry {name!r} is a {type(tensor).__name__}, not a tensor; pass a state dict of tensors"
            )
        if tensor.device.type == "meta":
            raise CheckpointError(f"{label}: the tensor '{name}' is on the meta device and has no data; load it first")
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"{label}: the tensor '{name}' is sparse ({tensor.layout}); make it dense first")
        specs[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)

    def read(name: str, run: tuple[int, int] | None) -> Tensor:
        tensor = tensors[name].detach()
        return tensor if run is None else flat_run(tensor, *run)

    return Checkpoint(label, specs, read, tied=find_tied(tensors), buffers=buffers)


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name whose tensor is the very memory of an earlier one, that earlier name.

    Views that merely overlap (a slice of a fused matrix) are not tied: each is a tensor of its own.
    """
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:  # empty tensors all live at address 0
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        original = first.setdefault(place, name)
        if original != name:
            tied[name] = original
    return tied


def flat_run(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Values `start` to `stop` of a tensor in row-major order, without copying more of it than their rows.

    Args:
        tensor: any shape and strides.
        start: first position.
        stop: position after the last.

    Returns:
        (stop − start,) in the tensor's dtype; a view where the strides allow it.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    row = tensor.shape[1:].numel()
    first, last = start // row, -(-stop // row)
    return tensor[first:last].reshape(-1)[start - first * row : stop - first * row]
