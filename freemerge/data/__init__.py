"""Tasks, task suites, and the sources that tasks are read from."""

from freemerge.data.arrays import ArrayDataset, Augmentation, Preprocessing
from freemerge.data.augment import Compose, GaussianNoise, RandomAffine, RandomContrast, RandomFlip
from freemerge.data.batches import StackedBatch, collate
from freemerge.data.errors import DataError, DataWarning, listed
from freemerge.data.loaders import derive_seed, lengths_of, names_of
from freemerge.data.mixture import TaskData, TaskMixture
from freemerge.data.prompts import Prompts, known_prompts, load_prompts
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
from freemerge.data.sources.source import SPLITS
from freemerge.data.sources.texts import load_tokenizer
from freemerge.data.suite import SuiteTask, TaskSuite
from freemerge.data.task_metrics import ExactMatch, TaskMetric, metric_for
from freemerge.data.tasks import Kind, Task, check_templates
from freemerge.data.tokens import TokenDataset
from freemerge.moved import names_that_moved

__all__ = [
    "SPLITS",
    "ArrayDataset",
    "Augmentation",
    "Compose",
    "DataError",
    "DataWarning",
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
    "Prompts",
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
    "check_templates",
    "collate",
    "derive_seed",
    "known_prompts",
    "lengths_of",
    "listed",
    "load_prompts",
    "load_tokenizer",
    "metric_for",
    "names_of",
    "random_state",
    "set_random_state",
]


__getattr__ = names_that_moved(__name__)
