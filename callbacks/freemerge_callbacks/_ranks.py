"""Work that rank 0 does for all: nobody goes on before it is done, and its error is everybody's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from freemerge.runtime import Processes


def on_rank_zero(trainer: L.Trainer, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 while the others wait.

    Args:
        trainer: whose ranks; all of them must call this.
        work: takes nothing and returns something that can be pickled.

    Returns:
        What `work` returned, on every rank.

    Raises:
        Exception: what `work` raised, on rank 0.
        RuntimeError: that error's message, on the others, which would otherwise wait for rank 0 until they time out.
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
    """Whether every rank sees all files of a merge and the folder it writes to, so that the ranks can share the work.

    Args:
        trainer: whose ranks; all of them must call this.
        inputs: what is read.
        output: what will be written.
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
    """Hand numbers to the trainer's loggers, in the hooks in which `self.log` is not allowed."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)
