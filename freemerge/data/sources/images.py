"""What all sources of images can be told."""

# Without postponed annotations: a subclass in another module would have to import the names that they use.

from dataclasses import dataclass

from freemerge.data.arrays import Augmentation, Preprocessing
from freemerge.data.sources.source import TaskSource


@dataclass(kw_only=True)
class ImageSource(TaskSource):
    """Base class of sources of images.

    Args:
        image_size: height and width of what the model gets; None leaves images as they are.
        channels: 3 repeats grey images, 1 makes grey of colour; None leaves images as they are.
        mean: subtracted from pixels in [0, 1]: one number, or one per channel.
        std: what the difference is divided by.
        augment: for training batches, in order, before they are resized: transforms of `torchvision.transforms.v2`,
            classes of `freemerge.data.augment`, or your own callables of float32 (B, C, H, W) in [0, 1].
        templates: prompts with one `{}` for a zero-shot text head, such as `a photo of a {}.`.
        metric: what the task is judged by; None is accuracy.
    """

    image_size: int | None = None
    channels: int | None = None
    mean: float | list[float] = 0.5
    std: float | list[float] = 0.5
    augment: list[Augmentation] | None = None
    templates: list[str] | None = None
    metric: str | None = None

    def preprocessing(self, split: str) -> Preprocessing:
        """What is done to the images of a split; only training images are augmented."""
        from freemerge.data.augment import Compose

        augment = Compose(*self.augment) if self.augment and split == "train" else None
        return Preprocessing(self.mean, self.std, augment, self.image_size, self.channels)
