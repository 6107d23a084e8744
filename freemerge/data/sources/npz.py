"""Images in one NPZ file per task."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from freemerge.checkpoints import expand
from freemerge.data.arrays import ArrayDataset
from freemerge.data.errors import DataError, DataWarning, listed, reason_of
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.source import SPLITS
from freemerge.data.tasks import Task

Arrays = Mapping[str, np.ndarray]


@dataclass(kw_only=True)
class NpzSource(ImageSource):
    """A task in one NPZ file.

    The file has the arrays `{train,val,test}_images`, uint8 (N, H, W) or (N, H, W, C), `{train,val,test}_labels`,
    integers (N,), and `class_names` (C,). Val and test are cut from train if they are missing; without `class_names`,
    the classes are named by their indices.

    Args:
        path: the file.
        labels: selects among several sets of labels: the arrays `{train,val,test}_<labels>` are used.
    """

    path: str
    labels: str = "labels"

    def files(self) -> list[Path]:
        """The NPZ file."""
        return [expand(self.path)]

    def build(self, name: str, seed: int) -> Task:
        """Build the task; see `TaskSource.build`.

        Args:
            name: the task's name.
            seed: seed of the splits and subsets.

        Returns:
            The task.

        Raises:
            DataError: if the file is not an NPZ file, or an array is missing or invalid; names the array.
        """
        arrays = self._read()
        given = {split: self._labels(arrays, split) for split in SPLITS if f"{split}_images" in arrays}
        if "train" not in given:
            raise DataError(f"{self.path}: there is no array 'train_images'; its arrays: {listed(sorted(arrays), 20)}")
        images = {split: self._images(arrays, split, len(labels)) for split, labels in given.items()}
        names = self._class_names(arrays, given)
        self._check_channels(images)
        datasets = {}
        for split, (origin, index) in self.split_samples({s: len(x) for s, x in given.items()}, name, seed).items():
            labels, pixels = given[origin][index], images[origin][index]
            datasets[split] = ArrayDataset(pixels, labels, preprocessing=self.preprocessing(split))
            if split == "test":
                datasets[split].sample_names = [f"{origin}_images[{i}]" for i in index.tolist()]
        train, val, test = (datasets[split] for split in SPLITS)
        called, templates = self.named(name, names), tuple(self.templates or ())
        return Task(name, called, train, val, test, metric=self.metric, templates=templates)

    def _read(self) -> dict[str, np.ndarray]:
        """Read the arrays that this source uses; other names map to empty arrays."""
        path = expand(self.path)
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        arrays, key = {}, None
        try:
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError(f"{path}: not an NPZ file but a single array: save it with np.savez")
            with file:
                for key in file.files:
                    wanted = key.endswith(("_images", f"_{self.labels}", "class_names"))
                    arrays[key] = file[key] if wanted else np.empty(0)
        except DataError:
            raise
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if key is None:
                raise DataError(f"{path}: not an NPZ file of plain arrays ({reason_of(error)})") from error
            if "Object arrays" in str(error):
                raise DataError(
                    f"{path}: {key} is an array of Python objects, which are never unpickled: save plain numbers or "
                    f"strings, and images of one shape"
                ) from error
            raise DataError(f"{path}: {key} cannot be read ({reason_of(error)}): the file is damaged") from error
        return arrays

    def _images(self, arrays: Arrays, split: str, expected: int) -> Tensor:
        """A split's images, uint8 (N, C, H, W)."""
        key = f"{split}_images"
        images = arrays[key]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DataError(
                f"{self.path}: {key} must be uint8 ({expected}, H, W) or ({expected}, H, W, C), "
                f"got {images.dtype} {images.shape}{_uint8_advice(images)}"
            )
        if len(images) != expected:
            raise DataError(f"{self.path}: there are {expected} {split}_{self.labels} for {len(images)} {key}")
        if images.ndim == 4 and images.shape[1] in (1, 3, 4) and min(images.shape[2:]) > 4:
            raise DataError(
                f"{self.path}: {key} is {images.shape}: its channels come first, expected (N, H, W, C): save "
                f"{key}.transpose(0, 2, 3, 1)"
            )
        if 0 in images.shape[1:]:
            raise DataError(f"{self.path}: {key} is {images.shape}: its images are empty")
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()

    def _labels(self, arrays: Arrays, split: str) -> Tensor:
        """A split's labels, int64 (N,)."""
        key = f"{split}_{self.labels}"
        if key not in arrays:
            raise DataError(f"{self.path}: there is no array {key!r}; its arrays: {listed(sorted(arrays), 20)}")
        labels = arrays[key]
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"{self.path}: {key} must be integers (N,), got {labels.dtype} {labels.shape}{_label_advice(labels)}"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def _class_names(self, arrays: Arrays, labels: Mapping[str, Tensor]) -> tuple[str, ...]:
        everything = torch.cat(list(labels.values()))
        if len(everything) == 0:
            raise DataError(f"{self.path}: the file has no samples")
        lowest, highest = int(everything.min()), int(everything.max())
        key = "class_names" if self.labels == "labels" else self.labels.removesuffix("labels") + "class_names"
        named = key in arrays
        if named and (arrays[key].ndim != 1 or arrays[key].dtype.kind not in "US"):
            raise DataError(f"{self.path}: {key} must be names (C,), got {arrays[key].dtype} {arrays[key].shape}")
        names = tuple(map(_text, arrays[key])) if named else tuple(map(str, range(highest + 1)))
        if lowest < 0 or highest >= len(names):
            advice = ""
            if lowest == 1 and highest == len(names):
                advice = "; labels start at 0: save labels - 1"
            elif lowest < 0:
                advice = "; a label is a class index from 0: remove samples without a class"
            raise DataError(
                f"{self.path}: labels range from {lowest} to {highest}, but there are {len(names)} classes{advice}"
            )
        if lowest > 0 and not named:
            rank_zero_warn(
                f"{self.path}: labels range from {lowest} to {highest}, but labels start at 0: class 0 has no sample; "
                f"save labels - {lowest}, unless this is intended",
                category=DataWarning,
            )
        return names

    def _check_channels(self, images: Mapping[str, Tensor]) -> None:
        found = {split: pixels.shape[1:] for split, pixels in images.items()}
        for split, (count, *sides) in found.items():
            if self.channels is not None and count not in (1, 3):
                cut = f": {split}_images[..., :3] drops the transparency" if count == 4 else ""
                raise DataError(
                    f"{self.path}: {split}_images have {count} channels, which cannot be converted to "
                    f"{self.channels}{cut}"
                )
            if self.channels is None and count != found["train"][0]:
                raise DataError(
                    f"{self.path}: {split}_images have {count} channels, train_images {found['train'][0]}: set channels"
                )
            if self.image_size is None and sides != list(found["train"][1:]):
                raise DataError(
                    f"{self.path}: {split}_images are {sides[0]}×{sides[1]}, train_images "
                    f"{found['train'][1]}×{found['train'][2]}: set image_size"
                )


def _text(name: np.str_ | np.bytes_) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _uint8_advice(images: np.ndarray) -> str:
    """How to convert images of another dtype to uint8, as the end of an error message."""
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            return ", with values that are not finite"
        if images.size and images.min() >= 0 and images.max() <= 1:
            return ": save (images * 255).round().astype(np.uint8)"
        return f", from {images.min():g} to {images.max():g}: save them as uint8 from 0 to 255" if images.size else ""
    if images.dtype.kind in "iu" and images.dtype != np.uint8 and images.size:
        if images.min() >= 0 and images.max() <= 255:
            return ": save images.astype(np.uint8)"
        return f", from {images.min()} to {images.max()}: save them as uint8 from 0 to 255"
    if images.dtype.kind == "b":
        return ": save images.astype(np.uint8) * 255"
    return ""


def _label_advice(labels: np.ndarray) -> str:
    """How to convert labels of another dtype or shape to class indices, as the end of an error message."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        return ": save labels[:, 0]"
    if labels.ndim == 2:
        return ": save labels.argmax(axis=1) if the rows are one-hot"
    if labels.dtype.kind == "f":
        missing = np.flatnonzero(~np.isfinite(labels))
        if len(missing):
            return f", where sample {missing[0]} has the label {labels[missing[0]]}"
        return ": save labels.astype(np.int64)" if (labels == labels.round()).all() else ""
    if labels.dtype.kind in "US":
        return ": save names as class_names, and each sample's index in them (np.unique(…, return_inverse=True))"
    return ": save labels.astype(np.int64)" if labels.dtype.kind == "b" else ""
