"""ExpertTrainer: trains an expert so that merged + expert behaves like the fine-tuned teacher.

The expert's support (or rank) is fixed and only its values train, so the optimizer's memory is proportional to the
expert, and the student's weights are materialised one layer at a time. Training needs no labels: the targets are the
teacher's features and logits; of a language model, its distributions of the tokens of the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from freemerge.experts import Encoding, Expert, check_fits, decode_values, encode_values, names_of_changes, substituted
from freemerge.inputs import Inputs, batch_size, named
from freemerge.models import Backbone, LanguageBackbone
from freemerge.training.distillation import Distillation
from freemerge.training.optimization import OptimizedModule, Schedule
from freemerge.training.teacher import Teacher


class ExpertTrainer(OptimizedModule):
    """Trains one task's expert on the functional residual teacher(x) − merged(x).

    The loss is `Distillation`.

    Args:
        backbone: the backbone with the merged weights; it is frozen.
        head: the task's head, shared by teacher and student; it is frozen.
        teacher: weights of the task's fine-tuned backbone, named as in `backbone.weights()`; any float dtype.
        expert: the initial expert; its support or ranks stay fixed.
        optimizer: makes the optimizer of the values; None is AdamW.
        schedule: learning rate schedule after the warm-up.
        warmup: fraction of the steps over which the learning rate rises.
        encoding: the encoding of the values in the expert's file. For `int4`, training is quantization-aware: the
            student uses rounded values, with straight-through gradients. Other encodings change the values too little
            to matter.
        feature_weight: weight of the feature loss.
        logit_weight: weight of the logit loss.
        temperature: temperature T of the logit loss.
        feature_loss: `mse` or `cosine`.
        cache_teacher: compute the teacher's features of each input only once; for data without augmentation.
        mixup: in training, each input is blended with another input of its batch, with a fraction drawn uniformly from
            0 to this value; 0 disables mixup. Teacher and student see the same blend, so the student has to match the
            teacher's function beyond the training samples, which helps with few data (Beyer et al., arXiv 2106.05237).
            For images, not for tokens.

    Raises:
        ValueError: if the expert does not fit the weights, an option is out of range, or `mixup` is combined with
            `cache_teacher`, because no blend occurs twice.
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
        self.backbone = backbone.requires_grad_(False).eval()  # explicitly, because Lightning keeps a module's mode
        self.head = head.requires_grad_(False)
        self.__dict__["teacher"] = Teacher(teacher, cache_teacher)  # outside the module tree
        self.start = expert
        self.values = nn.Parameter(expert.flat_values().clone())
        self.encoding = encoding
        self.mixup = mixup
        self.distillation = Distillation(feature_weight, logit_weight, temperature, feature_loss)
        self.strict_loading = False  # checkpoints contain only the values

    @property
    def expert(self) -> Expert:
        """The expert with its current values, on the CPU."""
        return self.start.to("cpu").with_values(self.values.detach().float().cpu())

    def on_fit_start(self) -> None:
        """Move the expert's support and the teacher to the device."""
        self.start = self.start.to(self.device)
        self.teacher.to(self.device)

    def train(self, mode: bool = True) -> ExpertTrainer:
        """Set the training mode, but keep the backbone in eval mode: distillation uses no dropout or batch statistics.

        Args:
            mode: whether to train.

        Returns:
            The module itself.
        """
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, inputs: Inputs) -> Tensor:
        """Compute the features of merged + expert, differentiable with respect to the expert's values.

        Args:
            inputs: a batch.

        Returns:
            (B, F), or (B, L, V) for a language model.
        """
        expert = self.start.with_values(self._rounded_values())
        with substituted(self.backbone.model, expert.shapes, expert.added):
            return self.backbone(inputs)

    def _rounded_values(self) -> Tensor:
        """The values, rounded as in the file if the encoding is int4, with straight-through gradients."""
        if self.encoding != "int4":
            return self.values
        with torch.no_grad():
            parts = self.start.with_values(self.values).parts().values()
            codes, scales = encode_values(list(parts), self.encoding)
            rounded = torch.cat(decode_values(codes, scales, [part.numel() for part in parts]))
        return self.values + (rounded - self.values).detach()

    def _losses(self, inputs: Inputs, labels: Tensor) -> dict[str, Tensor]:
        if isinstance(self.backbone, LanguageBackbone):
            return self._token_losses(self.backbone, inputs, labels)
        return self.distillation(self(inputs), self.teacher(self.backbone, inputs), self.head)

    def _token_losses(self, backbone: LanguageBackbone, inputs: Inputs, labels: Tensor) -> dict[str, Tensor]:
        """The losses at the positions of the answers' tokens."""
        positions = backbone.answer_positions(labels)
        expert = self.start.with_values(self._rounded_values())
        with backbone.states_only(positions) as states, substituted(backbone.model, expert.shapes, expert.added):
            backbone(inputs)
        live, layer = backbone.model.state_dict(), backbone.output_layer
        changes = names_of_changes(live, expert.shapes)
        names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in live]
        own = [expert.added(changes[name], live[name]) if name in changes else live[name] for name in names]
        taught = [self.teacher.weight(backbone, name) for name in names]
        heads = (lambda part: backbone.logits_of(part, *own)), (lambda part: backbone.logits_of(part, *taught))
        return self.distillation.of_tokens(states[0], self.teacher(backbone, inputs, positions), heads)

    def training_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> Tensor:
        """The distillation loss of a batch; logs `train/loss`, `train/features`, `train/logits`, `train/agreement`.

        Args:
            batch: (inputs, labels); of the labels, only which tokens of a language model have one.
            batch_idx: ignored.

        Returns:
            Scalar loss.
        """
        losses = self._losses(mixup_batch(batch[0], self.mixup) if self.mixup else batch[0], batch[1])
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> None:
        """Log `val/loss`, `val/features`, `val/logits` and `val/agreement`.

        Args:
            batch: (inputs, labels); see `training_step`.
            batch_idx: ignored.
        """
        losses = self._losses(*batch)
        self.record_outputs(losses["loss"])
        self.log_dict(
            {f"val/{name}": value for name, value in losses.items()},
            prog_bar=True,
            on_epoch=True,
            sync_dist=True,
            batch_size=batch_size(batch[0]),
        )

    def on_validation_epoch_end(self) -> None:
        """Raise a NotFiniteError if an output was NaN or infinite."""
        self.check_outputs("validation")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep only the values and the teacher's cached features.

        Args:
            checkpoint: Lightning's checkpoint; changed in place.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {"values": checkpoint["state_dict"]["values"]}
        checkpoint["teacher_seen"] = self.teacher.cached()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore the teacher's cached features.

        Args:
            checkpoint: Lightning's checkpoint.
        """
        self.teacher.load_cached(checkpoint.get("teacher_seen", {}), self.device)


def check_mixup(mixup: float, cache_teacher: bool) -> None:
    """Check the option `mixup`.

    Args:
        mixup: the largest fraction of the other input.
        cache_teacher: whether the teacher's features are cached; blends are never repeated, so a cache would only grow.

    Raises:
        ValueError: if `mixup` is outside [0, 1], or is combined with `cache_teacher`.
    """
    if not 0.0 <= mixup <= 1.0:
        raise ValueError(f"mixup must be in [0, 1], got {mixup}")
    if mixup and cache_teacher:
        raise ValueError("mixup gives the teacher new inputs in every step: set cache_teacher to false, or mixup to 0")


def mixup_batch(inputs: Inputs, largest: float) -> Tensor:
    """Blend each input with the preceding input of the batch (mixup, arXiv 1710.09412, without labels).

    Args:
        inputs: (B, …) floating point.
        largest: the fraction of the other input is uniform in [0, largest].

    Returns:
        (B, …) of the same dtype.

    Raises:
        ValueError: for inputs that cannot be blended, such as tokens.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else f"a dict of {', '.join(named(inputs))}"
        raise ValueError(f"mixup blends images, one float tensor per batch; these inputs are {found}: set mixup to 0")
    fraction = largest * torch.rand(len(inputs), *(1,) * (inputs.dim() - 1), device=inputs.device, dtype=inputs.dtype)
    return torch.lerp(inputs, inputs.roll(1, dims=0), fraction)
