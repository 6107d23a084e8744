"""torchvision transforms as augmentations. freemerge augments whole batches, torchvision one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freemerge.data.errors import DataError, reason_of

_LABEL_MIXERS = ("MixUp", "CutMix")


class PerImage:
    """Applies a transform to each image of a batch.

    Given a whole batch, torchvision would apply the same random parameters to all images.

    Args:
        transform: a transform of `torchvision.transforms.v2` or `torchvision.transforms` that takes tensors.
    """

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform = transform

    def __call__(self, images: Tensor) -> Tensor:
        """Transform a batch.

        Args:
            images: float32 (B, C, H, W) in [0, 1].

        Returns:
            float32 (B, C', H', W').

        Raises:
            DataError: if the transform does not accept such images, or does not return images of one shape.
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
                raise DataError(f"augment: {name} must return float images of one shape (C, H, W), got {what}")
        return torch.stack(changed)


def batched(augment: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make an augmentation a function of whole batches.

    Args:
        augment: a function of batches, or a transform of torchvision.

    Returns:
        The same function, or a `PerImage` of a torchvision transform.

    Raises:
        DataError: for MixUp and CutMix, which change labels.
    """
    kinds = [kind for kind in type(augment).__mro__ if kind.__module__.startswith("torchvision.transforms")]
    if not kinds:
        return augment
    if any(kind.__name__ in _LABEL_MIXERS for kind in kinds):
        raise DataError(f"augment: {type(augment).__name__} changes labels, but augmentations receive images only")
    return PerImage(augment)
