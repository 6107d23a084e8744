"""Pictures in folders, one per class."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from freemerge.checkpoints import expand
from freemerge.data.errors import DataError, DataWarning, listed
from freemerge.data.pictures import PictureDataset
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.picture_files import PictureFolder, check_files, scan
from freemerge.data.sources.source import SPLITS
from freemerge.data.tasks import Task

_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}


@dataclass(kw_only=True)
class ImageFolderSource(ImageSource):
    """A task in a folder of pictures: `<folder>/<class>/*.jpg`, or `<folder>/{train,val,test}/<class>/*.jpg`.

    Val and test are cut from train, by the suite's seed, where they have no folder. Class names are the folders'.
    Hidden folders and files, and class folders without a picture, are left out with a warning. Pictures of every mode
    become RGB, or grey where `channels` is 1; those that say how they must be turned (EXIF) are turned.

    Args:
        folder: the folder.
    """

    folder: str

    def identity(self) -> dict[str, Any]:
        """The class, the fields, and the names and sizes of the pictures; their content would take long to read.

        Where the folder is does not count.
        """
        root = expand(self.folder)
        files = sorted(path for place in _places(root).values() if place.is_dir() for path in scan(place).files)
        listing = "\n".join(f"{path.relative_to(root)} {_size(path)}" for path in files)
        digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
        return {**super().identity(), "folder": root.name, "listing": digest, "version": 2}  # 2: EXIF, 16 bits

    def build(self, name: str, seed: int) -> Task:
        """Builds the task.

        Raises:
            DataError: if the folder is not there, a split has a class that train has not, or a picture is damaged as
                far as the ends of its file tell.
        """
        root = expand(self.folder)
        if not root.is_dir():
            raise DataError(f"task {name!r}: {root}: there is no such folder")
        where = f"task {name!r}"
        folders = {split: scan(place) for split, place in _places(root).items()}
        _check_classes(where, folders)
        for folder in folders.values():
            if folder.skipped:
                rank_zero_warn(f"{where}: {folder.root}: left out: {'; '.join(folder.skipped)}", category=DataWarning)
        classes = folders["train"].classes
        dealt = self.deal({split: len(folder) for split, folder in folders.items()}, name, seed)
        check_files(where, [folders[origin].files[i] for origin, index in dealt.values() for i in index.tolist()])
        datasets = {
            split: PictureDataset(
                _Fetch(folders[origin], classes),
                index,
                self.preprocessing(split),
                self.image_size,
                folders[origin].name,
                channels=self.channels or 3,
            )
            for split, (origin, index) in dealt.items()
        }
        train, val, test = (datasets[split] for split in SPLITS)
        return Task(name, classes, train, val, test, metric=self.metric, templates=tuple(self.templates or ()))


class _Fetch:
    """Index → (picture, index of its class in train); at module level: loader workers pickle it."""

    def __init__(self, folder: PictureFolder, classes: tuple[str, ...]) -> None:
        self.folder = folder
        self.label = [classes.index(name) for name in folder.classes]

    def __call__(self, index: int) -> tuple[Any, int]:
        picture, label = self.folder.fetch(index)
        return picture, self.label[label]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a link to nowhere is named when the task is built


def _places(root: Path) -> dict[str, Path]:
    """Split → its folder; the whole is train if no folder is called so."""
    if not root.is_dir():
        return {}
    there = {path.name.lower(): path for path in sorted(root.iterdir(), reverse=True) if path.is_dir()}
    places = {split: next((there[name] for name in names if name in there), None) for split, names in _FOLDERS.items()}
    if places["train"] is not None:
        return {split: place for split, place in places.items() if place is not None}
    for split in ("val", "test"):
        place = places[split]
        if place is not None and any(path.is_dir() and not path.name.startswith(".") for path in place.iterdir()):
            raise DataError(f"{root}: there is a folder {place.name!r} of folders, but none called 'train' beside it")
    return {"train": root}


def _check_classes(where: str, folders: dict[str, PictureFolder]) -> None:
    train = folders["train"]
    for folder in folders.values():
        if len(folder) == 0:
            inside = f": {'; '.join(folder.skipped)}" if folder.skipped else ""
            raise DataError(
                f"{where}: {folder.root}: there is no picture in it; expected one folder of pictures per class{inside}"
            )
        if unknown := set(folder.classes) - set(train.classes):
            different = sorted(unknown | (set(train.classes) - set(folder.classes)))
            raise DataError(f"{where}: {folder.root}: other classes than in train: {listed(different, 20)}")
        if missing := sorted(set(train.classes) - set(folder.classes)):
            rank_zero_warn(f"{where}: {folder.root}: no picture of {listed(missing)}", category=DataWarning)
    if len(train.classes) == 1:
        raise DataError(
            f"{where}: {train.root}: there is one folder of pictures in it, {train.classes[0]!r}; expected one per "
            f"class, and at least two"
        )
