"""The inputs of a batch: a tensor (B, …), such as images, or a dict or tuple of inputs, such as a tokenizer's output
or an image with its text.

All code that handles batches uses these functions, so that no other code depends on the structure of the inputs. A
tensor whose second dimension differs from sample to sample (tokens) is padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = Tensor | Mapping[str, "Inputs"] | tuple["Inputs", ...] | list[Any]
"""A tensor (B, …), or a dict or tuple of inputs that have B in common. A list of B other values, such as texts, is part
of the batch; values that belong to the batch as a whole are passed along unchanged."""

_Inputs = TypeVar("_Inputs", bound=Inputs)

IGNORED = -100
"""The label that losses and metrics ignore; cross-entropy's default `ignore_index`."""


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of a batch's inputs, each (B, …), in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def named(inputs: Inputs) -> dict[str, Any]:
    """The inputs as a dict by name.

    Raises:
        TypeError: the inputs are not a dict.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"the inputs are a {type(inputs).__name__}, expected a dict of tensors by name")
    return dict(inputs)


def batch_size(inputs: Inputs) -> int:
    """The number of samples in a batch."""
    return len(tensors_of(inputs)[0])


def device_of(inputs: Inputs) -> torch.device:
    """The device of a batch."""
    return tensors_of(inputs)[0].device


def to_device(inputs: _Inputs, device: torch.device | str) -> _Inputs:
    """The same batch on `device`."""
    return _map(inputs, lambda tensor: tensor.to(device))


def select(inputs: _Inputs, index: Tensor | slice | int) -> _Inputs:
    """Select samples of a batch.

    Args:
        inputs: B samples.
        index: (b,) int64 or (B,) bool, a slice, or an integer for one sample without the batch dimension.
    """
    size = batch_size(inputs)

    def select_values(values: list) -> Any:
        if len(values) != size:  # does not have one value per sample
            return values
        if isinstance(index, int):
            return values[index]
        return [
            values[position]
            for position in torch.arange(size)[index.cpu() if isinstance(index, Tensor) else index].tolist()
        ]

    return _map(inputs, lambda tensor: tensor[index], select_values)


def _map(
    inputs: Any, function: Callable[[Tensor], Tensor], of_list: Callable[[list], Any] = lambda values: values
) -> Any:
    """Apply a function to each tensor, and to each list without tensors; keeps the structure of the inputs."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: _map(value, function, of_list) for name, value in inputs.items()}
    if isinstance(inputs, list) and not tensors_of(inputs):
        return of_list(inputs)
    if isinstance(inputs, (tuple, list)):
        return _like(inputs, [_map(value, function, of_list) for value in inputs])
    return inputs


def join(batches: Sequence[Inputs]) -> Inputs:
    """Concatenate batches in order; tokens are padded to the longest (`labels` with −100, all others with 0).

    Args:
        batches: all tensors, all dicts with the same keys, or all tuples of one length.

    Raises:
        ValueError: the batches differ in structure.
    """
    kinds = sorted({_describe(batch) for batch in batches})
    if len(kinds) > 1:
        raise ValueError(f"cannot concatenate batches of different structure: {' and '.join(kinds)}")
    same: Sequence[Any] = batches  # all have the structure of the first
    first = same[0]
    if isinstance(first, Mapping):
        return {name: _join([batch[name] for batch in same], padding_of(name)) for name in first}
    if isinstance(first, (tuple, list)):
        return _like(first, [_join(parts, 0) for parts in zip(*same, strict=True)])
    return torch.cat(list(same))


def _like(values: Any, parts: list[Any]) -> Any:
    """Rebuild a tuple, a named tuple or a list of the type of `values` from its parts."""
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)


def _join(parts: Sequence[Any], padding: int) -> Inputs:
    """Concatenate one part of several batches' inputs, recursively where it is nested; tokens are padded."""
    return join_padded(parts, padding) if isinstance(parts[0], Tensor) else join(parts)


def join_padded(tensors: Sequence[Tensor], value: int = 0) -> Tensor:
    """Concatenates tensors (b, L, …) or (b,), padding dimension 1 to the longest."""
    if tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    length = max(tensor.shape[1] for tensor in tensors)
    widths = [(0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]) for tensor in tensors]
    return torch.cat([F.pad(tensor, width, value=value) for tensor, width in zip(tensors, widths, strict=True)])


def padding_of(name: str) -> int:
    """The padding value of an input of this name."""
    return IGNORED if name == "labels" else 0


def _describe(inputs: Inputs) -> str:
    if isinstance(inputs, Mapping):
        return str(sorted(inputs))
    if isinstance(inputs, (tuple, list)):
        return f"{len(inputs)} inputs"
    return f"{inputs.dtype} {tuple(inputs.shape[1:])}"
