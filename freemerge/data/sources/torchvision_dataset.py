"""Any classification dataset of torchvision."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from freemerge.checkpoints.places import expand
from freemerge.data.pictures import PictureDataset
from freemerge.data.sources.images import ImageSource
from freemerge.data.tasks import Task


@dataclass(kw_only=True)
class TorchvisionSource(ImageSource):
    """A task from one of torchvision's datasets.

    Args:
        dataset: name of a class of torchvision.datasets, such as `SVHN`, or the class path of one like them.
        root: folder that it is kept in; null for datasets without one.
        download: whether to download what is not there.
        train: arguments of the class for the training samples; None is `train=True` or `split="train"`, whichever the
            class has.
        val: likewise for validation; None cuts it from the training samples.
        test: likewise for test; None is `train=False` or `split="test"`, or cut from the training samples where the
            class has neither.
        classes: names of the classes, where the dataset does not know them.
    """

    dataset: str
    root: str | None = "data"
    download: bool = False
    train: dict[str, Any] | None = None
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    classes: list[str] | None = None

    def prepare(self) -> None:
        if self.download:
            for split in self._arguments():
                self._open(split, download=True)

    def build(self, name: str, seed: int) -> Task:
        parts = {split: self._open(split) for split in self._arguments()}
        classes = self.classes or _classes(parts["train"])
        if not classes:
            raise ValueError(f"task {name!r}: {self.dataset} does not name its classes; give `classes`")
        sizes = {split: len(part) for split, part in parts.items()}
        datasets = {
            split: PictureDataset(parts[origin].__getitem__, index, self.preprocessing(split), self.image_size)
            for split, (origin, index) in self.deal(sizes, name, seed).items()
        }
        return Task(name, tuple(classes), **datasets, metric=self.metric, templates=tuple(self.templates or ()))

    def _class(self) -> type:
        from torchvision import datasets

        module, _, name = self.dataset.rpartition(".")
        found = getattr(importlib.import_module(module) if module else datasets, name, None)
        if found is None:
            near = difflib.get_close_matches(name, datasets.__all__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"TorchvisionSource: there is no dataset {self.dataset!r}{hint}")
        return found

    def _arguments(self) -> dict[str, dict[str, Any]]:
        """Split → arguments of the class, for the splits that it has."""
        known = inspect.signature(self._class().__init__).parameters
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
        if download and "download" in inspect.signature(self._class().__init__).parameters:
            arguments["download"] = True
        try:
            return self._class()(**({"root": str(expand(self.root))} if self.root is not None else {}), **arguments)
        except (RuntimeError, TypeError, ValueError) as error:  # not downloaded, not an argument, not a split
            reason = " ".join(str(error).split())
            raise ValueError(f"TorchvisionSource: {self.dataset}, {split}: {reason}") from error


def _classes(dataset: Any) -> tuple[str, ...]:
    """The names of its classes, or numbers where it only has labels; empty where it does not say."""
    if names := getattr(dataset, "classes", None):
        return tuple(str(name) for name in names)
    for attribute in ("targets", "labels", "_labels"):
        if (labels := getattr(dataset, attribute, None)) is not None:
            return tuple(map(str, range(int(torch.as_tensor(labels).max()) + 1)))
    count = getattr(dataset, "num_classes", 0)
    return tuple(map(str, range(count)))
