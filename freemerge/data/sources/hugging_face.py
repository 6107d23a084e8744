"""Sources that read Hugging Face `datasets`: texts and images, from the hub or local files, whole or streamed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from freemerge.checkpoints import expand, expand_name
from freemerge.data.errors import DataError, reason_of
from freemerge.data.image_dataset import ImageDataset
from freemerge.data.sources.columns import as_text, check_labels_present, class_names_from_labels
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.source import SPLITS, TaskSource
from freemerge.data.sources.tables import Table
from freemerge.data.sources.texts import TextSource
from freemerge.data.tasks import Task


@dataclass(kw_only=True)
class HuggingFaceSource(TaskSource):
    """Base class of sources that read Hugging Face `datasets`.

    Args:
        path: hub id, local folder, a folder that `save_to_disk` wrote, or a file type (`csv`, `json`, `parquet`,
            `imagefolder`, …).
        subset: name of the dataset's configuration, such as `sst2` of `nyu-mll/glue`.
        data_files: split → file, if `path` is a file type.
        splits: train, val and test → the dataset's split; slices such as `train[:90%]` are possible. A missing val or
            test split is cut from train. None uses the dataset's train split only.
        streaming: read only as many samples as the sizes require, instead of the whole dataset; requires the size of
            each split in `splits`.
        buffer_size: number of streamed samples in the buffer that samples are drawn from at random.

    Raises:
        ValueError: if `splits` has no train or unknown keys, or streaming lacks a size.
    """

    path: str
    subset: str | None = None
    data_files: dict[str, str] | None = None
    splits: dict[str, str] | None = None
    streaming: bool = False
    buffer_size: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        self.splits = dict(self._names)
        if "train" not in self.splits or set(self.splits) - set(SPLITS):
            raise ValueError(
                f"{where}: splits must map train, and optionally val and test, to names, got {self.splits}"
            )
        unsized = [split for split in self.splits if getattr(self, f"{split}_size") is None]
        if self.streaming and unsized:
            raise ValueError(f"{where}: streaming needs {unsized[0]}_size, the number of samples to read")

    @property
    def _names(self) -> dict[str, str]:
        """Split → its name in the dataset."""
        return {"train": "train"} if self.splits is None else self.splits

    def files(self) -> list[Path]:
        """The local files among `data_files`."""
        return [path for path in map(expand, (self.data_files or {}).values()) if path.is_file()]

    def prepare(self) -> None:
        """Download the splits into the cache of `datasets`, unless they are streamed."""
        if not self.streaming:
            for split in self._names:
                self._load(split)

    def open(self, seed: int) -> dict[str, Any]:
        """Open the splits.

        Args:
            seed: seed of the samples drawn from streams.

        Returns:
            Split → a `datasets.Dataset`.

        Raises:
            DataError: if `datasets` is not installed or cannot load the data.
        """
        return {split: self._stream(split, seed) if self.streaming else self._load(split) for split in self._names}

    def _load(self, split: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{type(self).__name__} needs datasets: pip install 'freemerge[datasets]'") from error
        path, wanted = expand_name(self.path), self._names[split]
        files = self.data_files and {name: expand_name(file) for name, file in self.data_files.items()}
        where = f"{type(self).__name__}: {self.path}, {wanted}"
        try:
            if any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(path)
                parts = saved if isinstance(saved, dict) else {"train": saved}
                if wanted not in parts:
                    raise DataError(f"{where}: there is no such split; known splits: {', '.join(parts)}")
                return parts[wanted]
            return datasets.load_dataset(path, self.subset, split=wanted, data_files=files, streaming=self.streaming)
        except ConnectionError as error:
            raise DataError(
                f"{where}: not in the cache, and the hub cannot be reached ({reason_of(error)}); use a local folder or "
                f"file, or download the dataset once with a connection"
            ) from error
        except DataError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{where}: {reason_of(error)}") from error

    def _stream(self, split: str, seed: int) -> Any:
        from datasets import Dataset

        stream = self._load(split)
        drawn = stream.shuffle(seed=seed, buffer_size=self.buffer_size).take(getattr(self, f"{split}_size"))
        return Dataset.from_list(list(drawn), features=stream.features)


@dataclass(kw_only=True)
class HuggingFaceTextSource(HuggingFaceSource, TextSource):
    """A task of texts from Hugging Face `datasets`. `text` and `label` name its columns."""

    def build(self, name: str, seed: int) -> Task:
        """Build the task; see `TaskSource.build`.

        Args:
            name: the task's name.
            seed: seed of the splits and subsets.

        Returns:
            The task.

        Raises:
            DataError: if the data cannot be loaded, or a column is missing.
        """
        parts = self.open(seed)
        known = parts["train"].column_names
        for column in [*(self.text or []), *([self.label] if self.label else [])]:
            if column not in known:
                raise DataError(f"task {name!r}: train has no column {column!r}; its columns: {', '.join(known)}")
        wanted = {*(self.text or parts["train"].column_names), *([self.label] if self.label else [])}
        tables: dict[str, Table] = {
            split: Table(
                {column: part[column][:] for column in part.column_names if column in wanted},
                f"{self.path}, {self._names[split]}",
            )
            for split, part in parts.items()
        }
        feature = parts["train"].features.get(self.label) if self.label else None
        return self.make_task(name, tables, seed, getattr(feature, "names", None))


@dataclass(kw_only=True)
class HuggingFaceImageSource(HuggingFaceSource, ImageSource):
    """A task of images from Hugging Face `datasets`.

    Args:
        image: the image column.
        label: the label column.
    """

    image: str = "image"
    label: str = "label"

    def build(self, name: str, seed: int) -> Task:
        """Build the task; see `TaskSource.build`.

        Args:
            name: the task's name.
            seed: seed of the splits and subsets.

        Returns:
            The task.

        Raises:
            DataError: if the data cannot be loaded, or a column or label is missing.
        """
        parts = self.open(seed)
        for split, part in parts.items():
            for column in (self.image, self.label):
                if column not in part.column_names:
                    known = ", ".join(part.column_names)
                    raise DataError(f"task {name!r}: {split} has no column {column!r}; its columns: {known}")
            check_labels_present(
                f"task {name!r}, {split}", Table({self.label: part[self.label][:]}, self.path), self.label
            )
        names, index = getattr(parts["train"].features[self.label], "names", None), None
        if names is None:
            names = class_names_from_labels(f"task {name!r}", [as_text(label) for label in parts["train"][self.label]])
            index = {label: position for position, label in enumerate(names)}
        sizes = {split: len(part) for split, part in parts.items()}
        datasets = {
            split: ImageDataset(
                partial(self._fetch, parts[origin], index),
                chosen,
                self.preprocessing(split),
                self.image_size,
                f"{self.path}, {self._names[origin]}, row {{}}".format,
                len(names),
            )
            for split, (origin, chosen) in self.split_samples(sizes, name, seed).items()
        }
        train, val, test = (datasets[split] for split in SPLITS)
        called, templates = self.named(name, names), tuple(self.templates or ())
        return Task(name, called, train, val, test, metric=self.metric, templates=templates)

    def _fetch(self, part: Any, index: dict[str, int] | None, row: int) -> tuple[Any, Any]:
        sample = part[row]
        label = sample[self.label]
        return sample[self.image], label if index is None else index.get(as_text(label), label)
