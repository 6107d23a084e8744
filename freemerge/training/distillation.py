"""What an expert is for, as a loss: merged + expert should behave like the fine-tuned teacher. No labels are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from freemerge.models import Backbone


@dataclass(frozen=True)
class Distillation:
    """w_f · ‖f_s − f_t‖² / ‖f_t − mean f_t‖² + w_l · T² · KL(softmax(l_t / T) ‖ softmax(l_s / T)).

    f are features, l logits, of the student (s: merged + expert) and the teacher (t), both through the task's own head.

    Args:
        feature_weight: w_f.
        logit_weight: w_l.
        temperature: T of the softened logits.
    """

    feature_weight: float = 1.0
    logit_weight: float = 1.0
    temperature: float = 2.0

    def __call__(self, student: Tensor, teacher: Tensor, head: nn.Module) -> dict[str, Tensor]:
        """The loss and its parts.

        Args:
            student: features (B, F).
            teacher: features (B, F).
            head: features → logits (B, C).

        Returns:
            Scalars: `loss`, its parts `features` and `logits` unweighted, and `agreement`, the share of samples that
            student and teacher put into the same class.
        """
        spread = (teacher - teacher.mean(dim=0)).square().mean() + 1e-8
        feature_loss = (student - teacher).square().mean() / spread
        log_student = F.log_softmax(head(student) / self.temperature, dim=1)
        log_teacher = F.log_softmax(head(teacher) / self.temperature, dim=1)
        logit_loss = self.temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
        return {
            "loss": self.feature_weight * feature_loss + self.logit_weight * logit_loss,
            "features": feature_loss.detach(),
            "logits": logit_loss.detach(),
            "agreement": (log_student.argmax(dim=1) == log_teacher.argmax(dim=1)).float().mean(),
        }


def gradient_rms(
    backbone: Backbone,
    head: nn.Module,
    teacher: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor, nn.Module], Mapping[str, Tensor]],
    count: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """How strongly the distillation loss depends on each weight: √E[g²] over batches, at the backbone's own weights.

    It is the square root of the empirical Fisher information's diagonal, by which sparse fine-tuning chooses its
    parameters (FISH Mask, arXiv 2111.09839).

    Args:
        backbone: the merged backbone; moved to `device`, otherwise left as it is.
        head: the task's head.
        teacher: weights of the task's fine-tuned backbone, named as in `backbone.weights()`.
        batches: (inputs, labels); labels are not looked at.
        loss: the distillation loss.
        count: how many batches to use; the data are gone through again if need be.
        device: where to compute.

    Returns:
        Tensor name → float32 tensor of the weight's shape, on the CPU; zeros for buffers and unused weights.
    """
    backbone, head = backbone.to(device).eval(), head.to(device)
    target = {f"model.{name}": tensor.to(device) for name, tensor in teacher.items()}
    live = {name: parameter.detach().requires_grad_() for name, parameter in backbone.model.named_parameters()}
    squares = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in live.items()}
    seen = 0
    while seen < count:
        before = seen
        for inputs, _ in islice(batches, count - seen):
            with torch.no_grad():
                features = functional_call(backbone, target, (inputs.to(device),))
            student = functional_call(
                backbone, {f"model.{name}": tensor for name, tensor in live.items()}, (inputs.to(device),)
            )
            value = loss(student, features, head)["loss"]
            gradients = torch.autograd.grad(value, list(live.values()), allow_unused=True)
            for square, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    square += gradient.float().square()
            seen += 1
        if seen == before:
            raise ValueError("gradient_rms: there are no batches")
    return {
        name: (squares[name] / seen).sqrt().cpu() if name in squares else torch.zeros(tensor.shape)
        for name, tensor in backbone.weights().items()
    }
