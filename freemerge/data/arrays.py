"""Labelled images in memory, and how images become what a model takes.

`ArrayDataset` keeps a small task in memory as uint8 and serves a batch with one gather, one augmentation and one
normalisation; with `collate` a `DataLoader` without workers delivers tens of thousands of 32×32 images per second, so
that the smallest models are never starved by Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from freemerge.data.batches import StackedBatch
from freemerge.data.transforms import batched

Augmentation = Callable[[Tensor], Any]  # it returns a tensor; newer jsonargparse would ask for a Tensor's subclass
"""Batched: float32 images (B, C, H, W) in [0, 1] → the same; randomness comes from torch's global generator.

A transform of `torchvision.transforms.v2` is one too: it is applied to each image apart."""


class Preprocessing:
    """What is done to a batch of images on its way to the model.

    (image / 255, augmented, resized, in as many channels as asked for) − mean, divided by std.

    Args:
        mean: One number for all channels, or one per channel, on the scale [0, 1].
        std: Likewise; above zero.
        augment: Applied to whole batches in [0, 1], or, if it is a transform of torchvision, to each image; give it to
            a training set only.
        size: Height and width of what comes out, whatever came in (bilinear, antialiased); None changes nothing.
        channels: 3 repeats grey, 1 makes grey of colour (ITU-R 601 luma); None changes nothing.

    Raises:
        ValueError: If `std` is not positive, or a size makes no sense.
    """

    def __init__(
        self,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        augment: Augmentation | None = None,
        size: int | None = None,
        channels: int | None = None,
    ) -> None:
        self._mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)  # (1 or C, 1, 1)
        self._std = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
        if not bool((self._std > 0).all()):
            raise ValueError(f"std must be above zero, got {std}")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if size is not None and size < 1:
            raise ValueError(f"the image size must be at least 1, got {size}")
        self.augment = None if augment is None else batched(augment)
        self.size = size
        self.channels = channels

    def check(self, channels: int) -> None:
        """Raise a ValueError if images of so many channels cannot be normalised."""
        channels = self.channels or channels
        for what, numbers in (("mean", self._mean), ("std", self._std)):
            if len(numbers) not in (1, channels):
                raise ValueError(f"{what} must be one number or one per channel ({channels}), got {len(numbers)}")

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) → float32 (B, C', H', W')."""
        images = images.float().div_(255)
        if self.augment is not None:
            images = self.augment(images)
        if self.channels == 1 and images.shape[1] == 3:
            luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            images = (images * luma).sum(dim=1, keepdim=True)
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return (images - self._mean) / self._std


class ArrayDataset(Dataset):
    """Labelled images in memory.

    An image comes out as (image / 255 − mean) / std, augmented before the normalisation if `augment` is given.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), or float32 (N,) for regression.
        mean: One number for all channels, or one per channel, on the scale [0, 1].
        std: Likewise; above zero.
        augment: Applied to whole batches in [0, 1]; give it to a training set only.
        preprocessing: All of these and more in one, instead of them.

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
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels.dtype not in (torch.int64, torch.float32) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64 or float32 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}"
            )
        self.images = images
        self.sample_names: Sequence[str] | None = None  # for predictions; a source that knows sets them
        self.labels = labels
        self.preprocessing = preprocessing or Preprocessing(mean, std, augment)
        self.preprocessing.check(images.shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = self.__getitems__([index])
        return batch.inputs[0], batch.labels[0]

    def __getitems__(self, indices: Sequence[int]) -> StackedBatch[Tensor]:
        """Fetches a batch at once; `DataLoader` prefers this over B calls of `__getitem__`."""
        index = torch.as_tensor(indices)
        return StackedBatch(self.preprocessing(self.images[index]), self.labels[index])
