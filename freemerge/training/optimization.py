"""The optimizer set-up that all trainers share: any torch optimizer, and a schedule over the whole fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

Schedule = Literal["constant", "linear", "cosine"]


def configure(
    module: L.LightningModule,
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    schedule: Schedule,
    warmup: float,
) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimizer, and a per-step schedule with warm-up.

    Args:
        module: the module being fitted; its trainer knows how many steps there will be.
        parameters: what to train.
        optimizer: makes the optimizer.
        schedule: how the learning rate falls after warm-up: not at all, linearly, or along a cosine, to 0.
        warmup: share of all steps over which the learning rate rises linearly from 0.
    """
    from transformers import get_scheduler

    built = optimizer([parameter for parameter in parameters if parameter.requires_grad])
    steps = int(module.trainer.estimated_stepping_batches)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, built, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
