"""Data of one task, and the mixture of all tasks that a router learns from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from freemerge.data.batches import StackedBatch, collate
from freemerge.data.loaders import (
    BalancedSampler,
    ShuffleSampler,
    derive_seed,
    evaluation_loader,
    lengths_of,
    training_loader,
)
from freemerge.data.tasks import Task
from freemerge.inputs import IGNORED, Inputs, join, join_padded, select


class TaskData(L.LightningDataModule):
    """The train, val and test data of one task.

    Args:
        name: The task's name.
        load: Returns the task; called once, in `setup`, or when `task` is first read.
        batch_size: Images per training batch.
        eval_batch_size: Images per batch of validation, test and prediction.
        num_workers: Worker processes per loader.
        seed: Seed of the training order.
        prepare: Called by `prepare_data`, such as a suite's download.
        head_tasks: Returns the tasks that share a head with this one, itself included; None: it has its own.
    """

    name: str

    def __init__(
        self,
        name: str,
        load: Callable[[], Task],
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        prepare: Callable[[], None] | None = None,
        head_tasks: Callable[[], list[Task]] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._load = load
        self._prepare = prepare
        self._head_tasks = head_tasks
        self._task: Task | None = None

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.name})"  # Lightning's own would build the task

    @property
    def task(self) -> Task:
        """The task, built on first use."""
        if self._task is None:
            self._task = self._load()
        return self._task

    @property
    def num_classes(self) -> int:
        """How many classes the task has."""
        return self.task.num_classes

    def prepare_data(self) -> None:
        if self._prepare is not None:
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        _ = self.task

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew each epoch from (seed, epoch); an incomplete last batch is dropped.

        Texts are in batches of similar lengths: much of a batch drawn at random would be padding.
        """
        dataset = self.task.train
        seed = derive_seed(self.seed, "order", self.name)
        sampler = ShuffleSampler(len(dataset), seed, lengths_of(dataset), self.batch_size)  # type: ignore[arg-type]
        return training_loader(dataset, sampler, self.batch_size, self.num_workers)

    def head_dataloader(self) -> DataLoader | None:
        """The training data of all tasks that share this one's head; None where it has its own."""
        if self._head_tasks is None:
            return None
        dataset = JoinedDataset([task.train for task in self._head_tasks()])
        return evaluation_loader(dataset, self.eval_batch_size, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return evaluation_loader(self.task.val, self.eval_batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return evaluation_loader(self.task.test, self.eval_batch_size, self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """The test data in their order."""
        return evaluation_loader(self.task.test, self.eval_batch_size, self.num_workers, in_order=True)


class JoinedDataset(Dataset):
    """Several datasets laid end to end.

    Args:
        datasets: Datasets of (inputs, label) whose inputs can be in one batch: images of equal shapes, or texts.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = list(datasets)
        self.sizes = [len(dataset) for dataset in self.datasets]  # type: ignore[arg-type]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def lengths(self) -> torch.Tensor | None:
        """Of the samples, (N,), if all datasets have them."""
        parts = [lengths_of(dataset) for dataset in self.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the mixture of {len(self)} samples")
        which = bisect_right(self._ends, index)
        return which, index - (self._ends[which] - self.sizes[which])

    def __getitem__(self, index: int) -> tuple[Inputs, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Fetches a batch with one call per dataset."""
        places = [self._locate(int(index)) for index in indices]
        positions: dict[int, list[int]] = {}
        for position, (which, _) in enumerate(places):
            positions.setdefault(which, []).append(position)
        parts, labels, order = [], [], []
        for which, chosen in positions.items():
            inputs, own = self._fetch(which, [places[position][1] for position in chosen])
            parts.append(inputs)
            labels.append(self._label(which, own))
            order += chosen
        place_of = torch.tensor(order).argsort()  # the parts lie end to end: back to the order asked for
        return StackedBatch(select(join(parts), place_of), join_padded(labels, IGNORED)[place_of])

    def _fetch(self, which: int, inner: list[int]) -> tuple[Inputs, torch.Tensor]:
        dataset = self.datasets[which]
        fetch = getattr(dataset, "__getitems__", None)
        inputs, labels = collate(fetch(inner) if fetch else [dataset[index] for index in inner])
        return inputs, labels

    def _label(self, which: int, labels: torch.Tensor) -> torch.Tensor:
        return labels


class MixtureDataset(JoinedDataset):
    """Several datasets laid end to end, whose label is the index of the dataset that a sample came from.

    Args:
        datasets: Datasets of (inputs, label) whose inputs can be in one batch: images of equal shapes, or texts.
    """

    def _label(self, which: int, labels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(labels),), which)


class TaskMixture(L.LightningDataModule):
    """All tasks mixed in equal parts; the label says which task an image belongs to.

    Args:
        names: The tasks' names; a label is an index into it.
        load: Returns the task of a name.
        per_task: Training images of each task per epoch. None takes as many as the average task has.
        batch_size: Images per training batch.
        eval_batch_size: Images per batch of validation, test and prediction.
        num_workers: Worker processes per loader.
        seed: Seed of the training order.
        prepare: Called by `prepare_data`, such as a suite's download.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Callable[[str], Task],
        per_task: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        if per_task is not None and per_task < 1:
            raise ValueError(f"per_task must be at least 1, got {per_task}")
        self.names = tuple(names)
        self.per_task = per_task
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._load = load
        self._prepare = prepare

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)})"  # Lightning's own would build the tasks

    @property
    def num_classes(self) -> int:
        """How many tasks there are to tell apart."""
        return len(self.names)

    def prepare_data(self) -> None:
        if self._prepare is not None:
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        for name in self.names:
            self._load(name)

    def train_dataloader(self) -> DataLoader:
        """Equally many images of each task, drawn and shuffled anew each epoch from (seed, epoch).

        Texts of all lengths are mixed: in batches of similar lengths, there would be few tasks in each.
        """
        dataset = MixtureDataset([self._load(name).train for name in self.names])
        per_task = self.per_task or len(dataset) // len(dataset.datasets)
        sampler = BalancedSampler(dataset.sizes, max(1, per_task), derive_seed(self.seed, "order", "mixture"))
        return training_loader(dataset, sampler, self.batch_size, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """The test data, task by task."""
        return self._evaluation("test", in_order=True)

    def _evaluation(self, split: str, in_order: bool = False) -> DataLoader:
        """As many images of each task as the smallest has, evenly spaced, because sets may be sorted by class."""
        dataset = MixtureDataset([getattr(self._load(name), split) for name in self.names])
        share, offset, chosen = min(dataset.sizes), 0, []
        for size in dataset.sizes:
            chosen += [offset + i * size // share for i in range(share)]
            offset += size
        return evaluation_loader(Subset(dataset, chosen), self.eval_batch_size, self.num_workers, in_order)
