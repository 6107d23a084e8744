"""FitEndCallback: the common base class of MergeAtFitEnd and TaskCheckpoint.

Both remember the base of a fit, also across an interruption, and read the fit's weights at its end.
Errors are raised before training begins: `setup` checks the arguments, `on_fit_start` checks the module and
`on_train_start` checks the restored state. Under `fast_dev_run` the callbacks do nothing.
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
from freemerge_callbacks._best import best_checkpoint, check_weights
from freemerge_callbacks._weights import is_dev_run, part_weights, refuse_placeholders


class FitEndCallback(Callback, ABC):
    """A callback that remembers a fit's base and writes a file made from the weights when the fit ends.

    Args:
        output: the file or folder to write.
        base: the pretrained model's path; None for the module's initial weights.
        keep: the initial weights are saved beside this file if `base` is None.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        weights: "last", the weights at the end of the fit, or "best", from the Trainer's ModelCheckpoint.
        dtype: dtype of the written tensors; None keeps their own.
        overwrite: whether to replace an existing output.
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
        """The callback's name, for error messages."""
        return type(self).__name__

    @property
    def state_key(self) -> str:
        """A key that contains the output, so that a Trainer can have several callbacks of this class."""
        return self._generate_state_key(output=self._named)

    def state_dict(self) -> dict[str, Any]:
        """The state that Lightning saves in a checkpoint.

        Returns:
            The hash of the fit's base.
        """
        return {"base_hash": self.base.hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the hash of the fit's base.

        Args:
            state_dict: the result of `state_dict`.
        """
        self.base.restore(state_dict["base_hash"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the arguments before the fit.

        Args:
            trainer: the Trainer.
            pl_module: not used; it may be incomplete.
            stage: checks are made for "fit" only.

        Raises:
            ValueError: if an argument is invalid.
        """
        if stage != "fit" or is_dev_run(trainer):
            return
        self._began = False
        parse_dtype(self.dtype)
        if self.base.given is not None:
            open_checkpoint(self.base.given)
        refuse_placeholders(trainer.strategy, self.who)
        check_weights(trainer, self.weights, self.who)
        self.check_arguments(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the module, and save or hash the base.

        Args:
            trainer: the Trainer.
            pl_module: the module.

        Raises:
            ValueError: if the module or the base does not fit.
        """
        if is_dev_run(trainer):
            return
        weights = part_weights(trainer, pl_module, self.backbone, self.who)
        self.base.find(trainer, self.backbone, weights)
        self.check_module(trainer, pl_module, weights)
        self.base.begin(trainer, weights, keep=self.needs_base, digest=self.needs_hash)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the base, after the state of a resumed fit has been restored.

        Args:
            trainer: the Trainer.
            pl_module: not used.

        Raises:
            ValueError: if the base has changed, or differs from the other models'.
        """
        if not is_dev_run(trainer):
            self._check_base(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the output.

        Args:
            trainer: the Trainer.
            pl_module: the module.
        """
        if is_dev_run(trainer):
            return
        if not self._began:  # the checkpoint was at the end of training, so `on_train_start` was never called
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
        """The best checkpoint, if it is to be used.

        Args:
            trainer: the Trainer.

        Returns:
            Its path if `weights` is "best"; None if the module's own weights are used.
        """
        return best_checkpoint(trainer, self.who).best_model_path if self.weights == "best" else None

    def task_record(
        self, trainer: L.Trainer, task: str, holds: Literal["weights", "task_vector"], weights: Mapping[str, Tensor]
    ) -> TaskRecord:
        """Make the record of a file with this fit's weights.

        Args:
            trainer: the Trainer. The record's metrics belong to the saved weights: all metrics of the last epoch, or
                the monitored score of the best checkpoint.
            task: the task's name.
            holds: whether the file contains weights or a task vector.
            weights: the backbone's tensors, for their dtypes.

        Returns:
            The record.
        """
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.weights == "best":
            checkpoint = best_checkpoint(trainer, self.who)
            score = checkpoint.best_model_score
            metrics = {} if score is None else {str(checkpoint.monitor): float(score)}
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by `seed_everything`
        assert self.base.hash is not None  # set when the fit began
        return TaskRecord(task, holds, self.base.hash, None if seed is None else int(seed), metrics, dtypes_of(weights))

    def refuse_existing(self) -> None:
        """Check that the output may be written.

        Raises:
            ValueError: it exists and `overwrite` is False.
        """
        if self.output.exists() and not self.overwrite:
            raise ValueError(f"{self.who}: {self.output} exists already; choose another path, or set overwrite=True")

    @abstractmethod
    def check_arguments(self, trainer: L.Trainer) -> None:
        """Check the arguments against the Trainer and the files; called in `setup`.

        Args:
            trainer: the Trainer.

        Raises:
            ValueError: if an argument is invalid.
        """

    def check_module(self, trainer: L.Trainer, module: L.LightningModule, weights: Mapping[str, Tensor]) -> None:
        """Check the module in `on_fit_start`, when it is complete; by default nothing beyond the backbone's existence.

        Args:
            trainer: the Trainer; every rank calls this.
            module: the module.
            weights: the backbone's tensors; complete on rank 0.
        """

    def check_base(self, trainer: L.Trainer) -> None:
        """Compare `base.hash` with other records; by default does nothing. In a resumed fit, the hash is known by now.

        Args:
            trainer: the Trainer; every rank calls this.

        Raises:
            ValueError: if another model has a different base.
        """

    @abstractmethod
    def finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the output; called in `on_fit_end`.

        Args:
            trainer: the Trainer; every rank calls this.
            module: the module.
        """
