"""Images that are decoded on access: from folders, torchvision datasets and Hugging Face datasets."""

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

FetchSample = Callable[[int], tuple[Any, int]]
"""A sample's index → (PIL image, array or tensor; label)."""

UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, Image.DecompressionBombError)
"""The exceptions that Pillow raises for a file that is damaged, truncated or not an image."""


class ImageDataset(Dataset):
    """A subset of any image dataset, resized and cropped to one size and preprocessed for a model.

    An image is scaled so that its shorter side becomes `size`, and cropped at its centre. Loader workers decode images
    in parallel.

    Args:
        fetch: returns (image, label) given an index; the image is a PIL image, a uint8 array (H, W) or (H, W, C), or a
            uint8 tensor (C, H, W).
        indices: int64 (N,), the samples of the subset.
        preprocessing: applied to each batch.
        size: height and width in pixels; None keeps the images' sizes, which must then be equal.
        name: returns the name of a sample for messages, such as its file name, given its index.
        num_classes: labels must be below it; None does not check labels.
        channels: 3 or 1, the number of channels after decoding; None takes the value of `preprocessing`, or keeps grey
            images grey and converts all others to RGB.
    """

    def __init__(
        self,
        fetch: FetchSample,
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
        """The samples' names, such as their file names."""
        return [self.name(index) for index in self.indices.tolist()]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> StackedBatch[Tensor]:
        """Fetch a batch at once; `DataLoader` prefers this to B calls of `__getitem__`.

        Raises:
            DataError: if an image cannot be read, a label is not a class index, or shapes differ; names the sample.
        """
        origins = [int(self.indices[index]) for index in indices]
        samples = [self._sample(origin) for origin in origins]
        first = samples[0][0].shape
        for origin, (image, _) in zip(origins, samples, strict=True):
            if image.shape != first:
                raise DataError(
                    f"images of different shapes are in one batch: {tuple(first)} of {self.name(origins[0])} and "
                    f"{tuple(image.shape)} of {self.name(origin)}; set image_size and channels"
                )
        labels = torch.tensor([label for _, label in samples])
        return StackedBatch(self.preprocessing(torch.stack([image for image, _ in samples])), labels)

    def _sample(self, origin: int) -> tuple[Tensor, int]:
        """One sample: uint8 (C, H, W) and the label."""
        try:
            image, label = self.fetch(origin)
            pixels = as_pixels(image, self.size, self.channels)
        except DataError as error:
            raise DataError(f"{self.name(origin)}: {error}") from None
        except UNREADABLE as error:
            raise DataError(
                f"{self.name(origin)}: cannot be read as an image ({reason_of(error)}); replace it or leave it out"
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
        hidden = "; -1 often marks labels that are not published: use another split" if number == label == -1 else ""
        raise DataError(f"{self.name(origin)}: the label is {label!r}, expected a class index{below}{hidden}")


def as_pixels(image: Any, size: int | None, channels: int | None) -> Tensor:
    """Convert an image to uint8 (C, H, W), upright, scaled and cropped to `size` if that is given.

    The EXIF orientation is applied. Animations are reduced to their first frame, 16-bit values to their upper 8 bits;
    transparency is dropped; palettes and CMYK become RGB.

    Args:
        image: PIL image, array (H, W) or (H, W, C), or tensor (C, H, W); arrays and tensors are uint8.
        size: height and width of the result in pixels; None keeps the size.
        channels: 3 or 1; None keeps grey images grey and converts all others to RGB.

    Returns:
        uint8 (C, H, W), C = 1 or 3.

    Raises:
        DataError: if `image` is not an image, or its pixels are not 8- or 16-bit integers.
    """
    if not isinstance(image, Image.Image):
        image = _from_array(image)
    image = _eight_bits(ImageOps.exif_transpose(image))
    grey = channels == 1 or (channels is None and image.mode in ("L", "LA", "1"))
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a palette with transparency that becomes RGB directly
    image = image.convert("L" if grey else "RGB")
    if size is not None and image.size != (size, size):
        width, height = (
            size * side // min(image.size) for side in image.size
        )  # rounded down, as models' processors do
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _from_array(image: Any) -> Image.Image:
    """An array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), as a PIL image."""
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        what = f"{pixels.dtype} {pixels.shape}" if pixels.ndim else f"{type(image).__name__} {str(image)[:60]!r}"
        raise DataError(f"expected an image: a PIL image, or uint8 (H, W) or (H, W, 1, 3 or 4); got {what}")
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce pixels of more than 8 bits to 8. Pillow would clip them at 255, which makes 16-bit images white."""
    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers of unknown range: save it with 8 or 16 bits per pixel")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError(f"its pixels range from {values.min()} to {values.max()}: save it with 8 or 16 bits per pixel")
    return Image.fromarray((values >> 8).astype(np.uint8))
