"""State dicts and modules as checkpoints: no copies, ties seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.errors import CheckpointError

_OPAQUE = ("torch.float4", "torch.bits")


def from_tensors(tensors: Mapping[str, Tensor], label: str, buffers: Iterable[str] = ()) -> Checkpoint:
    """A checkpoint over tensors in memory (or in a memory-mapped file); nothing is copied.

    Args:
        tensors: name → tensor, any shape and dtype, on any device.
        label: how messages call this model.
        buffers: which of them are known to be buffers of a module, not its parameters.

    Raises:
        CheckpointError: a value is no tensor, has no data (on the `meta` device, say), or does not have one value in
            memory for each element (sparse, nested, quantized, sharded).
    """
    specs = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{label}: the entry {name!r} is a {type(tensor).__name__}, not a tensor; pass a state dict of tensors"
            )
        if trouble := _trouble(tensor):
            raise CheckpointError(f"{label}: the tensor '{name}' {trouble}")
        specs[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)

    def read(name: str, run: tuple[int, int] | None) -> Tensor:
        # A conjugate or negative view is a mark on another tensor's memory, which bytes don't have.
        tensor = tensors[name].detach().resolve_conj().resolve_neg()
        return tensor if run is None else flat_range(tensor, *run)

    return Checkpoint(label, specs, read, tied=find_tied(tensors), buffers=buffers)


def _trouble(tensor: Tensor) -> str | None:
    """Why a tensor's values cannot be read one by one, and what to do; None if they can be."""
    if is_lazy(tensor):
        return "has no shape yet, as its module has not run; run the model once first"
    if tensor.is_nested:
        return "is nested: its rows have different lengths; pad it first"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype}); dequantize it first"
    if tensor.device.type == "meta":
        return "is on the meta device and has no data; load it first"
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout}); make it dense first"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"is a {type(tensor).__name__}, made of other tensors; pass it whole, dequantized or gathered"
    if str(tensor.dtype).startswith(_OPAQUE):
        return f"has the dtype {tensor.dtype}, with which nothing can be computed; dequantize it first"
    storage = tensor.untyped_storage()
    if storage.device.type == "meta" or (tensor.numel() and not storage.nbytes()):
        return "has no data: it is fake, or its memory was freed; load or gather it first"
    return None


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name whose tensor is the very memory of an earlier one, that earlier name.

    Views that merely overlap (a slice of a fused matrix) are not tied: each is a tensor of its own.
    """
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:  # empty tensors all live at address 0
            continue
        view = (tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, *view)
        original = first.setdefault(place, name)
        if original != name:
            tied[name] = original
    return tied


def flat_range(tensor: Tensor, start: int, stop: int) -> Tensor:
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
