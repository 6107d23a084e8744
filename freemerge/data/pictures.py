"""Pictures that are decoded when they are asked for: folders, torchvision's and Hugging Face's datasets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from freemerge.data.arrays import Preprocessing
from freemerge.data.batches import StackedBatch
from freemerge.data.errors import DataError, reason_of

Fetch = Callable[[int], tuple[Any, int]]
"""Index → (PIL image, array or tensor, label)."""

UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, is damaged or is cut off."""


class PictureDataset(Dataset):
    """Some samples of somebody's dataset of pictures, scaled and cropped to one size, and prepared for a model.

    A picture is scaled so that its shorter side fits, and cropped at its centre. Worker processes decode in parallel.

    Args:
        fetch: gives a sample: a PIL image, or an array (H, W) or (H, W, C) or tensor (C, H, W) of uint8, and its label.
        indices: which samples, int64 (N,).
        preprocessing: what is done to a batch.
        size: height and width; None takes pictures as they are, and they must be equal.
        name: index → what messages call the sample, such as its file.
        num_classes: labels must be below it; None does not check.
        channels: 3 or 1, what pictures of all modes become; None: as `preprocessing` says, or as they are.
    """

    def __init__(
        self,
        fetch: Fetch,
        indices: Tensor,
        preprocessing: Preprocessing,
        size: int | None,
        name: Callable[[int], str] = "sample {}".format,
        num_classes: int | None = None,
        channels: int | None = None,
    ) -> None:
        self.fetch = fetch
        self.indices = indices
        self.preprocessing = preprocessing
        self.size = size
        self.name = name
        self.num_classes = num_classes
        self.channels = channels or preprocessing.channels

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sample_names(self) -> list[str]:
        """What each sample is called, such as its file."""
        return [self.name(index) for index in self.indices.tolist()]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> StackedBatch[Tensor]:
        """Fetches a batch at once; `DataLoader` prefers this over B calls of `__getitem__`.

        Raises:
            DataError: if a picture cannot be read or a label makes no sense; it names the sample.
        """
        origins = [int(self.indices[index]) for index in indices]
        samples = [self._sample(origin) for origin in origins]
        first = samples[0][0].shape
        for origin, (picture, _) in zip(origins, samples, strict=True):
            if picture.shape != first:
                raise DataError(
                    f"pictures of different shapes are in one batch: {tuple(first)} of {self.name(origins[0])} and "
                    f"{tuple(picture.shape)} of {self.name(origin)}; give image_size and channels"
                )
        labels = torch.tensor([label for _, label in samples])
        return StackedBatch(self.preprocessing(torch.stack([picture for picture, _ in samples])), labels)

    def _sample(self, origin: int) -> tuple[Tensor, int]:
        """uint8 (C, H, W), and the label."""
        try:
            picture, label = self.fetch(origin)
            pixels = as_pixels(picture, self.size, self.channels)
        except DataError as error:
            raise DataError(f"{self.name(origin)}: {error}") from None
        except UNREADABLE as error:
            raise DataError(
                f"{self.name(origin)}: cannot be read as a picture ({reason_of(error)}); replace it or leave it out"
            ) from error
        return pixels, self._label(origin, label)

    def _label(self, origin: int, label: Any) -> int:
        try:
            number = int(label)
            exact = number == label
        except (TypeError, ValueError, OverflowError):
            number, exact = -1, False
        if exact and number >= 0 and (self.num_classes is None or number < self.num_classes):
            return number
        below = "" if self.num_classes is None else f" below {self.num_classes}, the number of classes"
        hidden = (
            "; -1 often stands for labels that are kept secret: take another split" if number == label == -1 else ""
        )
        raise DataError(f"{self.name(origin)}: the label is {label!r}, expected the index of a class{below}{hidden}")


def as_pixels(picture: Any, size: int | None, channels: int | None) -> Tensor:
    """A picture as uint8 (C, H, W), upright, scaled and cropped to `size` if one is given.

    A picture that says how it must be turned (EXIF) is turned; of an animation the first frame counts; transparency is
    dropped; 16 bits become the upper 8; palettes and CMYK become RGB.

    Args:
        picture: PIL image, array (H, W) or (H, W, C), or tensor (C, H, W); uint8.
        size: height and width of what comes out.
        channels: 3 or 1, for PIL images, which come in many modes; None keeps grey grey and makes all else RGB.

    Raises:
        DataError: if it is no picture, or its pixels are no bytes.
    """
    if not isinstance(picture, Image.Image):
        picture = _from_array(picture)
    picture = _eight_bits(ImageOps.exif_transpose(picture))
    grey = channels == 1 or (channels is None and picture.mode in ("L", "LA", "1"))
    if "transparency" in picture.info and picture.mode == "P":
        picture = picture.convert("RGBA")  # Pillow warns of a palette with transparency that becomes RGB directly
    picture = picture.convert("L" if grey else "RGB")
    if size is not None and picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(picture))  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _from_array(picture: Any) -> Image.Image:
    """An array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), as a PIL image."""
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).numpy() if picture.ndim == 3 else picture.numpy()
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        what = f"{pixels.dtype} {pixels.shape}" if pixels.ndim else f"{type(picture).__name__} {str(picture)[:60]!r}"
        raise DataError(f"expected a picture: a PIL image, or uint8 (H, W) or (H, W, 1, 3 or 4); got {what}")
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pixels of more than 8 bits as 8; Pillow would cut them off at 255, which makes 16-bit pictures white."""
    if picture.mode == "F":
        raise DataError("its pixels are floating-point numbers, whose range is unknown: save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError(f"its pixels go from {values.min()} to {values.max()}: save it with 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))
