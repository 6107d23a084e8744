"""A task, and a dataset that hands out whole batches.

`Task` is what everything above `freemerge.data` knows about data: a name, its classes and three datasets of
(image, label). `ArrayDataset` keeps a small task in memory as uint8 and serves a batch with one gather, one
augmentation and one normalisation; with `collate` a `DataLoader` without workers delivers tens of thousands of 32×32
images per second, so that the smallest models are never starved by Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Augmentation = Callable[[Tensor], Tensor]
"""Batched: float32 images (B, C, H, W) in [0, 1] → the same; randomness comes from torch's global generator."""


@dataclass(frozen=True)
class Task:
    """One classification task.

    Args:
        name: What the task is called in configurations and reports.
        class_names: One name per class; a label is an index into it.
        train: Dataset of (image float32 (C, H, W), label int64 scalar).
        val: The same, for choosing hyperparameters.
        test: The same, for the final number only; it shares nothing with `train` and `val`.
    """

    name: str
    class_names: tuple[str, ...]
    train: Dataset
    val: Dataset
    test: Dataset

    @property
    def num_classes(self) -> int:
        """How many classes the task has."""
        return len(self.class_names)


class StackedBatch(Sequence):
    """A batch that is stacked already, yet can be read as the list of samples that torch's contract asks for.

    torch lets a dataset fetch many samples at once (`__getitems__`) but wants a list back, which the collate function
    then stacks again. `collate` takes the two tensors as they are; any other collate function iterates over samples.

    Args:
        images: float32 (B, C, H, W).
        labels: int64 (B,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.images[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.labels, strict=True)


def collate(batch: Any) -> Any:
    """Collate function for any dataset: free for a `StackedBatch`, torch's default for everything else.

    Args:
        batch: What the dataset fetched: a `StackedBatch` or a list of samples.

    Returns:
        For a `StackedBatch`, a list [images (B, C, H, W), labels (B,)], which is what torch's default would return too.
    """
    return [batch.images, batch.labels] if isinstance(batch, StackedBatch) else default_collate(batch)


class ArrayDataset(Dataset):
    """Labelled images in memory.

    An image comes out as (image / 255 − mean) / std, augmented before the normalisation if `augment` is given.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        mean: One number for all channels, or one per channel, on the scale [0, 1].
        std: Likewise; above zero.
        augment: Applied to whole batches in [0, 1]; give it to a training set only.

    Raises:
        ValueError: If the tensors do not have these dtypes and shapes, or `std` is not positive.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        augment: Augmentation | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")
        self.images = images
        self.labels = labels
        self.augment = augment
        self._mean = _per_channel(mean, images.shape[1], "mean")
        self._std = _per_channel(std, images.shape[1], "std")
        if not bool((self._std > 0).all()):
            raise ValueError(f"std must be above zero, got {std}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = self.__getitems__([index])
        return batch.images[0], batch.labels[0]

    def __getitems__(self, indices: Sequence[int]) -> StackedBatch:
        """Fetches a batch at once; `DataLoader` prefers this over B calls of `__getitem__`."""
        index = torch.as_tensor(indices)
        images = self.images[index].float().div_(255)  # (B, C, H, W)
        if self.augment is not None:
            images = self.augment(images)
        return StackedBatch((images - self._mean) / self._std, self.labels[index])


def _per_channel(value: float | Sequence[float], channels: int, what: str) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)  # (1 or C, 1, 1)
    if len(numbers) not in (1, channels):
        raise ValueError(f"{what} must be one number or one per channel ({channels}), got {len(numbers)}")
    return numbers
