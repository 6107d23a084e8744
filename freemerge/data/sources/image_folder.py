"""Pictures in folders, one per class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freemerge.checkpoints.places import expand
from freemerge.data.pictures import PictureDataset
from freemerge.data.sources.images import ImageSource
from freemerge.data.tasks import Task

_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


@dataclass(kw_only=True)
class ImageFolderSource(ImageSource):
    """A task in a folder of pictures: `<folder>/<class>/*.jpg`, or `<folder>/{train,val,test}/<class>/*.jpg`.

    Val and test are cut from train, by the suite's seed, where they have no folder. Class names are the folders'.

    Args:
        folder: the folder.
    """

    folder: str

    def identity(self) -> dict[str, Any]:
        """The class, the fields, and the names and sizes of the files; their content would take long to read.

        Where the folder is does not count.
        """
        root = expand(self.folder)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in files)
        return {**super().identity(), "folder": root.name, "listing": hashlib.sha256(listing.encode()).hexdigest()}

    def build(self, name: str, seed: int) -> Task:
        root = expand(self.folder)
        if not root.is_dir():
            raise ValueError(f"task {name!r}: {root}: there is no such folder")
        places = {
            split: next((root / folder for folder in folders if (root / folder).is_dir()), None)
            for split, folders in _FOLDERS.items()
        }
        if places["train"] is None:
            places = {"train": root}
        folders = {split: _open(name, place) for split, place in places.items() if place is not None}
        classes = folders["train"].classes
        for split, folder in folders.items():
            if folder.classes != classes:
                different = sorted(set(folder.classes) ^ set(classes))
                raise ValueError(f"task {name!r}: {places[split]}: other classes than in train: {', '.join(different)}")
        sizes = {split: len(folder) for split, folder in folders.items()}
        datasets = {
            split: PictureDataset(folders[origin].__getitem__, index, self.preprocessing(split), self.image_size)
            for split, (origin, index) in self.deal(sizes, name, seed).items()
        }
        return Task(name, tuple(classes), **datasets, metric=self.metric, templates=tuple(self.templates or ()))


def _open(name: str, place: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(place)
    except FileNotFoundError as error:  # no class folder in it, or no picture in one
        reason = " ".join(str(error).split())
        raise ValueError(f"task {name!r}: {place}: expected one folder of pictures per class ({reason})") from error
