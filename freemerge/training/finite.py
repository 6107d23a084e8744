"""A fit ends at the first NaN or infinite loss, and no checkpoint contains NaN or infinite weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from freemerge.errors import NotFiniteError
from freemerge.inputs import tensors_of

_CHECK_INTERVAL = 16  # steps between checks, if a check has to wait for an accelerator or for other ranks


class FiniteModule(L.LightningModule):
    """A LightningModule whose fit ends with a `NotFiniteError` at the first loss that is NaN or infinite.

    On a CPU, every step is checked. On accelerators and with several ranks, checks happen every 16 steps, at the end of
    each epoch, and before a checkpoint is saved. Lightning's `EarlyStopping(check_finite=True)` is not enough: it ends
    the fit without an error, and only looks at one monitored metric.
    """

    _first: Tensor | None = None  # the first step with a NaN or infinite loss since the last check; −1 if none
    _outputs: Tensor | None = None  # whether an output in validation or test was NaN or infinite
    _steps = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Remember whether the loss is finite, and check it if a check is due.

        Args:
            outputs: the result of `training_step`.
            batch: the batch; it is examined if the loss is not finite.
            batch_idx: ignored.
        """
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        loss, step = loss.detach(), self.trainer.global_step
        is_bad = ~loss.isfinite().all()
        first = torch.where(is_bad, step, -1)
        self._first = first if self._first is None else torch.where(self._first < 0, first, self._first)
        self._steps += 1
        at_once = loss.device.type == "cpu" and self.trainer.world_size == 1
        if at_once or self._steps % _CHECK_INTERVAL == 0:
            self._check_losses(batch if at_once else None)

    def on_train_epoch_end(self) -> None:
        """Check the losses of the epoch."""
        self._check_losses()

    def on_train_end(self) -> None:
        """Check the last losses and the trained weights."""
        self._check_losses()
        self._check_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check losses and weights before they are saved.

        Args:
            checkpoint: Lightning's checkpoint; not used.
        """
        if self._trainer is not None and self.trainer.training:
            self._check_losses()
            self._check_weights()

    def record_outputs(self, outputs: Tensor) -> None:
        """Remember whether outputs contain NaN or +∞. −∞ is allowed: models use it to exclude a class or token.

        Args:
            outputs: a model's outputs or a loss, of any shape.
        """
        outputs = outputs.detach()
        is_bad = (outputs.isnan() | outputs.isposinf()).any()
        self._outputs = is_bad if self._outputs is None else self._outputs | is_bad

    def check_outputs(self, split: str) -> None:
        """Check the outputs recorded since the last call.

        Args:
            split: the name of the data in the error message.

        Raises:
            NotFiniteError: if an output was NaN or infinite, on any rank.
        """
        is_bad, self._outputs = self._outputs, None
        if not self._on_any_rank(torch.tensor(False) if is_bad is None else is_bad):
            return
        if self.trainer.sanity_checking:
            raise NotFiniteError(
                f"{self._name()}: an output on {split} data is NaN or infinite before any training: check the base's "
                "weights, the data's normalisation and trainer.precision"
            )
        raise NotFiniteError(
            f"{self._name()}: an output on {split} data is NaN or infinite in epoch {self.trainer.current_epoch}"
            f"{self._learning_rate()}{_ADVICE}"
        )

    def _check_losses(self, batch: Any = None) -> None:
        first, self._first = self._first, None
        if first is None or not self._on_any_rank(first >= 0):
            return
        step = f"at step {int(first)}" if int(first) >= 0 else "on another rank"
        if batch is not None and _has_nan(batch):
            raise NotFiniteError(
                f"{self._name()}: the training batch of step {int(first)} (epoch {self.trainer.current_epoch}) "
                "contains NaN or infinite values: correct the data or their normalisation"
            )
        raise NotFiniteError(
            f"{self._name()}: the loss is NaN or infinite in epoch {self.trainer.current_epoch}, {step}"
            f"{self._learning_rate()}{_ADVICE}"
        )

    def _check_weights(self) -> None:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if trained and self._on_any_rank(~torch.stack([each.detach().isfinite().all() for each in trained]).all()):
            raise NotFiniteError(
                f"{self._name()}: a weight is NaN or infinite after step {self.trainer.global_step}"
                f"{self._learning_rate()}{_ADVICE}"
            )

    def _on_any_rank(self, is_bad: Tensor) -> bool:
        """Whether a condition holds on any rank, so that all ranks raise the error together."""
        if self.trainer.world_size == 1:
            return bool(is_bad)
        return self.trainer.strategy.reduce_boolean_decision(bool(is_bad), all=False)

    def _learning_rate(self) -> str:
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return f" (learning rate {max(group['lr'] for group in groups):.3g})" if groups else ""

    def _name(self) -> str:
        """The class name and, if known, the task, for messages."""
        name = getattr(getattr(self.trainer, "datamodule", None), "name", None)
        return type(self).__name__ + (f", task {name!r}" if isinstance(name, str) else "")


_ADVICE = (
    "; try a lower learning rate, a longer warmup, trainer.gradient_clip_val 1.0, or, with precision 16, bf16-mixed or "
    "32"
)


def _has_nan(batch: Any) -> bool:
    parts = tensors_of(batch) if isinstance(batch, (Tensor, dict, tuple, list)) else []
    return any(bool((~part.isfinite()).any()) for part in parts if part.is_floating_point())
