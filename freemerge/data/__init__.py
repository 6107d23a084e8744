"""Tasks and task suites."""

from freemerge.data.arrays import ArrayDataset, Preprocessing
from freemerge.data.batches import StackedBatch, collate
from freemerge.data.mixture import TaskData, TaskMixture
from freemerge.data.source_suite import NpzSuite, SourceSuite, TextTableSuite
from freemerge.data.sources import (
    HuggingFaceImageSource,
    HuggingFaceTextSource,
    ImageFolderSource,
    ImageSource,
    NpzSource,
    PooledSource,
    TaskSource,
    TextSource,
    TextTableSource,
    TorchvisionSource,
)
from freemerge.data.suite import TaskSuite
from freemerge.data.tasks import Task
from freemerge.data.tokens import TokenDataset
from freemerge.quickstart.suite import QuickstartSuite

__all__ = [
    "ArrayDataset",
    "HuggingFaceImageSource",
    "HuggingFaceTextSource",
    "ImageFolderSource",
    "ImageSource",
    "NpzSource",
    "NpzSuite",
    "PooledSource",
    "Preprocessing",
    "QuickstartSuite",
    "SourceSuite",
    "StackedBatch",
    "Task",
    "TaskData",
    "TaskMixture",
    "TaskSource",
    "TaskSuite",
    "TextSource",
    "TextTableSource",
    "TextTableSuite",
    "TokenDataset",
    "TorchvisionSource",
    "collate",
]
