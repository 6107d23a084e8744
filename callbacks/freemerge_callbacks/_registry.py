"""A folder that several jobs share, so that the last of them to finish merges what all of them have trained.

- A job registers its task by writing `<task>.safetensors`, a task file, whole or not at all.
- It does so under a lock, and keeps it while it merges: one job merges, and nobody replaces what it reads.
- The lock is the operating system's, so a job that dies gives it back at once; its task is simply not there yet.
- The merge takes the tasks in one order whoever is last, so that its result is the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from torch import Tensor

from freemerge.checkpoints import TaskRecord, expand, hash_tensors, open_checkpoint, read_record, write_task_file
from freemerge_callbacks._ranks import on_rank_zero

_LONGEST_WAIT = 30 * 60.0  # seconds for another job's merge


class Registry:
    """The tasks that have finished, and those that are still expected.

    Args:
        folder: the shared folder.
        task: this job's task.
        tasks: all tasks, in the order in which they are merged, or how many they are; then the names are sorted.
        who: what messages begin with.
    """

    def __init__(self, folder: str, task: str, tasks: Sequence[str] | int, who: str) -> None:
        self.folder = expand(folder).absolute()
        self.task = task
        self.tasks = tasks
        self.who = who

    @property
    def path(self) -> Path:
        """The file of this job's task."""
        return self.folder / f"{self.task}.safetensors"

    def registered(self) -> dict[str, Path]:
        """Task → file of those that have finished, in the order of the merge."""
        if isinstance(self.tasks, int):
            files = sorted(self.folder.glob("*.safetensors"))
            records = {path: read_record(path) for path in files}
            return {path.stem: path for path, record in records.items() if record and record.task == path.stem}
        expected = {task: self.folder / f"{task}.safetensors" for task in self.tasks}
        return {task: path for task, path in expected.items() if path.exists()}

    def labels(self) -> list[str]:
        """What the models of the merge are called, as far as it is known."""
        return [f"task {index}" for index in range(self.tasks)] if isinstance(self.tasks, int) else list(self.tasks)

    def missing(self) -> str:
        """What has not finished yet, in words; "" if all has."""
        found = self.registered()
        if isinstance(self.tasks, int):
            return f"{self.tasks - len(found)} more" if len(found) < self.tasks else ""
        return ", ".join(task for task in self.tasks if task not in found)

    def check(self) -> None:
        """Before a fit: require that its task is expected.

        Raises:
            ValueError: an argument makes no sense.
        """
        if not self.task or Path(self.task).name != self.task:
            raise ValueError(f"{self.who}: `task` must be a name that a file can have, got {self.task!r}")
        if isinstance(self.tasks, int):
            if self.tasks < 1:
                raise ValueError(f"{self.who}: `tasks` must be at least 1, got {self.tasks}")
            others = [task for task in self.registered() if task != self.task]
            if len(others) >= self.tasks:
                raise ValueError(
                    f"{self.who}: {self.folder} already holds {len(others)} tasks ({', '.join(others)}) of the "
                    f"{self.tasks} expected; raise `tasks`, or take another folder"
                )
        elif len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"{self.who}: `tasks` names one task twice: {', '.join(self.tasks)}")
        elif self.task not in self.tasks:
            raise ValueError(f"{self.who}: the task '{self.task}' is not among `tasks`: {', '.join(self.tasks)}")

    def refuse_registered(self, replace: bool) -> None:
        """Before a fit: require that its task can be registered.

        Args:
            replace: whether this job may replace its task's file.

        Raises:
            ValueError: the task is registered already.
        """
        if self.path.exists() and not replace:
            raise ValueError(
                f"{self.who}: the task '{self.task}' is registered already ({self.path}); set overwrite=True to "
                "replace it"
            )

    @contextmanager
    def turn(self, trainer: L.Trainer) -> Iterator[None]:
        """Keep all other jobs out; every rank must enter and leave.

        Raises:
            RuntimeError: another job has been merging for half an hour.
        """
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")

        def acquire() -> None:
            try:
                lock.acquire(timeout=_LONGEST_WAIT)
            except Timeout:
                raise RuntimeError(
                    f"{self.who}: another job has held {lock.lock_file} for {_LONGEST_WAIT / 60:.0f} minutes; end it "
                    "if it hangs, then fit again from the last checkpoint, which registers this task and merges"
                ) from None

        on_rank_zero(trainer, acquire)
        try:
            yield
        finally:
            lock.release()  # does nothing on the other ranks

    def register(self, record: TaskRecord, weights: Mapping[str, Tensor], replace: bool) -> None:
        """Write this job's task file; inside `turn`, on rank 0.

        Args:
            record: what the file says of itself.
            weights: the fine-tuned backbone's tensors.
            replace: whether it may replace another one. The same weights are never written twice.

        Raises:
            ValueError: another job has registered this task in the meantime.
        """
        if self.path.exists():
            there = open_checkpoint(self.path, prefix="backbone.").with_tied_names()
            if hash_tensors(there) == hash_tensors(weights):
                return
            if not replace:
                raise ValueError(
                    f"{self.who}: another job has registered the task '{self.task}' in {self.folder} since this fit "
                    "began; give each job a task of its own"
                )
        write_task_file(self.path, record, weights, {})
