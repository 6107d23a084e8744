"""FitEndCallback: what MergeAtFitEnd and TaskCheckpoint have in common.

Both know the base of a fit from its first step on, through an interruption too, and take the fit's weights at its end.
What can be wrong is found before training begins: `setup` checks what was asked for, `on_fit_start` what the module is,
`on_train_start` what was resumed. A `fast_dev_run` is left alone.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from freemerge.checkpoints import TaskRecord, expand, open_checkpoint
from freemerge.merging import parse_dtype
from freemerge_callbacks._base import FitBase, dtypes_of
from freemerge_callbacks._best import best_checkpoint
from freemerge_callbacks._weights import is_dev_run, part_weights, refuse_placeholders


class FitEndCallback(Callback, ABC):
    """A callback that knows a fit's base and writes something of its weights when the fit ends.

    Args:
        output: what it writes.
        base: the pretrained model's path; None for the weights that the module starts with.
        keep: the file beside which the start is kept where no base is given.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        weights: "last", as they are when the fit ends, or "best", from the Trainer's ModelCheckpoint.
        dtype: of what is written; None for that of the origin.
        overwrite: whether an existing output is replaced.
    """

    def __init__(
        self,
        output: str,
        base: str | None,
        keep: Path,
        backbone: str,
        weights: Literal["last", "best"],
        dtype: str | None,
        overwrite: bool,
    ) -> None:
        self.output = expand(output).absolute()  # the working folder may change until the fit ends
        self.base = FitBase(base, keep.absolute(), self.who)
        self._named = str(expand(output))
        self.backbone = backbone
        self.weights = weights
        self.dtype = dtype
        self.overwrite = overwrite
        self._began = False

    @property
    def who(self) -> str:
        """What messages begin with."""
        return type(self).__name__

    @property
    def state_key(self) -> str:
        return self._generate_state_key(output=self._named)

    def state_dict(self) -> dict[str, Any]:
        return {"base_hash": self.base.hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.restore(state_dict["base_hash"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or is_dev_run(trainer):
            return
        self._began = False
        if self.weights not in ("last", "best"):
            raise ValueError(f"{self.who}: `weights` must be 'last' or 'best', got {self.weights!r}")
        parse_dtype(self.dtype)
        if self.base.given is not None:
            open_checkpoint(self.base.given)
        refuse_placeholders(trainer.strategy, self.who)
        if self.weights == "best":
            best_checkpoint(trainer, self.who)
        self.check_arguments(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_dev_run(trainer):
            return
        weights = part_weights(trainer, pl_module, self.backbone, self.who)
        self.base.find(trainer, self.backbone, weights)
        self.check_module(trainer, pl_module, weights)
        self.base.begin(trainer, weights, keep=self.needs_base, digest=self.needs_hash)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_dev_run(trainer):
            self._check_base(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_dev_run(trainer):
            return
        if not self._began:  # resumed from a checkpoint after which there was nothing left to train
            self._check_base(trainer)
        self.finish(trainer, pl_module)

    def _check_base(self, trainer: L.Trainer) -> None:
        self._began = True
        self.base.resume(trainer, keep=self.needs_base)  # by now every strategy has restored the callbacks' states
        self.check_base(trainer)

    @property
    def needs_base(self) -> bool:
        """Whether the base's values are needed when the fit ends."""
        return True

    @property
    def needs_hash(self) -> bool:
        """Whether the hash of a given base is needed."""
        return True

    def best_path(self, trainer: L.Trainer) -> str | None:
        """The checkpoint that holds the wanted weights; None where these are the module's own."""
        return best_checkpoint(trainer, self.who).best_model_path if self.weights == "best" else None

    def task_record(
        self, trainer: L.Trainer, task: str, holds: Literal["weights", "task_vector"], weights: Mapping[str, Tensor]
    ) -> TaskRecord:
        """What a file of this fit's weights says of itself.

        Its metrics are those of the weights: all of the last epoch's, or the score that chose the best checkpoint.
        """
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.weights == "best":
            checkpoint = best_checkpoint(trainer, self.who)
            score = checkpoint.best_model_score
            metrics = {} if score is None else {str(checkpoint.monitor): float(score)}
        seed = os.environ.get("PL_GLOBAL_SEED")  # where `seed_everything` keeps it
        assert self.base.hash is not None  # known since the fit began
        return TaskRecord(task, holds, self.base.hash, None if seed is None else int(seed), metrics, dtypes_of(weights))

    def refuse_existing(self) -> None:
        """Require that the output may be written.

        Raises:
            ValueError: it exists, and is not to be replaced.
        """
        if self.output.exists() and not self.overwrite:
            raise ValueError(f"{self.who}: {self.output} exists already; choose another, or set overwrite=True")

    @abstractmethod
    def check_arguments(self, trainer: L.Trainer) -> None:
        """When a fit is set up: check what the Trainer and the files can tell."""

    def check_module(self, trainer: L.Trainer, module: L.LightningModule, weights: Mapping[str, Tensor]) -> None:
        """As soon as the module is complete: check it; by default nothing more than that the backbone is there.

        Args:
            trainer: the Trainer; every rank gets here.
            module: the module.
            weights: the backbone's tensors; whole on rank 0.
        """

    def check_base(self, trainer: L.Trainer) -> None:
        """Once `base.hash` is known for a resumed fit, too: compare it; by default with nothing."""

    @abstractmethod
    def finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """When the fit ends: write."""
