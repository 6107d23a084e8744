"""Task sources: configurable descriptions of where a task's data come from."""

from freemerge.data.sources.hugging_face import HuggingFaceImageSource, HuggingFaceTextSource
from freemerge.data.sources.image_folder import ImageFolderSource
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.npz import NpzSource
from freemerge.data.sources.pooled import PooledSource
from freemerge.data.sources.source import TaskSource
from freemerge.data.sources.text_table import TextTableSource
from freemerge.data.sources.texts import TextSource
from freemerge.data.sources.torchvision_dataset import TorchvisionSource

__all__ = [
    "HuggingFaceImageSource",
    "HuggingFaceTextSource",
    "ImageFolderSource",
    "ImageSource",
    "NpzSource",
    "PooledSource",
    "TaskSource",
    "TextSource",
    "TextTableSource",
    "TorchvisionSource",
]
