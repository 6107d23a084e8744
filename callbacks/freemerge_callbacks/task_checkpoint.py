"""TaskCheckpoint: save a fit's backbone, head and record for a later merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from freemerge.checkpoints import TaskRecord, expand, find_prefix, write_task_file
from freemerge.merging import parse_dtype, task_vector
from freemerge_callbacks._best import best_state, completed
from freemerge_callbacks._fit_end import FitEndCallback
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._weights import get_part, weights_of, whole_state


class TaskCheckpoint(FitEndCallback):
    """Writes a fit's backbone (or only its task vector) and head, with a record of their origin, when the fit ends.

    The file's metadata hold the task, the hash of the base, the seed and the last metrics. MergeAtFitEnd and
    MergePreview accept such files as `others` and refuse those with another base; MultiTaskEvaluation accepts them as
    `heads`.

    Args:
        output: the .safetensors file to write.
        task: the task's name.
        save: "weights", the fine-tuned backbone, which any tool can read; or "task_vector", which loses less precision
            in a narrow `dtype`, and which freemerge adds to the base when it reads the file.
        base: path of the pretrained model, for its hash and the task vector. None: the module's initial weights.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        head: dotted path of the head to save with the backbone. None for no head.
        weights: "last", the weights at the end of the fit, or "best", those of the best checkpoint of the Trainer's
            ModelCheckpoint.
        dtype: dtype of the backbone's floating-point tensors in the file, for example "bfloat16". None: the module's.
        overwrite: whether to replace an existing `output`.

    Attributes:
        saved_path: the file written; None before.
    """

    def __init__(
        self,
        output: str,
        task: str,
        save: Literal["weights", "task_vector"] = "weights",
        base: str | None = None,
        backbone: str = "backbone",
        head: str | None = "head",
        weights: Literal["last", "best"] = "last",
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(output, base, expand(output), backbone, weights, dtype, overwrite)
        self.task = task
        self.save = save
        self.head = head
        self.saved_path: Path | None = None

    @property
    def needs_base(self) -> bool:
        """Whether the base's values are needed when the fit ends: only for a task vector."""
        return self.save == "task_vector"

    def check_arguments(self, trainer: L.Trainer) -> None:
        """Check `save` and `output`.

        Args:
            trainer: the Trainer.

        Raises:
            ValueError: if an argument is invalid or the output exists.
        """
        self.saved_path = None
        if self.save not in ("weights", "task_vector"):
            raise ValueError(f"TaskCheckpoint: `save` must be 'weights' or 'task_vector', got {self.save!r}")
        if self.output.suffix != ".safetensors":
            raise ValueError(f"TaskCheckpoint: {self.output}: the output must be a .safetensors file")
        self.refuse_existing()

    def check_module(self, trainer: L.Trainer, module: L.LightningModule, weights: Mapping[str, Tensor]) -> None:
        """Check that the module has the head.

        Args:
            trainer: the Trainer.
            module: the module.
            weights: not used.

        Raises:
            ValueError: if there is no such submodule.
        """
        if self.head is not None:
            get_part(module, self.head, "TaskCheckpoint", "head")

    def finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the task file.

        Args:
            trainer: the Trainer; every rank calls this.
            module: the module.
        """
        state, best = whole_state(trainer, module), self.best_path(trainer)
        record = self.task_record(trainer, self.task, self.save, weights_of(module, self.backbone, state))
        self.saved_path = on_rank_zero(trainer, lambda: self._write(module, state, record, best))
        rank_zero_info(f"TaskCheckpoint: wrote the {self.save.replace('_', ' ')} of {self.task} to {self.saved_path}")

    def _write(self, module: L.LightningModule, state: Mapping[str, Any], record: TaskRecord, best: str | None) -> Path:
        if best is not None:
            found = best_state(best, self.backbone, "TaskCheckpoint")
            state = found if not state else completed(found, module, state, self.backbone, "TaskCheckpoint")
        backbone = weights_of(module, self.backbone, state)
        if self.save == "task_vector":
            base = self.base.open()
            prefix = find_prefix(backbone, base.names)
            start = {prefix + name: base.tensor(name) for name in base.names if prefix + name in backbone}
            backbone = task_vector(start, backbone)
        head = {} if self.head is None else weights_of(module, self.head, state)
        write_task_file(self.output, record, backbone, head, parse_dtype(self.dtype))
        self.base.discard()
        return self.output
