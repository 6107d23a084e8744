"""A folder shared by several jobs: the last job to finish merges the models of all jobs.

- A job registers its task by writing the task file `<task>.safetensors` atomically.
- It holds a lock while it registers and merges, so one job merges and no other job replaces the files that it reads.
- The operating system releases the lock when a job dies; that job's task is then not registered.
- The order of the tasks does not depend on which job is last, so the result is always the same file.
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
        tasks: all tasks in the order of the merge; or their number, in which case they are merged in sorted order.
        who: name of the callback, for error messages.
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
        """The finished tasks.

        Returns:
            Task → its file, in the order of the merge.
        """
        if isinstance(self.tasks, int):
            files = sorted(self.folder.glob("*.safetensors"))
            records = {path: read_record(path) for path in files}
            return {path.stem: path for path, record in records.items() if record and record.task == path.stem}
        expected = {task: self.folder / f"{task}.safetensors" for task in self.tasks}
        return {task: path for task, path in expected.items() if path.exists()}

    def labels(self) -> list[str]:
        """The labels of the models in the merge.

        Returns:
            The tasks' names, or placeholders if only their number is known.
        """
        return [f"task {index}" for index in range(self.tasks)] if isinstance(self.tasks, int) else list(self.tasks)

    def missing(self) -> str:
        """Describe the tasks that have not finished yet.

        Returns:
            Their names or their number; "" if all have finished.
        """
        found = self.registered()
        if isinstance(self.tasks, int):
            return f"{self.tasks - len(found)} more" if len(found) < self.tasks else ""
        return ", ".join(task for task in self.tasks if task not in found)

    def check(self) -> None:
        """Check, before a fit, that the registry expects its task.

        Raises:
            ValueError: `task` or `tasks` is invalid.
        """
        if not self.task or Path(self.task).name != self.task:
            raise ValueError(f"{self.who}: `task` must be a valid file name, got {self.task!r}")
        if isinstance(self.tasks, int):
            if self.tasks < 1:
                raise ValueError(f"{self.who}: `tasks` must be at least 1, got {self.tasks}")
            others = [task for task in self.registered() if task != self.task]
            if len(others) >= self.tasks:
                raise ValueError(
                    f"{self.who}: {self.folder} already holds {len(others)} tasks ({', '.join(others)}) of the "
                    f"{self.tasks} expected; raise `tasks`, or use another folder"
                )
        elif len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"{self.who}: `tasks` names one task twice: {', '.join(self.tasks)}")
        elif self.task not in self.tasks:
            raise ValueError(f"{self.who}: the task '{self.task}' is not among `tasks`: {', '.join(self.tasks)}")

    def refuse_registered(self, replace: bool) -> None:
        """Check, before a fit, that its task can be registered.

        Args:
            replace: whether this job may replace its task's file.

        Raises:
            ValueError: the task is already registered.
        """
        if self.path.exists() and not replace:
            raise ValueError(
                f"{self.who}: the task '{self.task}' is already registered ({self.path}); set overwrite=True to "
                "replace it"
            )

    @contextmanager
    def turn(self, trainer: L.Trainer) -> Iterator[None]:
        """Hold the registry's lock inside the block; every rank must enter and leave.

        Args:
            trainer: the Trainer.

        Raises:
            RuntimeError: if another job has held the lock for half an hour.
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
                    "if it hangs, then resume this fit from its last checkpoint, to register this task and merge"
                ) from None

        on_rank_zero(trainer, acquire)
        try:
            yield
        finally:
            lock.release()  # does nothing on the other ranks

    def register(self, record: TaskRecord, weights: Mapping[str, Tensor], replace: bool) -> None:
        """Write this job's task file; inside `turn`, on rank 0.

        Args:
            record: the record to write into the file.
            weights: the fine-tuned backbone's tensors.
            replace: whether to replace a file with other weights. A file with the same weights is not written again.

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
                    "began; use a different task name for each job"
                )
        write_task_file(self.path, record, weights, {})
