"""ExpertTrainer: make merged + expert behave like the fine-tuned teacher.

What an expert keeps is fixed; only its values train, so the optimizer's memory is proportional to the expert, and the
student's weights exist one layer at a time. There are no labels: the teacher's features and logits are what the student
learns from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from freemerge.experts import Encoding, Expert, check_fits, decode_values, encode_values, substituted
from freemerge.inputs import IGNORED, Inputs, batch_size, named
from freemerge.models import Backbone
from freemerge.training.distillation import Distillation
from freemerge.training.optimization import OptimizedModule, Schedule
from freemerge.training.teacher import Teacher


class ExpertTrainer(OptimizedModule):
    """Trains one task's expert on the functional residual teacher(x) − merged(x).

    The loss is `Distillation`.

    Args:
        backbone: the backbone with the merged weights; frozen here.
        head: the task's head, shared by teacher and student; frozen.
        teacher: weights of the task's fine-tuned backbone, named as in `backbone.weights()`; any float dtype.
        expert: where to start from; its support or ranks stay fixed.
        optimizer: makes the optimizer of the values; AdamW if not given.
        schedule: how the learning rate falls over the fit.
        warmup: share of the steps over which the learning rate rises.
        encoding: how a file will store the values. With `int4` the student has them rounded like that, and gradients
            pass the rounding by (straight-through), so that training makes up for it; all others change next to
            nothing.
        feature_weight: weight of the features' loss.
        logit_weight: weight of the logits' loss.
        temperature: of the softened logits.
        feature_loss: `mse` or `cosine`.
        cache_teacher: compute the teacher's features of each input once and keep them: for data without augmentation.
        mixup: in training each input is blended with another of its batch, which gets a share drawn uniformly from 0 to
            this; 0 leaves inputs as they are. Teacher and student see the same blend, so that few data go a long way:
            the student has to match a function, and not only what it does to these (Beyer et al., arXiv 2106.05237).
            For pixels, not for tokens.

    Raises:
        ValueError: an expert for other weights; a loss or share that cannot be; `mixup` with `cache_teacher`, as no
            blend is seen twice.
    """

    LOGGED: ClassVar[tuple[str, ...]] = tuple(
        f"{split}/{part}" for split in ("train", "val") for part in Distillation.PARTS
    )
    """The metrics that a fit logs."""
    monitor: ClassVar[str] = "val/agreement"
    """The metric by which the best expert is chosen."""

    teacher: Teacher

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        teacher: Mapping[str, Tensor],
        expert: Expert,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "cosine",
        warmup: float = 0.1,
        encoding: Encoding = "int8",
        feature_weight: float = 1.0,
        logit_weight: float = 1.0,
        temperature: float = 2.0,
        feature_loss: Literal["mse", "cosine"] = "mse",
        cache_teacher: bool = False,
        mixup: float = 0.0,
    ) -> None:
        check_mixup(mixup, cache_teacher)
        super().__init__(optimizer, schedule, warmup)
        objects = ["backbone", "head", "teacher", "expert", "optimizer"]
        self.save_hyperparameters(ignore=[*objects, *(["schedule"] if callable(schedule) else [])])
        check_fits(expert, backbone.weights())
        self.backbone = backbone.requires_grad_(False).eval()  # by itself, as Lightning keeps the mode that it finds
        self.head = head.requires_grad_(False)
        self.__dict__["teacher"] = Teacher(teacher, cache_teacher)  # outside the module tree
        self.start = expert
        self.values = nn.Parameter(expert.flat_values().clone())
        self.encoding = encoding
        self.mixup = mixup
        self.distillation = Distillation(feature_weight, logit_weight, temperature, feature_loss)
        self.strict_loading = False  # checkpoints hold the values alone

    @property
    def expert(self) -> Expert:
        """The expert as trained so far, on the CPU."""
        return self.start.to("cpu").with_values(self.values.detach().float().cpu())

    def on_fit_start(self) -> None:
        self.start = self.start.to(self.device)
        self.teacher.to(self.device)

    def train(self, mode: bool = True) -> ExpertTrainer:
        """The backbone stays in eval mode: dropout and batch statistics belong to neither teacher nor student."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, inputs: Inputs) -> Tensor:
        """Features (B, F) of merged + expert, differentiable in the values."""
        expert = self.start.with_values(self._stored())
        with substituted(self.backbone.model, expert.shapes, expert.added):
            return self.backbone(inputs)

    def _stored(self) -> Tensor:
        """The values as a file will give them back, where that matters; with the gradient of the values themselves."""
        if self.encoding != "int4":
            return self.values
        with torch.no_grad():
            parts = self.start.with_values(self.values).parts().values()
            codes, scales = encode_values(list(parts), self.encoding)
            rounded = torch.cat(decode_values(codes, scales, [part.numel() for part in parts]))
        return self.values + (rounded - self.values).detach()

    def _losses(self, inputs: Inputs) -> dict[str, Tensor]:
        student, teacher = self(inputs), self.teacher(self.backbone, inputs)
        if student.dim() == 3 and (counts := _tokens_that_count(inputs)) is not None:
            student, teacher = student[counts], teacher[counts]  # (B, L, V) → (tokens, V)
        return self.distillation(student, teacher, self.head)

    def training_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> Tensor:
        losses = self._losses(blended(batch[0], self.mixup) if self.mixup else batch[0])
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> None:
        losses = self._losses(batch[0])
        self.see_outputs(losses["loss"])
        self.log_dict(
            {f"val/{name}": value for name, value in losses.items()},
            prog_bar=True,
            on_epoch=True,
            sync_dist=True,
            batch_size=batch_size(batch[0]),
        )

    def on_validation_epoch_end(self) -> None:
        self.check_outputs("validation")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {"values": checkpoint["state_dict"]["values"]}
        checkpoint["teacher_seen"] = self.teacher.seen()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.teacher.load_seen(checkpoint.get("teacher_seen", {}), self.device)


def _tokens_that_count(inputs: Inputs) -> Tensor | None:
    """Where a language model's outputs (B, L, V) are for tokens that are not padding: (B, L) bool; None if all are."""
    given = named(inputs)
    if "labels" in given:  # what a decoder writes
        return given["labels"] != IGNORED
    mask = given.get("attention_mask")
    return None if mask is None else mask.bool()


def check_mixup(mixup: float, cache_teacher: bool) -> None:
    """Raise a ValueError for a share that cannot be, or one whose blends a cache of the teacher would only pile up."""
    if not 0.0 <= mixup <= 1.0:
        raise ValueError(f"mixup must be in [0, 1], got {mixup}")
    if mixup and cache_teacher:
        raise ValueError("mixup shows the teacher new inputs all the time: set cache_teacher to false, or mixup to 0")


def blended(inputs: Inputs, largest: float) -> Tensor:
    """Each input with a share of the one before it in the batch.

    Args:
        inputs: (B, …) floating point.
        largest: each input's share of the other is drawn from a uniform distribution between 0 and this.

    Returns:
        (B, …) of the same dtype.

    Raises:
        ValueError: for inputs that cannot be blended, such as tokens.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else f"a dict of {', '.join(named(inputs))}"
        raise ValueError(f"mixup blends images, one float tensor per batch; these inputs are {found}: set mixup to 0")
    share = largest * torch.rand(len(inputs), *(1,) * (inputs.dim() - 1), device=inputs.device, dtype=inputs.dtype)
    return torch.lerp(inputs, inputs.roll(1, dims=0), share)
