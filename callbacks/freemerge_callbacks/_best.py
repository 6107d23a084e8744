"""The best weights of a fit, from the Trainer's ModelCheckpoint."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from freemerge.checkpoints import Checkpoint, open_checkpoint
from freemerge_callbacks._weights import relative


def best_checkpoint(trainer: L.Trainer, who: str) -> ModelCheckpoint:
    """The Trainer's first ModelCheckpoint that knows which of its checkpoints is the best.

    Raises:
        ValueError: there is none, or it writes checkpoints that are folders of shards.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k != 0:
            break
    else:
        raise ValueError(
            f"{who}: weights='best' needs a ModelCheckpoint with a `monitor` (and save_top_k ≠ 0) among the Trainer's "
            "callbacks; add one, or take weights='last'"
        )
    strategy = trainer.strategy
    folder = (isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded") or (
        isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint
    )
    if folder:
        raise ValueError(
            f"{who}: weights='best' cannot read the sharded checkpoints of this {type(strategy).__name__}; give it "
            "save_distributed_checkpoint=False (FSDP: state_dict_type='full'), or take weights='last'"
        )
    return callback


def best_state(path: str, backbone: str, who: str) -> Checkpoint:
    """The state dict in a Lightning checkpoint, read without running its code.

    Raises:
        ValueError: no checkpoint was written, or it holds no such backbone.
    """
    if not path:
        raise ValueError(f"{who}: weights='best', but ModelCheckpoint has saved nothing; was its metric logged?")
    state = open_checkpoint(path)
    if not relative(state, backbone):
        raise ValueError(f"{who}: {path}: no tensor's name starts with '{backbone}.'")
    return state
