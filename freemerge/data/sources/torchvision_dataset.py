"""Sources that read torchvision's classification datasets."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freemerge.checkpoints import expand
from freemerge.data.errors import DataError, reason_of
from freemerge.data.image_dataset import ImageDataset
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.source import SPLITS
from freemerge.data.tasks import Task


@dataclass(kw_only=True)
class TorchvisionSource(ImageSource):
    """A task from one of torchvision's datasets.

    Args:
        dataset: name of a class of torchvision.datasets, such as `SVHN`, or the class path of a similar class.
        root: the dataset's folder; null for datasets without one.
        download: whether to download missing data.
        train: arguments of the class for the training samples; None is `train=True` or `split="train"`, whichever the
            class has.
        val: likewise for validation; None cuts validation from the training samples.
        test: likewise for test; None is `train=False` or `split="test"`; if the class has neither, test is cut from the
            training samples.
        classes: the class names, if the dataset does not have them.
    """

    dataset: str
    root: str | None = "data"
    download: bool = False
    train: dict[str, Any] | None = None
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    classes: list[str] | None = None

    def prepare(self) -> None:
        """Download missing data, if `download` is set."""
        if self.download:
            for split in self._arguments():
                self._open(split, download=True)

    def build(self, name: str, seed: int) -> Task:
        """Build the task; see `TaskSource.build`.

        Args:
            name: the task's name.
            seed: seed of the splits and subsets.

        Returns:
            The task.

        Raises:
            DataError: if torchvision cannot open the dataset, or the class names are unknown.
        """
        parts = {split: self._open(split) for split in self._arguments()}
        classes = self.classes or _classes(parts["train"])
        if not classes:
            raise DataError(f"task {name!r}: {self.dataset} does not name its classes; set `classes`")
        sizes = {split: len(part) for split, part in parts.items()}
        datasets = {
            split: ImageDataset(
                parts[origin].__getitem__,
                index,
                self.preprocessing(split),
                self.image_size,
                _Names(f"{self.dataset}, {origin}", parts[origin]),
                len(classes),
            )
            for split, (origin, index) in self.split_samples(sizes, name, seed).items()
        }
        train, val, test = (datasets[split] for split in SPLITS)
        called, templates = self.named(name, classes), tuple(self.templates or ())
        return Task(name, called, train, val, test, metric=self.metric, templates=templates)

    def _class(self) -> type:
        from torchvision import datasets

        module, _, name = self.dataset.rpartition(".")
        try:
            found = getattr(importlib.import_module(module) if module else datasets, name, None)
        except ImportError as error:
            raise DataError(f"TorchvisionSource: {self.dataset}: {reason_of(error)}") from error
        if not isinstance(found, type):
            near = difflib.get_close_matches(name, datasets.__all__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"TorchvisionSource: there is no dataset {self.dataset!r}{hint}")
        return found

    def _arguments(self) -> dict[str, dict[str, Any]]:
        """Split → arguments of the class, for the splits that the dataset has."""
        known = inspect.signature(self._class()).parameters
        usual: dict[str, dict[str, Any]]
        if "train" in known:
            usual = {"train": {"train": True}, "test": {"train": False}}
        elif "split" in known:
            usual = {"train": {"split": "train"}, "test": {"split": "test"}}
        else:
            usual = {"train": {}}
        own = {"train": self.train, "val": self.val, "test": self.test}
        return {**usual, **{split: arguments for split, arguments in own.items() if arguments is not None}}

    def _open(self, split: str, download: bool = False) -> Any:
        arguments = dict(self._arguments()[split])
        if download and "download" in inspect.signature(self._class()).parameters:
            arguments["download"] = True
        try:
            return self._class()(**({"root": str(expand(self.root))} if self.root is not None else {}), **arguments)
        except (RuntimeError, TypeError, ValueError, OSError, ImportError) as error:
            # Causes: not downloaded, an unknown argument or split, no such folder, a missing package.
            reason = reason_of(error)
            if "download=True" in reason and not self.download:
                reason += "; in a configuration: download: true"
            raise DataError(f"TorchvisionSource: {self.dataset}, {split}: {reason}") from error


class _Names:
    """Index → a sample's file name, or else its number. At module level, because loader workers pickle it."""

    def __init__(self, where: str, dataset: Any) -> None:
        self.where = where
        self.dataset = dataset

    def __call__(self, index: int) -> str:
        for attribute in ("samples", "imgs", "_samples", "_image_files", "_images"):
            files = getattr(self.dataset, attribute, None)
            if isinstance(files, list) and index < len(files):
                file = files[index][0] if isinstance(files[index], tuple) else files[index]
                if isinstance(file, (str, Path)):
                    return str(file)
        return f"{self.where}, sample {index}"


def _classes(dataset: Any) -> tuple[str, ...]:
    """A dataset's class names, or numbers if it has labels only; empty if it has neither."""
    if names := getattr(dataset, "classes", None):
        return tuple(str(name) for name in names)
    for attribute in ("targets", "labels", "_labels"):
        if (labels := getattr(dataset, attribute, None)) is not None:
            try:
                return tuple(map(str, range(int(torch.as_tensor(labels).max()) + 1)))
            except (TypeError, ValueError, RuntimeError):  # the labels are not one number per sample
                return ()
    count = getattr(dataset, "num_classes", 0)
    return tuple(map(str, range(count)))
