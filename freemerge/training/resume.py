"""Checkpoints from which an interrupted fit resumes with the same bits as an undisturbed one.

`ResumeCheckpoint` writes `last.ckpt` at the start of every epoch but the first, in between every so many steps or
minutes, and at the end. `BestCheckpoint` keeps the best weights, in a folder that may be moved.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from freemerge.data import ResumableLoader, random_state, set_random_state
from freemerge.runtime.process_group import in_process_group

_LOADERS = "freemerge_loaders"


class Interrupted(Exception):
    """The fit was asked to stop and has written its checkpoint."""


class ResumeCheckpoint(Checkpoint):
    """Writes the state of a fit, atomically, to one file.

    The last of a Trainer's callbacks, so that the state of all others is what they go on from; with an `EpochStart`
    before them.

    Args:
        path: the file.
        steps: write it every so many batches within an epoch; None leaves that to `minutes`.
        minutes: write it when so many have passed since it was last written; None leaves that to `steps`.
        finishes: whether a checkpoint that was written at the end of a fit is the end: early stopping stays stopped.
    """

    def __init__(
        self, path: Path, steps: int | None = None, minutes: float | None = None, finishes: bool = True
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.steps = steps
        self.minutes = minutes
        self.finishes = finishes
        self.stop = False  # asked for by Ctrl-C
        self.metrics: dict[str, float] = {}
        self._place: str | None = None  # where a checkpoint is being written: `epoch`, `batch` or `end`
        self._loaded: dict[str, Any] = {}
        self._loader_states: list[Any] = []
        self._written = time.monotonic()
        self._batches = 0  # since then

    # -- going on -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._place is None:  # somebody else's checkpoint
            return {}
        return {"place": self._place, "metrics": self.metrics, "random": _of_all_ranks(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self.metrics = dict(state_dict.get("metrics", {}))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        loaders = loop.get("state_dict", {}).get("combined_loader", [])
        self._loader_states = _of_this_rank(checkpoint.get(_LOADERS, []), loaders)
        _move_all(trainer, checkpoint, to_relative=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._written = time.monotonic()
        place = self._loaded.get("place")
        if place == "batch" and isinstance(trainer.train_dataloader, ResumableLoader):
            # Lightning does so itself only where `estimated_stepping_batches` was not asked for, which sets the loaders
            # up before the checkpoint is read.
            trainer.train_dataloader.load_state_dict(self._loader_states[0])
        if place in ("epoch", "end"):
            # No epoch is under way: without this, Lightning would look for the rest of one.
            trainer.fit_loop.epoch_loop.restarting = False
        if place == "end" and self.finishes:
            trainer.should_stop = True

    def begin_epoch(self, trainer: L.Trainer) -> None:
        """Write what the epoch begins with, or go back to it; `EpochStart` calls this."""
        if self._loaded:
            if self._loaded["place"] != "batch":
                set_random_state(_of_this_rank(self._loaded["random"], random_state()))
            self._loaded = {}
        elif trainer.current_epoch > 0:
            self._write(trainer, "epoch")
        if self.stop and trainer.current_epoch > 0 and trainer.world_size == 1:
            raise Interrupted

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    # -- writing ------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loaded = {}
        # Lightning would leave out a step of ReduceLROnPlateau at the end of the epoch in which a fit goes on.
        trainer.fit_loop.restarting = False
        self._batches += 1
        if not _is_between_steps(trainer, batch_idx):
            return
        stop, due = self.stop or trainer.received_sigterm, self._is_due()
        if trainer.world_size > 1:  # all ranks write together, whichever was asked
            stop, due = (trainer.strategy.reduce_boolean_decision(each, all=False) for each in (stop, due))
        if stop or due:
            self._write(trainer, "batch")
        if stop and not trainer.received_sigterm:  # to which Lightning has an answer of its own
            raise Interrupted

    def _is_due(self) -> bool:
        by_steps = self.steps is not None and self._batches >= self.steps
        return by_steps or (self.minutes is not None and time.monotonic() - self._written >= 60 * self.minutes)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "end")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._place is None:
            return
        _move_all(trainer, checkpoint, to_relative=True)
        loop = checkpoint["loops"]["fit_loop"]
        if self._place == "batch":
            # Rank 0 writes the file; every rank has its own place in its data, and its own random numbers.
            checkpoint[_LOADERS] = _of_all_ranks(loop["state_dict"].get("combined_loader", []))
            return
        loop["state_dict"].pop("combined_loader", None)  # of an epoch that is over
        if self._place == "epoch":
            for progress in loop["epoch_progress"].values():
                progress["ready"] = progress["completed"]  # the next epoch is begun when the fit goes on

    def _write(self, trainer: L.Trainer, place: str) -> None:
        draft = self.path.with_name(f"{self.path.name}.partial")
        if trainer.is_global_zero:
            _remove(draft)
        self._place = place
        try:
            trainer.save_checkpoint(draft, weights_only=False)
        finally:
            self._place = None
        if trainer.is_global_zero:
            _replace(draft, self.path)
        trainer.strategy.barrier("ResumeCheckpoint")
        self._written, self._batches = time.monotonic(), 0


class EpochStart(L.Callback):
    """Lets a ResumeCheckpoint write before the others begin an epoch, though it comes after them at all other times.

    Args:
        checkpoint: the ResumeCheckpoint.
    """

    def __init__(self, checkpoint: ResumeCheckpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.checkpoint.begin_epoch(trainer)


def _of_all_ranks(value: Any) -> list[Any]:
    """What each rank has, by rank; all of them must call it."""
    if not in_process_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _of_this_rank(values: list[Any], otherwise: Any) -> Any:
    """A rank's own part of what `_of_all_ranks` gathered; something else where there were fewer ranks then."""
    rank = dist.get_rank() if in_process_group() else 0
    return values[rank] if isinstance(values, list) and rank < len(values) else otherwise


def _is_between_steps(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether nothing but the next batch comes next: no accumulated gradients, no validation, no end of the epoch."""
    done, interval = batch_idx + 1, trainer.val_check_batch
    if done == trainer.num_training_batches or done % trainer.accumulate_grad_batches != 0:
        return False
    if 0 < trainer.max_steps <= trainer.global_step:
        return False
    if trainer.check_val_every_n_epoch is None:
        done = trainer.fit_loop.total_batch_idx + 1
    return not isinstance(interval, int) or done % interval != 0


def _replace(draft: Path, path: Path) -> None:
    """Put a file, or the folder of a sharded checkpoint, into the place of the one before."""
    if not path.is_dir() and not draft.is_dir():
        os.replace(draft, path)
        return
    before = path.with_name(f"{path.name}.before")
    if path.exists():
        _remove(before)
        os.replace(path, before)
    os.replace(draft, path)
    _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose state says where files are relative to its folder, so that the folder may be moved."""

    def state_dict(self) -> dict[str, Any]:
        return _moved(super().state_dict(), str(self.dirpath), ".")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_moved(state_dict, ".", str(self.dirpath)))


def _move_all(trainer: L.Trainer, checkpoint: dict[str, Any], to_relative: bool) -> None:
    """Do in a checkpoint for the user's own ModelCheckpoints what `BestCheckpoint` does by itself."""
    states = checkpoint.get("callbacks", {})
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, BestCheckpoint):
            places = (str(callback.dirpath), ".") if to_relative else (".", str(callback.dirpath))
            if callback.state_key in states:
                states[callback.state_key] = _moved(states[callback.state_key], *places)


def _moved(state: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A ModelCheckpoint's state with the paths of one folder made those of another."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {move(key): item for key, item in value.items()}
        if isinstance(value, str) and (value == old or value.startswith(old + os.sep)):
            return new + value[len(old) :]
        return value

    paths = ("dirpath", "best_model_path", "best_k_models", "kth_best_model_path", "last_model_path")
    return {key: move(value) if key in paths else value for key, value in state.items()}


@contextmanager
def stopped_by_ctrl_c(checkpoint: ResumeCheckpoint, say: Callable[[str], None]) -> Iterator[None]:
    """Let Ctrl-C stop a fit where it can go on from; pressed again, at once.

    Args:
        checkpoint: what is told to stop.
        say: prints a message.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if checkpoint.stop:
            raise KeyboardInterrupt
        checkpoint.stop = True
        say("Ctrl-C: stopping after this step, or this validation; press it again to stop at once")

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
