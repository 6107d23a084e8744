"""Images in one NPZ file per task."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freemerge.checkpoints.places import expand
from freemerge.data.arrays import ArrayDataset
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.source import SPLITS
from freemerge.data.tasks import Task


@dataclass(kw_only=True)
class NpzSource(ImageSource):
    """A task in one NPZ file: arrays `{train,val,test}_images` uint8 (N, H, W) or (N, H, W, C), `{split}_labels`
    integer (N,), and `class_names` (C,). Missing val and test are cut from train; missing names are numbers.

    Args:
        path: the file.
        labels: which labels, where there are several: the array is called `{split}_<labels>`.
    """

    path: str
    labels: str = "labels"

    def files(self) -> list[Path]:
        return [expand(self.path)]

    def build(self, name: str, seed: int) -> Task:
        arrays = self._read()
        given = {split: self._labels(arrays, split) for split in SPLITS if f"{split}_images" in arrays}
        images = {split: self._images(arrays, split, len(labels)) for split, labels in given.items()}
        names = self._class_names(arrays, given)
        datasets = {}
        for split, (origin, index) in self.deal({s: len(x) for s, x in given.items()}, name, seed).items():
            labels, pixels = given[origin][index], images[origin][index]
            datasets[split] = ArrayDataset(pixels, labels, preprocessing=self.preprocessing(split))
        return Task(name, names, **datasets, metric=self.metric, templates=tuple(self.templates or ()))

    def _read(self) -> dict[str, np.ndarray]:
        path = expand(self.path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        try:
            with np.load(path, allow_pickle=False) as file:
                wanted = [key for key in file.files if key.endswith(("_images", f"_{self.labels}", "class_names"))]
                return {key: file[key] for key in wanted}
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not an NPZ file of plain arrays ({error})") from error

    def _images(self, arrays: dict[str, Any], split: str, expected: int) -> Tensor:
        """uint8 (N, C, H, W)."""
        images = arrays[f"{split}_images"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != expected:
            raise ValueError(
                f"{self.path}: {split}_images must be uint8 ({expected}, H, W) or ({expected}, H, W, C), "
                f"got {images.dtype} {images.shape}"
            )
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()

    def _labels(self, arrays: dict[str, Any], split: str) -> Tensor:
        key = f"{split}_{self.labels}"
        if key not in arrays:
            raise ValueError(f"{self.path}: there is no array {key!r}; it has {', '.join(sorted(arrays))}")
        if arrays[key].ndim != 1 or arrays[key].dtype.kind not in "iu":
            raise ValueError(f"{self.path}: {key} must be integers (N,), got {arrays[key].dtype} {arrays[key].shape}")
        return torch.from_numpy(arrays[key].astype(np.int64))

    def _class_names(self, arrays: dict[str, Any], labels: dict[str, Tensor]) -> tuple[str, ...]:
        if not labels:
            raise ValueError(f"{self.path}: there is no array 'train_images'")
        everything = torch.cat(list(labels.values()))
        lowest, highest = int(everything.min()), int(everything.max())
        key = "class_names" if self.labels == "labels" else self.labels.removesuffix("labels") + "class_names"
        names = tuple(str(name) for name in arrays[key]) if key in arrays else tuple(map(str, range(highest + 1)))
        if lowest < 0 or highest >= len(names):
            raise ValueError(f"{self.path}: labels go from {lowest} to {highest}, and there are {len(names)} classes")
        return names
