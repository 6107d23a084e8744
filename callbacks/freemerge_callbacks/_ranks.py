"""Work that only rank 0 does: the other ranks wait for it, and an error on rank 0 is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from freemerge.runtime import Processes


def on_rank_zero(trainer: L.Trainer, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 while the others wait.

    Args:
        trainer: the Trainer; all of its ranks must call this.
        work: a function without arguments whose result can be pickled.

    Returns:
        The result of `work`, on every rank.

    Raises:
        Exception: on rank 0, the error that `work` raised.
        RuntimeError: on the other ranks, with that error's message; without it they would wait until they time out.
    """
    result, failure = None, None
    if trainer.is_global_zero:
        try:
            result = work()
        except Exception as error:
            failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    result, message = trainer.strategy.broadcast((result, message))
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(f"rank 0 failed with {message}")
    return result


def all_reach(trainer: L.Trainer, inputs: Iterable[Path], output: Path) -> bool:
    """Check whether every rank can access a merge's files, so that the ranks can divide the work.

    Args:
        trainer: the Trainer; all of its ranks must call this.
        inputs: the files to read.
        output: the file or folder to write; its parent folder is created.

    Returns:
        True if all ranks can; False if there is only one rank.
    """
    if trainer.world_size == 1:
        return False
    probe = output.with_name(f".{output.name}.seen")

    def leave() -> None:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()

    on_rank_zero(trainer, leave)
    processes = Processes(shared=True)
    try:
        return all(processes.gather(all(path.exists() for path in (*inputs, probe))))
    finally:
        processes.close()
        if trainer.is_global_zero:
            probe.unlink(missing_ok=True)


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Send metrics to the Trainer's loggers, in hooks where `self.log` is not allowed.

    Args:
        trainer: the Trainer.
        metrics: name → value.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)
