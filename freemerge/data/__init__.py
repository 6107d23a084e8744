"""Tasks and task suites."""

from importlib import import_module
from typing import Any

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
from freemerge.data.suite import SuiteTask, TaskSuite
from freemerge.data.tasks import Task
from freemerge.data.tokens import TokenDataset

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
    "SourceSuite",
    "StackedBatch",
    "SuiteTask",
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


def __getattr__(name: str) -> Any:
    if name == "QuickstartSuite":  # its place up to 0.1, which saved configurations name
        return import_module("freemerge.quickstart").QuickstartSuite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
