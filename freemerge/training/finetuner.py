"""FineTuner: one backbone, one task, one head. Its fit makes a task vector."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from freemerge.models import Backbone, extract_features
from freemerge.training.optimization import OptimizedModule, Schedule
from freemerge.training.probe import fit_probe


class FineTuner(OptimizedModule):
    """Fine-tunes a backbone on a classification task.

    In a suite one FineTuner is the template: `for_task` makes a fresh one for each task, from the same base weights.

    Args:
        backbone: the pretrained backbone.
        num_classes: number of classes C; a suite's tasks set it themselves.
        head: how the head starts and whether it trains: `probe` fits a linear probe on the base's features at fit
            start and freezes it, so that the task vector holds all that is learnt; `linear` starts at random and
            trains along.
        optimizer: makes the optimizer; AdamW if not given.
        schedule: how the learning rate falls over the fit.
        warmup: share of the steps over which the learning rate rises.
        label_smoothing: of the cross-entropy.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int | None = None,
        head: Literal["probe", "linear"] = "probe",
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "cosine",
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(optimizer, schedule, warmup)
        if head not in ("probe", "linear"):
            raise ValueError(f"FineTuner: head must be 'probe' or 'linear', got {head!r}")
        self.backbone = backbone
        self.head_kind = head
        self.label_smoothing = label_smoothing
        # In the state dict, so that a resumed fit does not fit its probe again on a half-tuned backbone.
        self.register_buffer("head_ready", torch.tensor(False))
        self.head: nn.Linear | None = None
        if num_classes is not None:
            self._set_head(num_classes)

    def _set_head(self, num_classes: int) -> None:
        self.head = nn.Linear(self.backbone.feature_dim, num_classes)
        self.head.requires_grad_(self.head_kind == "linear")
        self.head_ready.fill_(self.head_kind == "linear")
        metrics = {"acc": MulticlassAccuracy(num_classes, average="micro"), "loss": MeanMetric()}
        self.metrics = nn.ModuleDict({"val": nn.ModuleDict(metrics), "test": nn.ModuleDict(copy.deepcopy(metrics))})

    def for_task(self, num_classes: int) -> FineTuner:
        """A copy of this module, base weights included, with a new head for `num_classes` classes."""
        tuner = copy.deepcopy(self)
        tuner._set_head(num_classes)
        return tuner

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, C) of a batch."""
        return self.head(self.backbone(inputs))

    def on_fit_start(self) -> None:
        if self.head is None:
            raise ValueError("FineTuner: no head; give `num_classes`, or fit it on a suite")

    def on_train_start(self) -> None:
        """Fit the probe on the base's features of the training data, unless a checkpoint brought the head."""
        if self.head_ready:
            return
        features, labels = extract_features(self.backbone, self.trainer.train_dataloader, self.device)
        if self.trainer.world_size > 1:  # each rank saw its share: (world, n, …) → (world · n, …)
            features, labels = (self.all_gather(part.to(self.device)).flatten(0, 1) for part in (features, labels))
        probe = fit_probe(features, labels, self.head.out_features)
        self.head.load_state_dict(self.trainer.strategy.broadcast(probe.state_dict()))
        self.head_ready.fill_(True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        inputs, labels = batch
        logits = self(inputs)
        metrics = self.metrics[split]
        metrics["acc"].update(logits, labels)
        metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
        for name, metric in metrics.items():
            self.log(f"{split}/{name}", metric, prog_bar=name == "acc", on_epoch=True, batch_size=len(labels))
