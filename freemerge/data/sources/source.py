"""A task source: a configurable description of where one task's data come from.

A suite of sources (`SourceSuite`) maps task names to sources of any kinds. A source is a dataclass with one method:

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

_MODULE_INTERNALS = set(vars(torch.nn.Module())) - {"_parameters", "_buffers", "_modules"}


@dataclass(kw_only=True)
class TaskSource(ABC):
    """Base class of task sources.

    Args:
        train_size: number of training samples, drawn with the suite's seed; None takes all.
        val_size: likewise for validation.
        test_size: likewise for test.
        val_fraction: fraction of the training samples that becomes the validation set if the data have none.
        test_fraction: fraction of the training samples that becomes the test set if the data have none.

    Raises:
        ValueError: if a size is below 1, or the fractions are not positive or leave no training samples.
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
                f"{type(self).__name__}: val_fraction and test_fraction must be above 0 and their sum below 1, got "
                f"{self.val_fraction} and {self.test_fraction}"
            )

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to do here
        """Download what `build` needs; nothing by default. Called in one process per node."""

    @abstractmethod
    def build(self, name: str, seed: int) -> Task:
        """Build the task.

        Args:
            name: the task's name in the suite.
            seed: seed of everything that is drawn at random.

        Returns:
            The task.

        Raises:
            ValueError: if the data are missing or not as the source describes.
        """

    def files(self) -> list[Path]:
        """The files that the task is read from. Their content is part of the identity.

        Returns:
            Paths; none by default.
        """
        return []

    def identity(self) -> dict[str, Any]:
        """What determines the data: the class, its fields, and the content of its files, wherever these are stored.

        Returns:
            JSON-compatible values.
        """
        files = self.files()
        names = {path: f"file {index}" for index, path in enumerate(files)}
        return {**_replace_paths(describe(self), names), "content": [content_hash(path) for path in files]}

    def split_samples(self, sizes: Mapping[str, int], name: str, seed: int) -> dict[str, tuple[str, Tensor]]:
        """Select the samples of each split: cut missing splits from the training samples, then apply the sizes.

        Args:
            sizes: split → number of samples in the data; must contain `train`.
            name: the task's name.
            seed: seed of the draws; the same seed gives the same splits on every machine.

        Returns:
            train, val and test → (the split of the data that the samples come from, their ascending int64 indices).

        Raises:
            DataError: if a split is empty.
        """
        if not sizes.get("train"):
            raise DataError(f"task {name!r}: there are no training samples")
        selected = {split: (split, torch.arange(size)) for split, size in sizes.items() if split in SPLITS}
        missing = [split for split in ("val", "test") if split not in selected]
        order = torch.randperm(sizes["train"], generator=_generator(seed, name, "deal"))
        for split in missing:
            size = round(sizes["train"] * getattr(self, f"{split}_fraction"))
            selected[split], order = ("train", order[:size].sort().values), order[size:]
        selected["train"] = ("train", order.sort().values if missing else selected["train"][1])
        for split, (origin, indices) in selected.items():
            if len(indices) == 0:
                fraction = getattr(self, f"{split}_fraction", None)
                cut = f": {split}_fraction {fraction} of {sizes['train']} samples is 0" if origin != split else ""
                raise DataError(f"task {name!r}: there are no samples for {split}{cut}")
            size = getattr(self, f"{split}_size")
            if size is not None and size < len(indices):
                chosen = torch.randperm(len(indices), generator=_generator(seed, name, split))[:size].sort().values
                selected[split] = (origin, indices[chosen])
        return {split: selected[split] for split in SPLITS}

    deal = split_samples  # the name in version 0.1, which sources outside of freemerge may call


def _generator(seed: int, *keys: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def describe(value: Any) -> Any:
    """Describe any configured value by plain data, which are equal for equal configurations.

    Args:
        value: any value. Objects are described by their class and attributes, so that the result does not depend on
            memory addresses; arrays and tensors by dtype, shape and a SHA-256.

    Returns:
        JSON-compatible values.
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
    if isinstance(value, torch.nn.Module):  # hooks and flags differ between torch versions and say nothing about it
        names = [name for name in names if name not in _MODULE_INTERNALS]
    return {
        "class": class_name(kind),
        **{name: describe(getattr(value, name)) for name in names},
    }


def _replace_paths(value: Any, names: Mapping[Path, str]) -> Any:
    """Replace the paths of files in a description by names."""
    if isinstance(value, dict):
        return {key: _replace_paths(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_paths(item, names) for item in value]
    return names.get(Path(os.path.expanduser(value)), value) if isinstance(value, str) else value


def content_hash(path: Path) -> str:
    """The SHA-256 of a file's content, cached until the file's size or modification time changes.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: if there is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    status = path.stat()
    return _content_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
