"""The best weights of a fit, from the Trainer's ModelCheckpoint."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from freemerge.checkpoints import Checkpoint, open_checkpoint
from freemerge_callbacks._weights import is_a, part_of


def best_checkpoint(trainer: L.Trainer, who: str) -> ModelCheckpoint:
    """The Trainer's first ModelCheckpoint that knows which of its checkpoints is the best.

    Raises:
        ValueError: there is none.
    """
    for callback in trainer.checkpoint_callbacks:
        if is_a(callback, "ModelCheckpoint") and callback.monitor is not None and callback.save_top_k != 0:
            return callback
    raise ValueError(
        f"{who}: weights='best' needs a ModelCheckpoint with a `monitor` (and save_top_k ≠ 0) among the Trainer's "
        "callbacks; add one, or take weights='last'"
    )


def best_state(path: str, backbone: str, who: str) -> Checkpoint:
    """The state dict in a Lightning checkpoint, a file or a folder of shards, read without running its code.

    Raises:
        ValueError: no checkpoint was written, or it holds no such backbone.
    """
    if not path:
        raise ValueError(f"{who}: weights='best', but ModelCheckpoint has saved nothing; was its metric logged?")
    state = open_checkpoint(path)
    if not part_of(state, backbone).names:
        raise ValueError(f"{who}: {path}: no tensor's name starts with '{backbone}.'")
    return state
