"""A NaN or infinite loss ends a fit at once, and no checkpoint keeps NaN or infinite weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from freemerge.errors import NotFiniteError
from freemerge.inputs import tensors_of

_EVERY = 16  # steps between two checks, where a check waits for an accelerator or for other ranks


class FiniteModule(L.LightningModule):
    """A LightningModule whose fit ends with a `NotFiniteError` at the first loss that is NaN or infinite.

    On a CPU every step is looked at; on accelerators and several ranks every 16th, the end of each epoch, and whatever
    is about to be saved.
    """

    _first: Tensor | None = None  # the first step whose loss was NaN or infinite; −1 if there was none
    _outputs: Tensor | None = None  # whether an output in validation or test was NaN or infinite
    _steps = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        loss, step = loss.detach(), self.trainer.global_step
        is_bad = ~loss.isfinite().all()
        first = torch.where(is_bad, step, -1)
        self._first = first if self._first is None else torch.where(self._first < 0, first, self._first)
        self._steps += 1
        at_once = loss.device.type == "cpu" and self.trainer.world_size == 1
        if at_once or self._steps % _EVERY == 0:
            self._check_losses(batch if at_once else None)

    def on_train_epoch_end(self) -> None:
        self._check_losses()

    def on_train_end(self) -> None:
        self._check_losses()
        self._check_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self.trainer.training:
            self._check_losses()
            self._check_weights()

    def see_outputs(self, outputs: Tensor) -> None:
        """Remember whether these outputs hold NaN or +∞; −∞ is how a model rules an answer out."""
        outputs = outputs.detach()
        is_bad = (outputs.isnan() | outputs.isposinf()).any()
        self._outputs = is_bad if self._outputs is None else self._outputs | is_bad

    def check_outputs(self, split: str) -> None:
        """Raise a NotFiniteError if an output since the last call was NaN or infinite."""
        is_bad, self._outputs = self._outputs, None
        if not self._any_rank(torch.tensor(False) if is_bad is None else is_bad):
            return
        if self.trainer.sanity_checking:
            raise NotFiniteError(
                f"{self._who()}: an output on {split} data is NaN or infinite before any training: look at the base's "
                "weights, the data's normalisation and trainer.precision"
            )
        raise NotFiniteError(
            f"{self._who()}: an output on {split} data is NaN or infinite in epoch {self.trainer.current_epoch}"
            f"{self._learning_rate()}{_ADVICE}"
        )

    def _check_losses(self, batch: Any = None) -> None:
        first, self._first = self._first, None
        if first is None or not self._any_rank(first >= 0):
            return
        step = f"at step {int(first)}" if int(first) >= 0 else "on another rank"
        if batch is not None and _holds_nan(batch):
            raise NotFiniteError(
                f"{self._who()}: the training batch of step {int(first)} (epoch {self.trainer.current_epoch}) holds "
                "NaN or infinite values: mend the data or their normalisation"
            )
        raise NotFiniteError(
            f"{self._who()}: the loss is NaN or infinite in epoch {self.trainer.current_epoch}, {step}"
            f"{self._learning_rate()}{_ADVICE}"
        )

    def _check_weights(self) -> None:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if trained and self._any_rank(~torch.stack([each.detach().isfinite().all() for each in trained]).all()):
            raise NotFiniteError(
                f"{self._who()}: a weight is NaN or infinite after step {self.trainer.global_step}"
                f"{self._learning_rate()}{_ADVICE}"
            )

    def _any_rank(self, is_bad: Tensor) -> bool:
        """Whether it is so on any rank: all of them then end alike."""
        if self.trainer.world_size == 1:
            return bool(is_bad)
        return self.trainer.strategy.reduce_boolean_decision(bool(is_bad), all=False)

    def _learning_rate(self) -> str:
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return f" (learning rate {max(group['lr'] for group in groups):.3g})" if groups else ""

    def _who(self) -> str:
        """The class and the task."""
        name = getattr(getattr(self.trainer, "datamodule", None), "name", None)
        return type(self).__name__ + (f", task {name!r}" if isinstance(name, str) else "")


_ADVICE = (
    "; try a lower learning rate, a longer warmup, trainer.gradient_clip_val 1.0, or, with precision 16, bf16-mixed or "
    "32"
)


def _holds_nan(batch: Any) -> bool:
    parts = tensors_of(batch) if isinstance(batch, (Tensor, dict, tuple, list)) else []
    return any(bool((~part.isfinite()).any()) for part in parts if part.is_floating_point())
