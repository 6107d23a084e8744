"""The distillation loss of experts: merged + expert should behave like the fine-tuned teacher. It needs no labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_LOGITS = 1 << 25  # at most so many at a time: 128 MiB in float32


@dataclass(frozen=True)
class Distillation:
    """Loss w_f · ‖f_s − f_t‖² / ‖f_t − mean f_t‖² + w_l · T² · KL(softmax(l_t / T) ‖ softmax(l_s / T)).

    f are the features and l the logits of the student s (merged + expert) and the teacher t; both use the task's head.
    The second term is knowledge distillation (Hinton et al., arXiv 1503.02531). For a regression, whose l is one number
    per sample, it is w_l · ‖l_s − l_t‖² / ‖l_t − mean l_t‖². For a language model, each token of an answer is a sample,
    its features are the state that the output layer reads, and that layer is the head; see `of_tokens`.

    Args:
        feature_weight: w_f.
        logit_weight: w_l.
        temperature: T.
        feature_loss: `mse` as above, or `cosine`: 1 − cos(f_s − mean f_t, f_t − mean f_t), which ignores lengths.

    Raises:
        ValueError: if `feature_loss` is unknown.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("loss", "features", "logits", "agreement")
    """The names of the values that a call returns."""

    feature_weight: float = 1.0
    logit_weight: float = 1.0
    temperature: float = 2.0
    feature_loss: Literal["mse", "cosine"] = "mse"

    def __post_init__(self) -> None:
        if self.feature_loss not in ("mse", "cosine"):
            raise ValueError(f"feature_loss must be 'mse' or 'cosine', got {self.feature_loss!r}")

    def __call__(self, student: Tensor, teacher: Tensor, head: nn.Module) -> dict[str, Tensor]:
        """Compute the loss and its terms.

        Args:
            student: features (B, F), or (B, L, F) for the tokens of a language model.
            teacher: features of the same shape.
            head: maps features to logits (B, C), or to (B, 1) for a regression.

        Returns:
            Scalars: `loss`; its unweighted terms `features` and `logits`; and `agreement`, the fraction of samples that
            student and teacher assign to the same class, or for a regression the fraction of the teacher's variance
            that the student explains, at least 0.
        """
        student, teacher = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
        return self._total(self._feature_loss(student, teacher), *self._logit_loss(head(student), head(teacher)))

    def of_tokens(
        self, student: Tensor, teacher: Tensor, heads: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    ) -> dict[str, Tensor]:
        """Compute the loss and its terms for tokens of a language model, without all their logits in memory.

        The logits of some tokens at a time are computed, and again in the backward pass.

        Args:
            student: states (N, D) of the tokens.
            teacher: states of the same shape.
            heads: the output layers of student and teacher, states (n, D) → logits (n, V).

        Returns:
            Scalars, as above; zeros if there are no tokens.
        """
        if not len(student):
            zero = student.float().sum()
            return self._total(zero, zero, zero.detach())

        def part(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            loss, agreement = self._logit_loss(heads[0](one).float(), heads[1](other).float())
            return loss * len(one), agreement * len(one)

        with torch.no_grad():
            rows = max(1, _LOGITS // heads[1](teacher[:1]).shape[1])
        parts = [
            checkpoint(part, one, other, use_reentrant=False, preserve_rng_state=False)
            for one, other in zip(student.split(rows), teacher.split(rows), strict=True)
        ]
        loss, agreement = (torch.stack(values).sum() / len(student) for values in zip(*parts, strict=True))
        return self._total(self._feature_loss(student.float(), teacher.float()), loss, agreement)

    def _total(self, features: Tensor, logits: Tensor, agreement: Tensor) -> dict[str, Tensor]:
        """The weighted sum of the terms, and the terms."""
        loss = self.feature_weight * features + self.logit_weight * logits
        return dict(zip(self.PARTS, (loss, features.detach(), logits.detach(), agreement.detach()), strict=True))

    def _feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features (B, F)."""
        centre = teacher.mean(dim=0)
        if self.feature_loss == "mse":
            spread = (teacher - centre).square().mean() + 1e-8
            return (student - teacher).square().mean() / spread
        return (1 - F.cosine_similarity(student - centre, teacher - centre, dim=1)).mean()

    def _logit_loss(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the logits and the agreement, given logits (B, C) or numbers (B, 1)."""
        if student.shape[1] == 1:
            spread = (teacher - teacher.mean()).square().mean() + 1e-8
            unexplained = (student - teacher).square().mean() / spread
            return unexplained, (1 - unexplained.detach()).clamp(min=0.0)
        log_student = F.log_softmax(student / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        loss = self.temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
        return loss, (log_student.argmax(dim=1) == log_teacher.argmax(dim=1)).float().mean()
