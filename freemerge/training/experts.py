"""ExpertTrainer: make merged + expert behave like the fine-tuned teacher.

The expert's support is fixed; only its values train, so the optimizer's memory is proportional to the expert. There are
no labels: the teacher's features and logits are what the student learns from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.func import functional_call

from freemerge.experts import SparseExpert, check_fits
from freemerge.models import Backbone
from freemerge.training.distillation import Distillation
from freemerge.training.optimization import OptimizedModule, Schedule


class ExpertTrainer(OptimizedModule):
    """Trains one task's expert on the functional residual teacher(x) − merged(x).

    The loss is `Distillation`.

    Args:
        backbone: the backbone with the merged weights; frozen here.
        head: the task's head, shared by teacher and student; frozen.
        teacher: weights of the task's fine-tuned backbone, named as in `backbone.weights()`; any float dtype.
        expert: where to start from; its support stays fixed.
        optimizer: makes the optimizer of the values; AdamW if not given.
        schedule: how the learning rate falls over the fit.
        warmup: share of the steps over which the learning rate rises.
        feature_weight: weight of the features' loss.
        logit_weight: weight of the logits' loss.
        temperature: of the softened logits.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        teacher: Mapping[str, Tensor],
        expert: SparseExpert,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "cosine",
        warmup: float = 0.1,
        feature_weight: float = 1.0,
        logit_weight: float = 1.0,
        temperature: float = 2.0,
    ) -> None:
        super().__init__(optimizer, schedule, warmup)
        check_fits(expert, backbone.weights())
        self.backbone = backbone.requires_grad_(False)
        self.head = head.requires_grad_(False)
        # Outside the module tree: not in checkpoints, not in the parameter count, not wrapped by a strategy.
        self.__dict__["teacher"] = {f"model.{name}": tensor.detach() for name, tensor in teacher.items()}
        self.start = expert
        self.values = nn.Parameter(expert.flat_values().clone())
        self.distillation = Distillation(feature_weight, logit_weight, temperature)
        self.strict_loading = False  # checkpoints hold the values alone

    @property
    def expert(self) -> SparseExpert:
        """The expert as trained so far, on the CPU."""
        return self.start.to("cpu").with_values(self.values.detach().float().cpu())

    def on_fit_start(self) -> None:
        self.start = self.start.to(self.device)
        self.__dict__["teacher"] = {name: tensor.to(self.device) for name, tensor in self.teacher.items()}

    def train(self, mode: bool = True) -> ExpertTrainer:
        """The backbone stays in eval mode: dropout and batch statistics belong to neither teacher nor student."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Features (B, F) of merged + expert, differentiable in the values."""
        live = dict(self.backbone.model.named_parameters())
        expert = self.start.with_values(self.values)
        weights = {
            f"model.{name}": live[name]
            .flatten()
            .index_add(0, expert.indices[name], value.to(live[name].dtype))
            .view(live[name].shape)
            for name, value in expert.values.items()
        }
        return functional_call(self.backbone, weights, (inputs,))

    def _losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs = batch[0]
        with torch.no_grad():
            target = functional_call(self.backbone, self.teacher, (inputs,))  # (B, F)
        return self.distillation(self(inputs), target, self.head)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        losses = self._losses(batch)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        losses = self._losses(batch)
        self.log_dict(
            {f"val/{name}": value for name, value in losses.items()},
            prog_bar=True,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch[0]),
        )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["state_dict"] = {"values": checkpoint["state_dict"]["values"]}
