"""Data modules: the data of one task, and the mixture of all tasks that trains a router."""

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
        name: the task's name.
        load: returns the task; called once, in `setup` or when `task` is first read.
        batch_size: samples per training batch.
        eval_batch_size: samples per batch of validation, test and prediction.
        num_workers: worker processes per loader.
        seed: seed of the training order.
        prepare: called by `prepare_data`; a suite's download, for instance.
        head_tasks: returns the tasks that share a head with this one, including itself; None if it has its own head.
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
        return f"{type(self).__name__}({self.name})"  # LightningDataModule.__str__ would build the task

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
        """Call `prepare`, if there is one; Lightning calls this in one process per node."""
        if self._prepare is not None:
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Build the task, unless it is built already.

        Args:
            stage: ignored; all stages need the task.
        """
        _ = self.task

    def train_dataloader(self) -> DataLoader:
        """The training data, shuffled from (seed, epoch); an incomplete last batch is dropped.

        Texts are grouped into batches of similar lengths; batches drawn at random would consist largely of padding.
        """
        dataset = self.task.train
        seed = derive_seed(self.seed, "order", self.name)
        sampler = ShuffleSampler(len(dataset), seed, lengths_of(dataset), self.batch_size)  # type: ignore[arg-type]
        return training_loader(dataset, sampler, self.batch_size, self.num_workers)

    def head_dataloader(self) -> DataLoader | None:
        """The training data of all tasks that share a head with this one; None if it has its own head."""
        if self._head_tasks is None:
            return None
        dataset = JoinedDataset([task.train for task in self._head_tasks()])
        return evaluation_loader(dataset, self.eval_batch_size, self.num_workers)

    def drawn_dataloader(self) -> DataLoader:
        """The training data of this task and of all that share its head, in an order drawn by the seed.

        No loader of the Trainer's: every rank sees all of it.
        """
        tasks = [self.task] if self._head_tasks is None else self._head_tasks()
        dataset = JoinedDataset([task.train for task in tasks]) if len(tasks) > 1 else tasks[0].train
        size = len(dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "drawn", *(task.name for task in tasks)))
        order = torch.randperm(size, generator=generator)
        return evaluation_loader(Subset(dataset, order.tolist()), self.batch_size, in_order=True)

    def val_dataloader(self) -> DataLoader:
        """The validation data; texts are grouped by length."""
        return evaluation_loader(self.task.val, self.eval_batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """The test data; texts are grouped by length."""
        return evaluation_loader(self.task.test, self.eval_batch_size, self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """The test data in the dataset's order."""
        return evaluation_loader(self.task.test, self.eval_batch_size, self.num_workers, in_order=True)


class JoinedDataset(Dataset):
    """A concatenation of datasets.

    torch's `ConcatDataset` does not fit: it fetches samples one by one, and cannot batch texts of different lengths or
    change the labels.

    Args:
        datasets: datasets of (inputs, label) whose inputs can share a batch: images of equal shapes, or texts.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = list(datasets)
        self.sizes = [len(dataset) for dataset in self.datasets]  # type: ignore[arg-type]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def lengths(self) -> torch.Tensor | None:
        """The samples' lengths, int64 (N,); None if a dataset has none."""
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
        """Fetch a batch with one call per dataset."""
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
        requested = torch.tensor(order).argsort()  # from the order by dataset back to the requested order
        return StackedBatch(select(join(parts), requested), join_padded(labels, IGNORED)[requested])

    def _fetch(self, which: int, inner: list[int]) -> tuple[Inputs, torch.Tensor]:
        dataset = self.datasets[which]
        fetch = getattr(dataset, "__getitems__", None)
        inputs, labels = collate(fetch(inner) if fetch else [dataset[index] for index in inner])
        return inputs, labels

    def _label(self, which: int, labels: torch.Tensor) -> torch.Tensor:
        return labels


class MixtureDataset(JoinedDataset):
    """A concatenation of datasets in which a sample's label is the index of its dataset.

    Args:
        datasets: datasets of (inputs, label) whose inputs can share a batch: images of equal shapes, or texts.
    """

    def _label(self, which: int, labels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(labels),), which)


class TaskMixture(L.LightningDataModule):
    """Equal parts of all tasks; the label is the index of the task that a sample belongs to.

    Args:
        names: the tasks' names; a label is an index into it.
        load: returns the task with a given name.
        per_task: training samples of each task per epoch; None takes as many as the average task has.
        batch_size: samples per training batch.
        eval_batch_size: samples per batch of validation, test and prediction.
        num_workers: worker processes per loader.
        seed: seed of the training order.
        prepare: called by `prepare_data`; a suite's download, for instance.

    Raises:
        ValueError: if `per_task` is below 1.
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
        return f"{type(self).__name__}({', '.join(self.names)})"  # LightningDataModule.__str__ would build the tasks

    @property
    def num_classes(self) -> int:
        """How many tasks the router must distinguish."""
        return len(self.names)

    def prepare_data(self) -> None:
        """Call `prepare`, if there is one; Lightning calls this in one process per node."""
        if self._prepare is not None:
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Build all tasks.

        Args:
            stage: ignored; all stages need the tasks.
        """
        for name in self.names:
            self._load(name)

    def train_dataloader(self) -> DataLoader:
        """Equally many training samples of each task, drawn and shuffled from (seed, epoch).

        Texts are not grouped by length: a batch of similar lengths would contain few tasks.
        """
        dataset = MixtureDataset([self._load(name).train for name in self.names])
        per_task = self.per_task or len(dataset) // len(dataset.datasets)
        sampler = BalancedSampler(dataset.sizes, max(1, per_task), derive_seed(self.seed, "order", "mixture"))
        return training_loader(dataset, sampler, self.batch_size, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Equally many validation samples of each task."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        """Equally many test samples of each task."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """The samples of `test_dataloader`, task by task, in the datasets' order."""
        return self._evaluation("test", in_order=True)

    def _evaluation(self, split: str, in_order: bool = False) -> DataLoader:
        """As many samples of each task as the smallest has, evenly spaced, because datasets may be sorted by class."""
        dataset = MixtureDataset([getattr(self._load(name), split) for name in self.names])
        per_task, offset, chosen = min(dataset.sizes), 0, []
        for size in dataset.sizes:
            chosen += [offset + i * size // per_task for i in range(per_task)]
            offset += size
        return evaluation_loader(Subset(dataset, chosen), self.eval_batch_size, self.num_workers, in_order)
