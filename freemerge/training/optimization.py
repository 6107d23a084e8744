"""The optimizer set-up that all trainers share: any torch optimizer, and a schedule over the whole fit."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from freemerge.training.finite import FiniteModule

_NAMED = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt")
Schedule = Literal["constant", "linear", "cosine", "polynomial", "inverse_sqrt"] | LRSchedulerCallable
"""A schedule by its name, or a class of torch.optim.lr_scheduler with its arguments."""


def plateau_monitor(scheduler: Any) -> str | None:
    """The metric that a scheduler follows: Lightning's ReduceLROnPlateau names one; None if it follows none."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return None
    return getattr(scheduler, "monitor", "val/loss")


class OptimizedModule(FiniteModule):
    """A LightningModule that trains its trainable parameters by one optimizer on one schedule, as long as the loss is a
    number.

    Args:
        optimizer: makes the optimizer; AdamW with torch's defaults if not given.
        schedule: how the learning rate falls after warm-up: not at all, linearly or along a cosine to 0, by a
            polynomial (linearly, to almost 0), or as the inverse square root of the steps; or a torch scheduler,
            stepped after every batch (ReduceLROnPlateau after every epoch, by `val/loss`, or by the `monitor`
            of Lightning's class).
        warmup: share of all steps over which the learning rate rises linearly from 0; not for torch schedulers.

    Raises:
        ValueError: for a schedule that does not exist, or a warm-up outside [0, 1].
    """

    def __init__(self, optimizer: OptimizerCallable | None, schedule: Schedule, warmup: float) -> None:
        super().__init__()
        if not callable(schedule) and schedule not in _NAMED:
            raise ValueError(f"schedule must be one of {', '.join(_NAMED)}, or a torch scheduler, got {schedule!r}")
        if not 0.0 <= warmup <= 1.0:
            raise ValueError(f"warmup must be a share of the steps, in [0, 1], got {warmup}")
        # None rather than a default class: a configuration that names another class would inherit the default's
        # arguments where the names match, AdamW's weight decay for instance.
        self.optimizer = optimizer or torch.optim.AdamW
        self.schedule = schedule
        self.warmup = warmup

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the schedule stepped after every batch."""
        from transformers import get_scheduler

        built = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if callable(self.schedule):
            scheduler = self.schedule(built)
            if (monitor := plateau_monitor(scheduler)) is not None:
                return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
            return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        steps = int(self.trainer.estimated_stepping_batches)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, built, num_warmup_steps=round(self.warmup * steps), num_training_steps=steps)
        return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
