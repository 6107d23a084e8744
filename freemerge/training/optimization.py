"""The optimizer and schedule of all trainers: any torch optimizer, and a schedule over the whole fit."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from freemerge.training.finite import FiniteModule

_NAMED = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt")
Schedule = Literal["constant", "linear", "cosine", "polynomial", "inverse_sqrt"] | LRSchedulerCallable
"""The name of a schedule, or a class of torch.optim.lr_scheduler with its arguments."""


def plateau_monitor(scheduler: Any) -> str | None:
    """The metric that a scheduler monitors.

    Args:
        scheduler: a torch scheduler.

    Returns:
        For ReduceLROnPlateau, the `monitor` of Lightning's class or else `val/loss`; None for other schedulers.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return None
    return getattr(scheduler, "monitor", "val/loss")


class OptimizedModule(FiniteModule):
    """A LightningModule that trains its trainable parameters with one optimizer and one learning rate schedule.

    The schedules are those of `transformers.get_scheduler`. The fit ends at a NaN or infinite loss; see `FiniteModule`.

    Args:
        optimizer: makes the optimizer; None is AdamW with torch's defaults.
        schedule: the learning rate after the warm-up: `constant`; `linear` or `cosine`, which decay to 0; `polynomial`
            (linear, to almost 0); `inverse_sqrt` of the step; or a torch scheduler, stepped after every batch
            (ReduceLROnPlateau after every epoch; it monitors `val/loss`, or the `monitor` of Lightning's class).
        warmup: fraction of all steps over which the learning rate rises linearly from 0; ignored by torch schedulers.

    Raises:
        ValueError: if there is no such schedule, or `warmup` is outside [0, 1].
    """

    def __init__(self, optimizer: OptimizerCallable | None, schedule: Schedule, warmup: float) -> None:
        super().__init__()
        if not callable(schedule) and schedule not in _NAMED:
            raise ValueError(f"schedule must be one of {', '.join(_NAMED)}, or a torch scheduler, got {schedule!r}")
        if not 0.0 <= warmup <= 1.0:
            raise ValueError(f"warmup must be a fraction of the steps, in [0, 1], got {warmup}")
        # The default is None instead of a class: a configuration with another class would inherit the default class's
        # arguments of the same name, for instance AdamW's weight decay.
        self.optimizer = optimizer or torch.optim.AdamW
        self.schedule = schedule
        self.warmup = warmup

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and the schedule; Lightning calls this.

        Returns:
            Lightning's dictionary; the schedule is stepped after every batch, ReduceLROnPlateau after every epoch.
        """
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
