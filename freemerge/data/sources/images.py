"""The options that all image sources share."""

# No `from __future__ import annotations`: a subclass in another module would have to import the names of these types.

from dataclasses import dataclass

from freemerge.data.arrays import Augmentation, Preprocessing
from freemerge.data.sources.classes import ClassSource


@dataclass(kw_only=True)
class ImageSource(ClassSource):
    """Base class of image sources.

    Args:
        image_size: height and width of the model's input in pixels; None keeps the images' size.
        channels: 3 repeats grey images, 1 converts colour to grey; None keeps the images' channels.
        mean: subtracted from pixels in [0, 1]: one number, or one per channel.
        std: divides the difference: one number, or one per channel.
        augment: augmentations of training batches, in order, before resizing: transforms of
            `torchvision.transforms.v2`, classes of `freemerge.data.augment`, or your own callables of float32
            (B, C, H, W) in [0, 1].
        metric: the task's metric; None is accuracy.
    """

    image_size: int | None = None
    channels: int | None = None
    mean: float | list[float] = 0.5
    std: float | list[float] = 0.5
    augment: list[Augmentation] | None = None
    metric: str | None = None

    def preprocessing(self, split: str) -> Preprocessing:
        """The preprocessing of a split; only training images are augmented.

        Args:
            split: train, val or test.

        Returns:
            The preprocessing.
        """
        from freemerge.data.augment import Compose

        augment = Compose(*self.augment) if self.augment and split == "train" else None
        return Preprocessing(self.mean, self.std, augment, self.image_size, self.channels)
