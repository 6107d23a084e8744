"""Batches that a dataset has already stacked, and the collate function for any samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from freemerge.inputs import IGNORED, Inputs, join, join_padded, select

_Inputs = TypeVar("_Inputs", bound=Inputs)


class StackedBatch(Sequence[tuple[_Inputs, Tensor]], Generic[_Inputs]):
    """A stacked batch that can also be read as the list of samples that torch expects.

    torch lets a dataset fetch many samples at once (`__getitems__`), but expects a list of samples, which the collate
    function then stacks. `collate` uses the stacked tensors directly; any other collate function can iterate over the
    samples.

    Args:
        inputs: float32 images (B, C, H, W), or a dict of tensors (B, …).
        labels: (B,), or (B, L) if each token has a label.
    """

    def __init__(self, inputs: _Inputs, labels: Tensor) -> None:
        self.inputs = inputs
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[_Inputs, Tensor]:  # type: ignore[override] # slices are never used
        return select(self.inputs, index), self.labels[index]

    def __iter__(self) -> Iterator[tuple[_Inputs, Tensor]]:
        return (self[index] for index in range(len(self)))


def collate(batch: Any) -> Any:
    """Collate function for any dataset: copies nothing for a `StackedBatch`, and pads samples with dicts of tokens.

    Args:
        batch: a `StackedBatch`, or a list of samples.

    Returns:
        A list [inputs, labels]; if the inputs of the samples are neither a dict nor a tuple, the result of torch's
        `default_collate`.
    """
    if isinstance(batch, StackedBatch):
        return [batch.inputs, batch.labels]
    if isinstance(batch[0], Sequence) and len(batch[0]) == 2 and isinstance(batch[0][0], (Mapping, tuple)):
        inputs = join([unsqueeze(inputs) for inputs, _ in batch])
        labels = join_padded([torch.as_tensor(label)[None] for _, label in batch], IGNORED)
        return [inputs, labels]
    return default_collate(batch)


def unsqueeze(inputs: Any) -> Inputs:
    """Make a batch of one sample.

    Args:
        inputs: one sample's inputs: a tensor (…), or a dict or tuple of them.

    Returns:
        The same structure with tensors (1, …).
    """
    if isinstance(inputs, Mapping):
        return {name: unsqueeze(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        parts = [unsqueeze(value) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else tuple(parts)
    return torch.as_tensor(inputs)[None]
