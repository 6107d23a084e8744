"""Checkpoints from which an interrupted fit resumes with bit-identical results.

`ResumeCheckpoint` writes `last.ckpt` at the start of every epoch except the first, optionally every few steps or
minutes within an epoch, and at the end. `BestCheckpoint` keeps the best weights in a folder that can be moved.

Lightning's ModelCheckpoint is not enough for the former: it saves neither random generators nor the state of each
rank's loader.
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
    """Raised when a fit has stopped on request, after its checkpoint has been written."""


class ResumeCheckpoint(Checkpoint):
    """Writes the state of a fit atomically to one file.

    It must be the last of a Trainer's callbacks, so that the saved states of the others are complete; an `EpochStart`
    must be the first.

    Args:
        path: the file.
        steps: number of batches between checkpoints within an epoch; None: `minutes` alone determines them.
        minutes: minutes between checkpoints within an epoch; None: `steps` alone determines them.
        finishes: whether a fit that is resumed from a checkpoint written at its end stops at once, for instance after
            early stopping.
    """

    def __init__(
        self, path: Path, steps: int | None = None, minutes: float | None = None, finishes: bool = True
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.steps = steps
        self.minutes = minutes
        self.finishes = finishes
        self.stop = False  # set by Ctrl-C
        self.metrics: dict[str, float] = {}
        self._place: str | None = None  # the point at which a checkpoint is being written: `epoch`, `batch` or `end`
        self._loaded: dict[str, Any] = {}
        self._loader_states: list[Any] = []
        self._written = time.monotonic()
        self._batches = 0  # since the file was last written

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The callback's state.

        Returns:
            The point of the fit, the latest metrics and all ranks' random generators; empty in checkpoints of others.
        """
        if self._place is None:  # the checkpoint of another callback
            return {}
        return {"place": self._place, "metrics": self.metrics, "random": _gather_ranks(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit starts.

        Args:
            state_dict: the result of `state_dict`.
        """
        self._loaded = state_dict
        self.metrics = dict(state_dict.get("metrics", {}))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's loader states, and make the paths of ModelCheckpoints absolute again.

        Args:
            trainer: the Trainer.
            pl_module: not used.
            checkpoint: Lightning's checkpoint; changed in place.
        """
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        loaders = loop.get("state_dict", {}).get("combined_loader", [])
        self._loader_states = _select_rank(checkpoint.get(_LOADERS, []), loaders)
        _convert_paths(trainer, checkpoint, to_relative=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the Trainer's loops and loaders to the point of the checkpoint.

        Args:
            trainer: the Trainer.
            pl_module: not used.
        """
        self._written = time.monotonic()
        place = self._loaded.get("place")
        if place == "batch" and isinstance(trainer.train_dataloader, ResumableLoader):
            # Lightning does this itself only if `estimated_stepping_batches` has not been read, because reading it sets
            # up the loaders before the checkpoint is loaded.
            trainer.train_dataloader.load_state_dict(self._loader_states[0])
        if place in ("epoch", "end"):
            # No epoch is in progress; otherwise Lightning would try to finish one.
            trainer.fit_loop.epoch_loop.restarting = False
        if place == "end" and self.finishes:
            trainer.should_stop = True

    def begin_epoch(self, trainer: L.Trainer) -> None:
        """Write a checkpoint, or restore the random generators of the one being resumed; `EpochStart` calls this.

        Args:
            trainer: the Trainer.

        Raises:
            Interrupted: if a stop has been requested.
        """
        if self._loaded:
            if self._loaded["place"] != "batch":
                set_random_state(_select_rank(self._loaded["random"], random_state()))
            self._loaded = {}
        elif trainer.current_epoch > 0:
            self._write(trainer, "epoch")
        if self.stop and trainer.current_epoch > 0 and trainer.world_size == 1:
            raise Interrupted

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the latest metrics.

        Args:
            trainer: the Trainer.
            pl_module: not used.
        """
        if not trainer.sanity_checking:
            self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    # -- writing ------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due or a stop has been requested.

        Args:
            trainer: the Trainer.
            pl_module: not used.
            outputs: not used.
            batch: not used.
            batch_idx: index of the batch in the epoch.

        Raises:
            Interrupted: if a stop has been requested.
        """
        self._loaded = {}
        # Lightning would skip the step of ReduceLROnPlateau at the end of the epoch in which a fit resumes.
        trainer.fit_loop.restarting = False
        self._batches += 1
        if not _can_resume_here(trainer, batch_idx):
            return
        stop, due = self.stop or trainer.received_sigterm, self._is_due()
        if trainer.world_size > 1:  # all ranks write together, no matter which of them was interrupted
            stop, due = (trainer.strategy.reduce_boolean_decision(each, all=False) for each in (stop, due))
        if stop or due:
            self._write(trainer, "batch")
        if stop and not trainer.received_sigterm:  # Lightning handles SIGTERM itself
            raise Interrupted

    def _is_due(self) -> bool:
        by_steps = self.steps is not None and self._batches >= self.steps
        return by_steps or (self.minutes is not None and time.monotonic() - self._written >= 60 * self.minutes)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint of the end of the fit.

        Args:
            trainer: the Trainer.
            pl_module: not used.
        """
        self._write(trainer, "end")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add all ranks' loader states, and make the paths of ModelCheckpoints relative.

        Args:
            trainer: the Trainer.
            pl_module: not used.
            checkpoint: Lightning's checkpoint; changed in place.
        """
        if self._place is None:
            return
        _convert_paths(trainer, checkpoint, to_relative=True)
        loop = checkpoint["loops"]["fit_loop"]
        if self._place == "batch":
            # Rank 0 writes the file, but every rank has its own position in its data.
            checkpoint[_LOADERS] = _gather_ranks(loop["state_dict"].get("combined_loader", []))
            return
        loop["state_dict"].pop("combined_loader", None)  # belongs to the finished epoch
        if self._place == "epoch":
            for progress in loop["epoch_progress"].values():
                progress["ready"] = progress["completed"]  # the resumed fit starts the next epoch

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
    """Lets a ResumeCheckpoint, which is the last callback, write before all other callbacks at the start of an epoch.

    Args:
        checkpoint: the ResumeCheckpoint.
    """

    def __init__(self, checkpoint: ResumeCheckpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Call `ResumeCheckpoint.begin_epoch`.

        Args:
            trainer: the Trainer.
            pl_module: not used.
        """
        self.checkpoint.begin_epoch(trainer)


def _gather_ranks(value: Any) -> list[Any]:
    """Gather a value from all ranks, in order of rank; all ranks must call this."""
    if not in_process_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _select_rank(values: list[Any], otherwise: Any) -> Any:
    """This rank's value of those that `_gather_ranks` gathered; `otherwise` if there were fewer ranks then."""
    rank = dist.get_rank() if in_process_group() else 0
    return values[rank] if isinstance(values, list) and rank < len(values) else otherwise


def _can_resume_here(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the next batch follows directly: no pending gradients, no validation, not the end of the epoch."""
    done, interval = batch_idx + 1, trainer.val_check_batch
    if done == trainer.num_training_batches or done % trainer.accumulate_grad_batches != 0:
        return False
    if 0 < trainer.max_steps <= trainer.global_step:
        return False
    if trainer.check_val_every_n_epoch is None:
        done = trainer.fit_loop.total_batch_idx + 1
    return not isinstance(interval, int) or done % interval != 0


def _replace(draft: Path, path: Path) -> None:
    """Replace a file, or the folder of a sharded checkpoint, by a new one."""
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
    """A ModelCheckpoint whose state contains paths relative to its folder, so that the folder can be moved."""

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's state with relative paths."""
        return _replace_folder(super().state_dict(), str(self.dirpath), ".")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, with paths in the current folder.

        Args:
            state_dict: the result of `state_dict`.
        """
        super().load_state_dict(_replace_folder(state_dict, ".", str(self.dirpath)))


def _convert_paths(trainer: L.Trainer, checkpoint: dict[str, Any], to_relative: bool) -> None:
    """Make paths relative or absolute in the states of the user's ModelCheckpoints, as `BestCheckpoint` does."""
    states = checkpoint.get("callbacks", {})
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, BestCheckpoint):
            places = (str(callback.dirpath), ".") if to_relative else (".", str(callback.dirpath))
            if callback.state_key in states:
                states[callback.state_key] = _replace_folder(states[callback.state_key], *places)


def _replace_folder(state: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A ModelCheckpoint's state with one folder replaced by another in all paths."""

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
    """Within this context, Ctrl-C stops a fit after its next checkpoint; a second Ctrl-C stops it at once.

    Args:
        checkpoint: the callback that writes the checkpoint and stops the fit.
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
