"""RouterTrainer: trains the router to recognise an input's task, on a mixture of all tasks' training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from freemerge.inputs import Inputs, to_device
from freemerge.models import Backbone, Router, choose_thresholds
from freemerge.training.optimization import OptimizedModule, Schedule


class RouterTrainer(OptimizedModule):
    """Trains a router by cross-entropy; a batch is (inputs, task index).

    Args:
        router: the router.
        backbone: the merged backbone, for a router that uses its features; it is frozen and not saved in checkpoints.
        optimizer: makes the optimizer; None is AdamW.
        schedule: learning rate schedule after the warm-up.
        warmup: fraction of the steps over which the learning rate rises.
    """

    LOGGED: ClassVar[tuple[str, ...]] = ("train/loss", "val/loss", "val/acc")
    """The metrics that a fit logs."""
    monitor: ClassVar[str] = "val/acc"
    """The metric by which the best router is chosen."""

    def __init__(
        self,
        router: Router,
        backbone: Backbone | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "cosine",
        warmup: float = 0.1,
    ) -> None:
        super().__init__(optimizer, schedule, warmup)
        self.save_hyperparameters(
            ignore=["router", "backbone", "optimizer", *(["schedule"] if callable(schedule) else [])]
        )
        self.router = router
        # Outside the module tree, because it is neither trained nor saved in checkpoints.
        self.__dict__["backbone"] = backbone.eval().requires_grad_(False) if backbone is not None else None
        self.accuracy = MulticlassAccuracy(max(router.num_tasks, 2), average="micro")  # one task: always 1

    def on_fit_start(self) -> None:
        """Move the backbone to the device."""
        if self.backbone is not None:
            self.backbone.to(self.device)

    def forward(self, inputs: Inputs) -> Tensor:
        """Compute the task logits of a batch.

        Args:
            inputs: a batch.

        Returns:
            (B, K).
        """
        return self.router(inputs, self.backbone)

    def judge(self, loader: Iterable) -> tuple[Tensor, Tensor]:
        """Compute the task logits and out-of-distribution scores of all inputs of a loader.

        Args:
            loader: batches of (inputs, labels); the labels are ignored.

        Returns:
            float32 (N, K) and float (N,), on the CPU.
        """
        logits, scores, _ = self._over(loader, self.router.judge)
        return logits.float(), scores

    def calibrate(self, train: Iterable, val: Iterable, fraction: float = 0.99) -> float:
        """After training: round the router, fit the out-of-distribution score, and choose the thresholds.

        Args:
            train: batches of (inputs, task index) that the router was trained on.
            val: batches that it was not trained on.
            fraction: fraction of the validation samples that must be routed, in (0, 1].

        Returns:
            The threshold of the confidence; the router stores the threshold of the out-of-distribution score.
        """
        self.router.round_()
        features, tasks = self._over(train, lambda *batch: (self.router.head_inputs(*batch),))
        self.router.out_of_distribution.fit(features, tasks)
        threshold, lowest = choose_thresholds(*self.judge(val), fraction)
        self.router.out_of_distribution.threshold.fill_(lowest)
        return threshold

    @torch.no_grad()
    def _over(self, loader: Iterable, compute: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        """Compute something for all batches in eval mode; returns the results and the labels, on the CPU."""
        was_training = self.training
        self.eval()
        device = next(self.router.parameters()).device
        if self.backbone is not None:
            self.backbone.to(device)
        try:
            found = [(*compute(to_device(inputs, device), self.backbone), labels) for inputs, labels in loader]
        finally:
            self.train(was_training)
        return [torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True)]

    def training_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch; logs `train/loss`.

        Args:
            batch: (inputs, task index).
            batch_idx: ignored.

        Returns:
            Scalar loss.
        """
        inputs, tasks = batch
        loss = F.cross_entropy(self(inputs), tasks)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> None:
        """Log `val/loss` and `val/acc`.

        Args:
            batch: (inputs, task index).
            batch_idx: ignored.
        """
        inputs, tasks = batch
        logits = self(inputs)
        self.record_outputs(logits)
        self.accuracy.update(logits.argmax(dim=1), tasks)
        self.log("val/loss", F.cross_entropy(logits, tasks), on_epoch=True, sync_dist=True, batch_size=len(tasks))
        self.log("val/acc", self.accuracy, prog_bar=True, on_epoch=True, batch_size=len(tasks))

    def on_validation_epoch_end(self) -> None:
        """Raise a NotFiniteError if an output was NaN or infinite."""
        self.check_outputs("validation")
