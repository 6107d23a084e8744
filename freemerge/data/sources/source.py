"""A task source: where one task's data come from, as a plain value that a configuration can hold.

A suite of sources (`SourceSuite`) is a mapping from task names to sources, so one suite mixes kinds freely. A source is
a dataclass with one method:

    @dataclass(kw_only=True)
    class Birds(TaskSource):
        root: str

        def build(self, name: str, seed: int) -> Task: ...
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freemerge.data.errors import DataError
from freemerge.data.loaders import derive_seed
from freemerge.data.tasks import Task
from freemerge.names import class_name

SPLITS = ("train", "val", "test")

_OF_MODULES = set(vars(torch.nn.Module())) - {"_parameters", "_buffers", "_modules"}


@dataclass(kw_only=True)
class TaskSource(ABC):
    """Base class of task sources.

    Args:
        train_size: take so many training samples, drawn by the suite's seed; None takes all.
        val_size: likewise for validation.
        test_size: likewise for test.
        val_fraction: share of the training samples that becomes the validation set where the source has none.
        test_fraction: share of the training samples that becomes the test set where the source has none.
    """

    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        for split in SPLITS:
            if (size := getattr(self, f"{split}_size")) is not None and size < 1:
                raise ValueError(f"{type(self).__name__}: {split}_size must be at least 1, got {size}")
        fractions = (self.val_fraction, self.test_fraction)
        if min(fractions) <= 0 or sum(fractions) >= 1:
            raise ValueError(
                f"{type(self).__name__}: val_fraction and test_fraction must be above 0 and leave something to train "
                f"on, got {self.val_fraction} and {self.test_fraction}"
            )

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to do here
        """Downloads what `build` needs; nothing by default. Called in one process per node."""

    @abstractmethod
    def build(self, name: str, seed: int) -> Task:
        """Builds the task.

        Args:
            name: what the suite calls it.
            seed: of everything that is drawn.

        Raises:
            ValueError: if the data are not there, or not what the source says.
        """

    def files(self) -> list[Path]:
        """The files that the task depends on: a changed file is other data."""
        return []

    def identity(self) -> dict[str, Any]:
        """What determines the data: the class, its fields, and the content of its files, wherever they are."""
        files = self.files()
        names = {path: f"file {index}" for index, path in enumerate(files)}
        return {**_renamed(describe(self), names), "content": [content_hash(path) for path in files]}

    def deal(self, sizes: Mapping[str, int], name: str, seed: int) -> dict[str, tuple[str, Tensor]]:
        """Which samples each split gets: missing splits are cut from the training samples, then sizes are applied.

        Args:
            sizes: how many samples there are, by split; `train` among them.
            name: the task's name.
            seed: of the draws; equal seeds deal equally on every machine.

        Returns:
            For train, val and test: which of the given splits the samples are from, and their indices in it, ascending.

        Raises:
            ValueError: if a split comes out empty.
        """
        if not sizes.get("train"):
            raise DataError(f"task {name!r}: there are no training samples")
        dealt = {split: (split, torch.arange(size)) for split, size in sizes.items() if split in SPLITS}
        missing = [split for split in ("val", "test") if split not in dealt]
        order = torch.randperm(sizes["train"], generator=_generator(seed, name, "deal"))
        for split in missing:
            size = round(sizes["train"] * getattr(self, f"{split}_fraction"))
            dealt[split], order = ("train", order[:size].sort().values), order[size:]
        dealt["train"] = ("train", order.sort().values if missing else dealt["train"][1])
        for split, (origin, indices) in dealt.items():
            if len(indices) == 0:
                share = getattr(self, f"{split}_fraction", None)
                cut = f": {split}_fraction {share} of {sizes['train']} is none" if origin != split else ""
                raise DataError(f"task {name!r}: there are no samples for {split}{cut}")
            size = getattr(self, f"{split}_size")
            if size is not None and size < len(indices):
                chosen = torch.randperm(len(indices), generator=_generator(seed, name, split))[:size].sort().values
                dealt[split] = (origin, indices[chosen])
        return {split: dealt[split] for split in SPLITS}


def _generator(seed: int, *keys: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def describe(value: Any) -> Any:
    """Any configured value as plain data that is equal for equal configurations.

    Objects count by their class and their attributes, so that what comes out says nothing of where they are in memory.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((describe(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if hasattr(value, "__qualname__"):  # a class or a function
        return class_name(value)
    kind = type(value)
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(getattr(value, "__dict__", ()))
    if isinstance(value, torch.nn.Module):  # its hooks and flags are torch's business, and differ between versions
        names = [name for name in names if name not in _OF_MODULES]
    return {
        "class": class_name(kind),
        **{name: describe(getattr(value, name)) for name in names},
    }


def _renamed(value: Any, names: Mapping[Path, str]) -> Any:
    """A description in which names stand for the places of files."""
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(Path(os.path.expanduser(value)), value) if isinstance(value, str) else value


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content, remembered as long as its size and time stay the same.

    Raises:
        ValueError: if there is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    status = path.stat()
    return _content_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
