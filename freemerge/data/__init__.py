"""Tasks and task suites."""

from importlib import import_module
from typing import Any

from freemerge.data.arrays import ArrayDataset, Augmentation, Preprocessing
from freemerge.data.augment import Compose, GaussianNoise, RandomAffine, RandomContrast, RandomFlip
from freemerge.data.batches import StackedBatch, collate
from freemerge.data.loaders import derive_seed, names_of
from freemerge.data.mixture import TaskData, TaskMixture
from freemerge.data.resumable import ResumableLoader, random_state, set_random_state
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
from freemerge.data.sources.texts import load_tokenizer
from freemerge.data.suite import SuiteTask, TaskSuite
from freemerge.data.task_metrics import ExactMatch, TaskMetric, metric_for
from freemerge.data.tasks import Kind, Task
from freemerge.data.tokens import TokenDataset

__all__ = [
    "ArrayDataset",
    "Augmentation",
    "Compose",
    "ExactMatch",
    "GaussianNoise",
    "HuggingFaceImageSource",
    "HuggingFaceTextSource",
    "ImageFolderSource",
    "ImageSource",
    "Kind",
    "NpzSource",
    "NpzSuite",
    "PooledSource",
    "Preprocessing",
    "RandomAffine",
    "RandomContrast",
    "RandomFlip",
    "ResumableLoader",
    "SourceSuite",
    "StackedBatch",
    "SuiteTask",
    "Task",
    "TaskData",
    "TaskMetric",
    "TaskMixture",
    "TaskSource",
    "TaskSuite",
    "TextSource",
    "TextTableSource",
    "TextTableSuite",
    "TokenDataset",
    "TorchvisionSource",
    "collate",
    "derive_seed",
    "load_tokenizer",
    "metric_for",
    "names_of",
    "random_state",
    "set_random_state",
]


def __getattr__(name: str) -> Any:
    if name == "QuickstartSuite":  # its place up to 0.1, which saved configurations name
        return import_module("freemerge.quickstart").QuickstartSuite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
