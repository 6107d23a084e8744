"""Pictures that are decoded when they are asked for: folders, torchvision's and Hugging Face's datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from freemerge.data.arrays import Preprocessing
from freemerge.data.batches import StackedBatch

Fetch = Callable[[int], tuple[Any, int]]
"""Index → (PIL image, array or tensor, label)."""


class PictureDataset(Dataset):
    """Some samples of somebody's dataset of pictures, scaled and cropped to one size, and prepared for a model.

    A picture is scaled so that its shorter side fits, and cropped at its centre. Worker processes decode in parallel.

    Args:
        fetch: gives a sample: a PIL image, or an array (H, W) or (H, W, C) or tensor (C, H, W) of uint8, and its label.
        indices: which samples, int64 (N,).
        preprocessing: what is done to a batch.
        size: height and width; None takes pictures as they are, and they must be equal.
    """

    def __init__(self, fetch: Fetch, indices: Tensor, preprocessing: Preprocessing, size: int | None) -> None:
        self.fetch = fetch
        self.indices = indices
        self.preprocessing = preprocessing
        self.size = size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> StackedBatch:
        """Fetches a batch at once; `DataLoader` prefers this over B calls of `__getitem__`."""
        samples = [self.fetch(int(self.indices[index])) for index in indices]
        pictures = [as_pixels(picture, self.size, self.preprocessing.channels) for picture, _ in samples]
        if len({picture.shape for picture in pictures}) > 1:
            shapes = ", ".join(sorted({str(tuple(picture.shape)) for picture in pictures})[:3])
            raise ValueError(f"pictures of different shapes are in one batch: {shapes}; give image_size and channels")
        labels = torch.tensor([int(label) for _, label in samples])
        return StackedBatch(self.preprocessing(torch.stack(pictures)), labels)


def as_pixels(picture: Any, size: int | None, channels: int | None) -> Tensor:
    """A picture as uint8 (C, H, W), scaled and cropped to `size` if one is given.

    Args:
        picture: PIL image, array (H, W) or (H, W, C), or tensor (C, H, W); uint8.
        size: height and width of what comes out.
        channels: 3 or 1, for PIL images, which come in many modes; None keeps grey grey and makes all else RGB.
    """
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).numpy() if picture.ndim == 3 else picture.numpy()
    if not isinstance(picture, Image.Image):
        picture = np.asarray(picture)
        picture = Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture)
    grey = channels == 1 or (channels is None and picture.mode in ("L", "1", "I;16", "I"))
    picture = picture.convert("L" if grey else "RGB")
    if size is not None and picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(picture))  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
