"""Images in one folder per class."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from freemerge.checkpoints import expand
from freemerge.data.errors import DataError, DataWarning, listed
from freemerge.data.image_dataset import ImageDataset
from freemerge.data.sources.image_files import ImageFolder, check_files, scan
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.source import SPLITS
from freemerge.data.tasks import Task

_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}


@dataclass(kw_only=True)
class ImageFolderSource(ImageSource):
    """A task in a folder of images: `<folder>/<class>/*.jpg`, or `<folder>/{train,val,test}/<class>/*.jpg`.

    Without a folder of their own, val and test are cut from train, using the suite's seed. The folders' names are the
    class names. Hidden folders and class folders without an image are skipped with a warning. All images are converted
    to RGB, or to grey if `channels` is 1, and rotated according to their EXIF orientation.

    Args:
        folder: the folder.
    """

    folder: str

    def identity(self) -> dict[str, Any]:
        """What determines the data: the class, its fields, and the names and sizes of the images.

        The content of the images is not included, because reading it would take long. The folder's location does not
        change the identity.

        Returns:
            JSON-compatible values.
        """
        root = expand(self.folder)
        files = sorted(
            path for folder in _split_folders(root).values() if folder.is_dir() for path in scan(folder).files
        )
        listing = "\n".join(f"{path.relative_to(root)} {_size(path)}" for path in files)
        digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
        return {**super().identity(), "folder": root.name, "listing": digest, "version": 2}  # 2: EXIF, 16 bits

    def build(self, name: str, seed: int) -> Task:
        """Build the task; see `TaskSource.build`.

        Args:
            name: the task's name.
            seed: seed of the splits and subsets.

        Returns:
            The task.

        Raises:
            DataError: if the folder does not exist, a split has a class that train lacks, or a file is damaged (see
                `check_files`).
        """
        root = expand(self.folder)
        if not root.is_dir():
            raise DataError(f"task {name!r}: {root}: there is no such folder")
        where = f"task {name!r}"
        folders = {split: scan(folder) for split, folder in _split_folders(root).items()}
        _check_classes(where, folders)
        for folder in folders.values():
            if folder.skipped:
                rank_zero_warn(f"{where}: {folder.root}: skipped: {'; '.join(folder.skipped)}", category=DataWarning)
        classes = folders["train"].classes
        selected = self.split_samples({split: len(folder) for split, folder in folders.items()}, name, seed)
        check_files(where, [folders[origin].files[i] for origin, index in selected.values() for i in index.tolist()])
        datasets = {
            split: ImageDataset(
                _Fetch(folders[origin], classes),
                index,
                self.preprocessing(split),
                self.image_size,
                folders[origin].name,
                channels=self.channels or 3,
            )
            for split, (origin, index) in selected.items()
        }
        train, val, test = (datasets[split] for split in SPLITS)
        called, templates = self.named(name, classes), tuple(self.templates or ())
        return Task(name, called, train, val, test, metric=self.metric, templates=templates)


class _Fetch:
    """Index → (image, index of its class in train). At module level, because loader workers pickle it."""

    def __init__(self, folder: ImageFolder, classes: tuple[str, ...]) -> None:
        self.folder = folder
        self.label = [classes.index(name) for name in folder.classes]

    def __call__(self, index: int) -> tuple[Any, int]:
        image, label = self.folder.fetch(index)
        return image, self.label[label]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a broken link is reported when the task is built


def _split_folders(root: Path) -> dict[str, Path]:
    """Split → its folder; if there is no folder for train, the whole folder is train."""
    if not root.is_dir():
        return {}
    there = {path.name.lower(): path for path in sorted(root.iterdir(), reverse=True) if path.is_dir()}
    folders = {split: next((there[name] for name in names if name in there), None) for split, names in _FOLDERS.items()}
    if folders["train"] is not None:
        return {split: folder for split, folder in folders.items() if folder is not None}
    for split in ("val", "test"):
        folder = folders[split]
        if folder is not None and any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir()):
            raise DataError(f"{root}: there is a folder {folder.name!r} with class folders, but no folder 'train'")
    return {"train": root}


def _check_classes(where: str, folders: dict[str, ImageFolder]) -> None:
    train = folders["train"]
    for folder in folders.values():
        if len(folder) == 0:
            inside = f": {'; '.join(folder.skipped)}" if folder.skipped else ""
            raise DataError(
                f"{where}: {folder.root}: the folder has no image; expected one folder of images per class{inside}"
            )
        if unknown := set(folder.classes) - set(train.classes):
            different = sorted(unknown | (set(train.classes) - set(folder.classes)))
            raise DataError(f"{where}: {folder.root}: the classes differ from those of train: {listed(different, 20)}")
        if missing := sorted(set(train.classes) - set(folder.classes)):
            rank_zero_warn(f"{where}: {folder.root}: no image of {listed(missing)}", category=DataWarning)
    if len(train.classes) == 1:
        raise DataError(
            f"{where}: {train.root}: the only folder of images is {train.classes[0]!r}; expected one per class, and at "
            f"least two"
        )
