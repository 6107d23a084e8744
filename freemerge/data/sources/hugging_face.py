"""Hugging Face `datasets`: texts and pictures, from the hub, from folders and files, whole or streamed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from freemerge.checkpoints.places import expand, expand_name
from freemerge.data.pictures import PictureDataset
from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.source import SPLITS, TaskSource
from freemerge.data.sources.tables import Table
from freemerge.data.sources.texts import TextSource
from freemerge.data.tasks import Task


@dataclass(kw_only=True)
class HuggingFaceSource(TaskSource):
    """Base class of sources that read Hugging Face `datasets`.

    Args:
        path: hub id, local folder, or kind of file (`csv`, `json`, `parquet`, `imagefolder`, …), or a folder that
            `save_to_disk` wrote.
        subset: name of the dataset's configuration, such as `sst2` of `nyu-mll/glue`.
        data_files: the files, by name of split, where `path` is a kind of file.
        splits: which of the dataset's splits are train, val and test; slices such as `train[:90%]` will do. Val and
            test are cut from train where they are not named; None names train alone.
        streaming: read no more than the samples that the sizes ask for, instead of the whole dataset; needs the size
            of each named split.
        buffer_size: streamed samples are drawn at random from a window of so many.
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
        self.splits = {"train": "train"} if self.splits is None else dict(self.splits)
        if "train" not in self.splits or set(self.splits) - set(SPLITS):
            raise ValueError(f"{where}: splits maps train, and perhaps val and test, to names; got {self.splits}")
        unsized = [split for split in self.splits if getattr(self, f"{split}_size") is None]
        if self.streaming and unsized:
            raise ValueError(f"{where}: streaming needs {unsized[0]}_size: how many samples to read")

    def files(self) -> list[Path]:
        return [path for path in map(expand, (self.data_files or {}).values()) if path.is_file()]

    def prepare(self) -> None:
        if not self.streaming:
            for split in self.splits:
                self._load(split)  # into the cache of `datasets`

    def open(self, seed: int) -> dict[str, Any]:
        """Split → dataset with `features`, of which indices and columns can be asked.

        Raises:
            ValueError: if `datasets` is not installed, or it cannot load this.
        """
        return {split: self._stream(split, seed) if self.streaming else self._load(split) for split in self.splits}

    def _load(self, split: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{type(self).__name__} needs datasets: pip install 'freemerge[datasets]'") from error
        path = expand_name(self.path)
        files = self.data_files and {name: expand_name(file) for name, file in self.data_files.items()}
        try:
            if (Path(path) / "dataset_dict.json").is_file():
                return datasets.load_from_disk(path)[self.splits[split]]
            return datasets.load_dataset(
                path, self.subset, split=self.splits[split], data_files=files, streaming=self.streaming
            )
        except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{type(self).__name__}: {self.path}, {self.splits[split]}: {reason}") from error

    def _stream(self, split: str, seed: int) -> Any:
        from datasets import Dataset

        stream = self._load(split)
        drawn = stream.shuffle(seed=seed, buffer_size=self.buffer_size).take(getattr(self, f"{split}_size"))
        return Dataset.from_list(list(drawn), features=stream.features)


@dataclass(kw_only=True)
class HuggingFaceTextSource(HuggingFaceSource, TextSource):
    """A task of texts from Hugging Face `datasets`. Columns are named by `text` and `label`."""

    def build(self, name: str, seed: int) -> Task:
        parts = self.open(seed)
        wanted = {*(self.text or parts["train"].column_names), *([self.label] if self.label else [])}
        tables: dict[str, Table] = {
            split: {column: part[column][:] for column in part.column_names if column in wanted}
            for split, part in parts.items()
        }
        feature = parts["train"].features.get(self.label) if self.label else None
        return self.make_task(name, tables, seed, getattr(feature, "names", None))


@dataclass(kw_only=True)
class HuggingFaceImageSource(HuggingFaceSource, ImageSource):
    """A task of pictures from Hugging Face `datasets`.

    Args:
        image: the column of the picture.
        label: the column of the class.
    """

    image: str = "image"
    label: str = "label"

    def build(self, name: str, seed: int) -> Task:
        parts = self.open(seed)
        for split, part in parts.items():
            for column in (self.image, self.label):
                if column not in part.column_names:
                    known = ", ".join(part.column_names)
                    raise ValueError(f"task {name!r}: there is no column {column!r} in {split}; there are {known}")
        names = getattr(parts["train"].features[self.label], "names", None)
        if names is None:
            names = [str(label) for label in range(int(max(parts["train"][self.label])) + 1)]
        sizes = {split: len(part) for split, part in parts.items()}
        datasets = {
            split: PictureDataset(
                partial(self._fetch, parts[origin]), index, self.preprocessing(split), self.image_size
            )
            for split, (origin, index) in self.deal(sizes, name, seed).items()
        }
        return Task(name, tuple(names), **datasets, metric=self.metric, templates=tuple(self.templates or ()))

    def _fetch(self, part: Any, index: int) -> tuple[Any, int]:
        row = part[index]
        return row[self.image], row[self.label]
