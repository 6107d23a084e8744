"""Transforms of torchvision as augmentations: freemerge augments whole batches, they one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freemerge.data.errors import DataError, reason_of

_OF_LABELS = ("MixUp", "CutMix")


class PerImage:
    """Applies a transform to each image of a batch: given the batch at once, it would draw the same for all images.

    Args:
        transform: a transform of `torchvision.transforms.v2` (or of the first version) that takes tensors.
    """

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform = transform

    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, C, H, W) in [0, 1] → float32 (B, C', H', W').

        Raises:
            DataError: if the transform does not take or give such images.
        """
        name = type(self.transform).__name__
        try:
            changed = [self.transform(image) for image in images]
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DataError(
                f"augment: {name} cannot take a float32 image {tuple(images.shape[1:])} in [0, 1] ({reason_of(error)})"
            ) from error
        for image in changed:
            if not isinstance(image, Tensor) or not image.is_floating_point() or image.shape != changed[0].shape:
                what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
                raise DataError(f"augment: {name} must give float images of one shape (C, H, W), and gave {what}")
        return torch.stack(changed)


def batched(augment: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An augmentation as a function of whole batches: torchvision's transforms are applied image by image.

    Raises:
        DataError: for MixUp and CutMix, which change labels.
    """
    kinds = [kind for kind in type(augment).__mro__ if kind.__module__.startswith("torchvision.transforms")]
    if not kinds:
        return augment
    if any(kind.__name__ in _OF_LABELS for kind in kinds):
        raise DataError(f"augment: {type(augment).__name__} changes labels too, and augmentations see images alone")
    return PerImage(augment)
