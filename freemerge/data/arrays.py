"""Labelled images in memory, and the preprocessing that turns images into model inputs.

`ArrayDataset` keeps a small task in memory as uint8 and fetches a batch with one gather, one augmentation and one
normalisation. With `collate`, a `DataLoader` without workers then delivers tens of thousands of 32×32 images per
second, so that data loading does not slow down the training of small models.
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

Augmentation = Callable[[Tensor], Any]  # returns a Tensor; typed so, recent jsonargparse would want a Tensor subclass
"""A function of a batch of float32 images (B, C, H, W) in [0, 1] that returns images of the same kind.

It draws random numbers from torch's global generator. A transform of `torchvision.transforms.v2` is an augmentation
too; it is applied to each image separately."""


class Preprocessing:
    """Turns a batch of uint8 images into model inputs: scale to [0, 1], augment, resize, normalise.

    The result is (image − mean) / std, where image is in [0, 1], augmented, resized and converted to `channels`.

    Args:
        mean: one number for all channels, or one per channel, on the scale [0, 1].
        std: standard deviation, likewise; positive.
        augment: applied to whole batches in [0, 1], or to each image if it is a transform of torchvision; for training
            sets only.
        size: height and width of the output in pixels (bilinear, antialiased); None keeps the input size.
        channels: 3 repeats grey images, 1 converts colour to grey (ITU-R 601 luma); None keeps the channels.

    Raises:
        ValueError: if `std` is not positive, or `size` or `channels` is not a possible value.
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
        """Check that `mean` and `std` fit images with this many channels.

        Args:
            channels: the number of channels of the input images.

        Raises:
            ValueError: if `mean` or `std` has neither one number nor one per channel.
        """
        channels = self.channels or channels
        for what, numbers in (("mean", self._mean), ("std", self._std)):
            if len(numbers) not in (1, channels):
                raise ValueError(f"{what} must be one number or one per channel ({channels}), got {len(numbers)}")

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess a batch.

        Args:
            images: uint8 (B, C, H, W).

        Returns:
            float32 (B, C', H', W'): C' is `channels` and H' = W' = `size`, where they are set.
        """
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
    """A dataset of labelled images in memory.

    A sample is ((image / 255 − mean) / std, label); the image is augmented before the normalisation if `augment` is
    given.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), or float32 (N,) for regression.
        mean: one number for all channels, or one per channel, on the scale [0, 1].
        std: standard deviation, likewise; positive.
        augment: applied to whole batches in [0, 1]; for training sets only.
        preprocessing: replaces `mean`, `std` and `augment`; it can also resize images and convert their channels.

    Raises:
        ValueError: if the tensors do not have these dtypes and shapes, or `std` is not positive.
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
        self.sample_names: Sequence[str] | None = None  # for prediction files; a source sets them if it knows them
        self.labels = labels
        self.preprocessing = preprocessing or Preprocessing(mean, std, augment)
        self.preprocessing.check(images.shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = self.__getitems__([index])
        return batch.inputs[0], batch.labels[0]

    def __getitems__(self, indices: Sequence[int]) -> StackedBatch[Tensor]:
        """Fetch a batch at once; `DataLoader` prefers this to B calls of `__getitem__`."""
        index = torch.as_tensor(indices)
        return StackedBatch(self.preprocessing(self.images[index]), self.labels[index])
