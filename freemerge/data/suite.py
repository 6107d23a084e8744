"""A suite: a set of tasks. One backbone is fine-tuned on each of them separately, and the results are merged.

`TaskSuite` is a `LightningDataModule`, so a whole suite can be passed to `Trainer.fit`, `validate`, `test` and
`predict`. It also provides data modules of its parts: one task (`suite["birds"]`, or `SuiteTask` in a configuration),
the mixture that trains a router (`mixture`), and the data that a backbone can be pretrained on (`pretraining_data`).

A suite of your own is a tuple of names and one method:

    class MySuite(TaskSuite):
        TASKS = ("birds", "planes")

        def build(self, name: str) -> Task:
            return Task(name, class_names, train, val, test)
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from freemerge.data.mixture import TaskData, TaskMixture
from freemerge.data.tasks import Task
from freemerge.names import check_task_name, class_name

# Arguments that change how data are loaded or which tasks are selected, but no task's data: not part of the identity.
_LOADING = {"self", "tasks", "held_out", "batch_size", "eval_batch_size", "num_workers"}


class TaskSuite(L.LightningDataModule):
    """Base class of task suites.

    A subclass sets `TASKS` and implements `build`. If it has arguments of its own, it stores each under the argument's
    name (`self.root = root`) before it calls `super().__init__`, so that the fingerprint covers them.

    Args:
        tasks: the selected tasks, in order; None selects all.
        batch_size: samples per training batch of each task.
        eval_batch_size: samples per batch of validation, test and prediction.
        num_workers: worker processes per loader; 0 is fastest for data in memory.
        seed: seed of the data, if they are drawn at random, and of the training order.
        held_out: out-of-domain tasks: evaluated, but neither fine-tuned on nor merged.
        shared_heads: groups of tasks with the same classes that share one head, such as domains of one problem.

    Raises:
        ValueError: if a task is unknown or selected twice, none is selected, or a size is out of range.
    """

    TASKS: ClassVar[tuple[str, ...]] = ()
    DATA_VERSION: ClassVar[int] = 1
    """Increase it in a subclass whenever the same arguments yield different data, so that the fingerprint changes."""

    def __init__(
        self,
        tasks: list[str] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        held_out: list[str] | None = None,
        shared_heads: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        for what, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{what} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._built: dict[str, Task] = {}
        self.held_out = tuple(held_out or ())
        self.shared_heads = tuple(tuple(group) for group in shared_heads or ())
        chosen = tuple(name for name in self.available() if name not in self.held_out)
        self._names = chosen if tasks is None else tuple(tasks)
        if not self._names:
            raise ValueError(f"{type(self).__name__}: no task chosen; known tasks: {', '.join(self.available())}")
        for name in (*self._names, *self.held_out):
            check_task_name(type(self).__name__, name)
        self._check_unique("chosen", (*self._names, *self.held_out))
        self._check_unique("in shared_heads", [name for group in self.shared_heads for name in group])

    # ---- tasks

    def available(self) -> tuple[str, ...]:
        """The names of all tasks that the suite can build.

        Returns:
            `TASKS`, unless a subclass overrides the method.
        """
        return self.TASKS

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the selected tasks, in order; a router's label is an index into it."""
        return self._names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image. It is read from the first task, which is built for this.

        Raises:
            ValueError: if the inputs are not images.
        """
        name = self.names[0]
        image, _ = self.task(name).test[0]
        if not isinstance(image, Tensor) or image.dim() != 3:
            found = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"the keys {', '.join(image)}"
            raise ValueError(f"the inputs of task {name!r} are not images (C, H, W): they have {found}")
        channels, height, width = image.shape
        return channels, height, width

    def head_group(self, name: str) -> tuple[str, ...]:
        """The tasks that share a head with a task.

        Args:
            name: one of `available()`.

        Returns:
            The selected tasks of its group in `shared_heads`; the task alone if it has no such group.
        """
        group = next((group for group in self.shared_heads if name in group), (name,))
        return tuple(member for member in group if member in self.names) or (name,)

    def build(self, name: str) -> Task:
        """Build one task. Subclasses must implement this method.

        Args:
            name: one of `available()`.

        Returns:
            The task; the suite keeps it, so the method is called once per name.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement build(name) -> Task")

    def task(self, name: str) -> Task:
        """Get one task, which is built on first use and need not be selected.

        Args:
            name: one of `available()`.

        Returns:
            The task.

        Raises:
            ValueError: if the suite has no such task, or it cannot share a head with the tasks of its group.
        """
        if name not in self._built:
            self._check(name)
            self._built[name] = self.build(name)
            self._check_head(name)
        return self._built[name]

    @property
    def has_pretraining(self) -> bool:
        """Whether the suite has data to pretrain a backbone on; nothing is built to find out."""
        return type(self).pretraining is not TaskSuite.pretraining

    def pretraining(self) -> Task | None:
        """Data to pretrain a backbone on.

        Returns:
            A task disjoint from the test data of every task; None if the suite has no pretraining data.
        """
        return None

    # ---- data modules of parts of the suite

    def __getitem__(self, name: str) -> TaskData:
        """The data module of one task, for any Trainer: `trainer.fit(model, datamodule=suite["birds"])`."""
        return self.for_task(name)

    def __iter__(self) -> Iterator[str]:
        """The names of the selected tasks."""
        return iter(self.names)

    def for_task(self, name: str, batch_size: int | None = None) -> TaskData:
        """The data module of one task, for fine-tuning on it.

        Args:
            name: one of `available()`.
            batch_size: samples per training batch; None uses the suite's.

        Returns:
            The data module; the task is built in its `setup`.
        """
        return TaskData(**self._task_arguments(name, batch_size))

    def _task_arguments(self, name: str, batch_size: int | None) -> dict[str, Any]:
        self._check(name)
        group = self.head_group(name)
        others = partial(_load_all, self.task, group) if len(group) > 1 else None
        return {
            "name": name,
            "load": partial(self.task, name),
            "head_tasks": others,
            **self._loading(batch_size),
        }

    def mixture(self, per_task: int | None = None, batch_size: int | None = None) -> TaskMixture:
        """Equal parts of the selected tasks, labelled by the task's index in `names`, for training a router.

        Args:
            per_task: training samples of each task per epoch; None takes as many as the average task has.
            batch_size: samples per training batch; None uses the suite's.

        Returns:
            The data module; the tasks are built in its `setup`.
        """
        return TaskMixture(self.names, self.task, per_task=per_task, **self._loading(batch_size))

    def pretraining_data(self, batch_size: int | None = None) -> TaskData:
        """The data module of `pretraining()`.

        Args:
            batch_size: samples per training batch; None uses the suite's.

        Returns:
            The data module; its `setup` builds the data, and raises a ValueError if the suite has none.
        """
        return TaskData("pretraining", self._pretraining, **self._loading(batch_size))

    # ---- Lightning's hooks

    def prepare_data(self) -> None:
        """Download what `build` needs; nothing by default. Lightning calls this in one process per node."""

    def setup(self, stage: str | None = None) -> None:
        """Build the selected and the held-out tasks.

        Args:
            stage: ignored; all stages need the tasks.
        """
        for name in (*self.names, *self.held_out):
            self.task(name)

    def train_dataloader(self) -> dict[str, DataLoader]:
        """One shuffled loader per selected task.

        Returns:
            Task name → loader. Lightning combines them, by default until the longest is exhausted.
        """
        return {name: self.for_task(name).train_dataloader() for name in self.names}

    def val_dataloader(self) -> dict[str, DataLoader]:
        """Task name → loader of its validation data."""
        return {name: self.for_task(name).val_dataloader() for name in self.names}

    def test_dataloader(self) -> dict[str, DataLoader]:
        """Task name → loader of its test data."""
        return {name: self.for_task(name).test_dataloader() for name in self.names}

    def predict_dataloader(self) -> dict[str, DataLoader]:
        """Task name → loader of its test data in the dataset's order."""
        return {name: self.for_task(name).predict_dataloader() for name in self.names}

    # ---- identity

    def identity(self) -> dict[str, Any]:
        """What determines the data. A subclass can override this to add or leave out values.

        Returns:
            The class, its `DATA_VERSION`, and every constructor argument that does not concern loading, read from the
            attribute of the same name. Values that JSON cannot represent are hashed by their `str`.

        Raises:
            TypeError: if an argument of the constructor is not stored under its name.
        """
        values: dict[str, Any] = {}
        for cls in type(self).__mro__:
            if "__init__" not in vars(cls):
                continue
            for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items():
                if name in _LOADING or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    continue
                if not hasattr(self, name):
                    raise TypeError(
                        f"{type(self).__name__} does not store its argument {name!r} as self.{name}, so its "
                        f"fingerprint cannot cover it: store it, or override identity()"
                    )
                values[name] = getattr(self, name)
            if cls is TaskSuite:
                break
        kind = type(self)
        return {"class": class_name(kind), "version": self.DATA_VERSION, "arguments": values}

    def fingerprint(self, selection: bool = True) -> str:
        """A hash of what determines the data; cheap, because no data are built.

        Args:
            selection: whether to include the selected tasks and their order. Without them, the hash identifies the data
                of all `task(name)` and `pretraining()`.

        Returns:
            A SHA-256 as 64 hexadecimal digits.
        """
        identity = self.identity()
        if selection:
            identity["tasks"] = list(self.names)
            identity["held_out"] = list(self.held_out)
        return _hash(identity)

    def task_identity(self, name: str) -> dict[str, Any]:
        """What determines one task's data. Override it if `identity` describes each task separately.

        Args:
            name: one of `available()`.

        Returns:
            JSON-compatible values.
        """
        return {"suite": _without_shared_heads(self.identity()), "task": name}

    def pretraining_identity(self) -> dict[str, Any]:
        """What determines the data of `pretraining()`.

        Returns:
            JSON-compatible values.
        """
        return {"suite": _without_shared_heads(self.identity())}

    def task_fingerprint(self, name: str) -> str:
        """A hash of what determines one task's data; it does not change when other tasks are added or removed.

        Args:
            name: one of `available()`.

        Returns:
            A SHA-256 as 64 hexadecimal digits.
        """
        return _hash(self.task_identity(name))

    def pretraining_fingerprint(self) -> str:
        """A hash of what determines the data of `pretraining()`.

        Returns:
            A SHA-256 as 64 hexadecimal digits.
        """
        return _hash(self.pretraining_identity())

    def __str__(self) -> str:
        # LightningDataModule.__str__ builds every loader, hence every task, and fails if there are several.
        return f"{type(self).__name__}({', '.join(self.names)}; seed={self.seed})"

    # ---- private

    def _check(self, name: str) -> None:
        known = self.available()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{type(self).__name__} has no task {name!r}.{hint} Known tasks: {', '.join(known)}")

    def _check_unique(self, where: str, names: Sequence[str]) -> None:
        """Raise a ValueError if a name is unknown or occurs twice."""
        for name in names:
            self._check(name)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{type(self).__name__}: {where} twice: {', '.join(twice)}")

    def _check_head(self, name: str) -> None:
        """Raise a ValueError if a task's kind or classes differ from the built tasks that share its head."""
        task, group = self._built[name], next((group for group in self.shared_heads if name in group), ())
        for other in (self._built[member] for member in group if member in self._built):
            if (task.kind, task.class_names) != (other.kind, other.class_names):
                raise ValueError(
                    f"{type(self).__name__}: {name!r} and {other.name!r} cannot share a head: {_describe_labels(task)} "
                    f"and {_describe_labels(other)}"
                )

    def _loading(self, batch_size: int | None) -> dict[str, Any]:
        return {
            "batch_size": batch_size or self.batch_size,
            "eval_batch_size": self.eval_batch_size,
            "num_workers": self.num_workers,
            "seed": self.seed,
            "prepare": self.prepare_data,
        }

    def _pretraining(self) -> Task:
        task = self.pretraining()
        if task is None:
            raise ValueError(f"{type(self).__name__} has no pretraining data: use a pretrained backbone")
        return task


class SuiteTask(TaskData):
    """One task of a suite, as a data module for the configuration of any LightningCLI.

        data:
          class_path: freemerge.data.SuiteTask
          init_args:
            name: birds
            suite: {class_path: freemerge.data.SourceSuite, init_args: {…}}

    Args:
        suite: the suite; its settings of batch sizes, workers and seed apply.
        name: the task, one of `suite.available()`.
        batch_size: samples per training batch; None uses the suite's.
    """

    def __init__(self, suite: TaskSuite, name: str, batch_size: int | None = None) -> None:
        super().__init__(**suite._task_arguments(name, batch_size))


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _without_shared_heads(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without `shared_heads`, which does not change a task's data."""
    arguments = {key: value for key, value in identity["arguments"].items() if key != "shared_heads"}
    return {**identity, "arguments": arguments}


def _load_all(load: Callable[[str], Task], names: Sequence[str]) -> list[Task]:
    return [load(name) for name in names]  # at module level, because data modules are pickled


def _describe_labels(task: Task) -> str:
    return f"{task.kind} of {', '.join(task.class_names[:8])}" if task.class_names else task.kind
