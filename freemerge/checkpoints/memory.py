"""State dicts and modules as checkpoints, without copies; ties are detected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.errors import CheckpointError

_OPAQUE = ("torch.float4", "torch.bits")


def from_tensors(tensors: Mapping[str, Tensor], label: str, buffers: Iterable[str] = ()) -> Checkpoint:
    """Open tensors in memory (or in a memory-mapped file) as a checkpoint, without copying.

    Args:
        tensors: name → tensor, any shape and dtype, on any device.
        label: the model's name in messages.
        buffers: names of tensors that are buffers of a module, not parameters.

    Raises:
        CheckpointError: a value is not a tensor, has no data (such as on the `meta` device), or does not store one
            value for each element (sparse, nested, quantized, sharded).
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
        # A conjugate or negative view is only a flag on another tensor's memory, so its bytes differ from its values.
        tensor = tensors[name].detach().resolve_conj().resolve_neg()
        return tensor if run is None else flat_range(tensor, *run)

    return Checkpoint(label, specs, read, tied=find_tied(tensors), buffers=buffers)


def _trouble(tensor: Tensor) -> str | None:
    """The reason why a tensor's values cannot be read, and what to do; None if they can be."""
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
        return f"has the dtype {tensor.dtype}, which supports no arithmetic; dequantize it first"
    storage = tensor.untyped_storage()
    if storage.device.type == "meta" or (tensor.numel() and not storage.nbytes()):
        return "has no data: it is fake, or its memory was freed; load or gather it first"
    return None


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name whose tensor has the same memory as an earlier one, that earlier name.

    Views that only overlap (a slice of a fused matrix) are not tied; each is a separate tensor.
    """
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:  # all empty tensors have address 0
            continue
        view = (tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, *view)
        original = first.setdefault(place, name)
        if original != name:
            tied[name] = original
    return tied


def flat_range(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Values `start` to `stop` of a tensor in row-major order; copies no more than the rows that contain them.

    Args:
        tensor: any shape and strides.
        start: position of the first value.
        stop: position after the last value.

    Returns:
        (stop − start,) in the tensor's dtype; a view where the strides allow it.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    row = tensor.shape[1:].numel()
    first, last = start // row, -(-stop // row)
    return tensor[first:last].reshape(-1)[start - first * row : stop - first * row]
