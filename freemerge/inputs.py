"""The inputs of a batch: one tensor (B, …), such as images, or a dict of tensors (B, …), such as a tokenizer's output.

Everything that handles batches goes through these few functions, so that no other code asks which of the two it has.
A tensor whose second dimension differs from sample to sample (tokens) is padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = Tensor | dict[str, Tensor]
"""A tensor (B, …), or a dict of tensors that have B in common."""

IGNORED = -100
"""A label that counts in no loss and no metric; cross-entropy's own convention."""


def batch_size(inputs: Inputs) -> int:
    """How many samples a batch has."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def device_of(inputs: Inputs) -> torch.device:
    """Where a batch is."""
    return (inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))).device


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The same batch on `device`."""
    if isinstance(inputs, Mapping):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs.to(device)


def select(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """Some samples of a batch.

    Args:
        inputs: B samples.
        index: (b,) int64 or (B,) bool, or a slice.
    """
    if isinstance(inputs, Mapping):
        return {name: tensor[index] for name, tensor in inputs.items()}
    return inputs[index]


def join(batches: Sequence[Inputs]) -> Inputs:
    """Several batches as one, in order; tokens are padded to the longest (`labels` with −100, all else with 0).

    Args:
        batches: all tensors, or all dicts with the same keys.

    Raises:
        ValueError: if the batches cannot be one.
    """
    kinds = sorted({_describe(batch) for batch in batches})
    if len(kinds) > 1:
        raise ValueError(f"batches of different kinds cannot be one: {' and '.join(kinds)}")
    first = batches[0]
    if isinstance(first, Mapping):
        return {name: join_padded([batch[name] for batch in batches], padding_of(name)) for name in first}
    return torch.cat(list(batches))


def join_padded(tensors: Sequence[Tensor], value: int = 0) -> Tensor:
    """Concatenates tensors (b, L, …) or (b,), padding dimension 1 to the longest."""
    if tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    length = max(tensor.shape[1] for tensor in tensors)
    widths = [(0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]) for tensor in tensors]
    return torch.cat([F.pad(tensor, width, value=value) for tensor, width in zip(tensors, widths, strict=True)])


def padding_of(name: str) -> int:
    """What an input of this name is padded with."""
    return IGNORED if name == "labels" else 0


def _describe(inputs: Inputs) -> str:
    return str(sorted(inputs)) if isinstance(inputs, Mapping) else f"{inputs.dtype} {tuple(inputs.shape[1:])}"
