"""TaskCheckpoint: keep of a fit what a later merge needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from freemerge.checkpoints import open_checkpoint
from freemerge.merging.engine import parse_dtype
from freemerge_callbacks._base import FitBase, open_base
from freemerge_callbacks._best import best_checkpoint, best_state
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._task_files import TaskRecord, write_task_file
from freemerge_callbacks._weights import get_part, part_weights, refuse_placeholders, relative, whole_state


class TaskCheckpoint(Callback):
    """When a fit ends, writes its backbone (or only the task vector) and its head, and a record of their origin.

    The file's metadata hold the task, the hash of the base, the seed and the last metrics. MergeAtFitEnd and
    MergePreview take such files as `others` and refuse one of another base; MultiTaskEvaluation takes them as `heads`.

    Args:
        output: the .safetensors file to write.
        task: the task's name.
        save: "weights" of the fine-tuned backbone, which everything reads, or only its "task_vector", which keeps its
            precision in a narrow `dtype` and which the callbacks of this package add to the base again.
        base: the pretrained model, for its hash and for the task vector. None: the weights that the module starts with.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        head: dotted path of the head to keep beside the backbone. None for no head.
        weights: "last", as they are when the fit ends, or "best", from the best checkpoint of the Trainer's
            ModelCheckpoint.
        dtype: of the backbone's floating-point tensors in the file, for example "bfloat16". None for the module's.
        overwrite: replace an existing `output`.

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
        self.output = Path(output)
        self.task = task
        self.save = save
        self.base = FitBase(base, self.output, "TaskCheckpoint")
        self.backbone = backbone
        self.head = head
        self.weights = weights
        self.dtype = dtype
        self.overwrite = overwrite
        self.saved_path: Path | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(output=str(self.output))

    def state_dict(self) -> dict[str, Any]:
        return {"base_hash": self.base.hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.restore(state_dict["base_hash"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        self.saved_path = None
        self._check_arguments()
        refuse_placeholders(trainer.strategy, "TaskCheckpoint")
        if self.weights == "best":
            best_checkpoint(trainer, "TaskCheckpoint")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        if self.head is not None:
            get_part(pl_module, self.head, "TaskCheckpoint", "head")
        weights = part_weights(trainer, pl_module, self.backbone, "TaskCheckpoint")
        self.base.begin(trainer, weights, keep=self.save == "task_vector")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.fast_dev_run:
            self.base.resume(trainer, keep=self.save == "task_vector")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        state = whole_state(trainer, pl_module)
        metrics = final_metrics(trainer, self.weights)
        best = best_checkpoint(trainer, "TaskCheckpoint").best_model_path if self.weights == "best" else None
        self.saved_path = on_rank_zero(trainer, lambda: self._write(state, metrics, best))
        rank_zero_info(f"TaskCheckpoint: wrote the {self.save.replace('_', ' ')} of {self.task} to {self.saved_path}")

    def _check_arguments(self) -> None:
        if self.save not in ("weights", "task_vector"):
            raise ValueError(f"TaskCheckpoint: `save` must be 'weights' or 'task_vector', got {self.save!r}")
        if self.weights not in ("last", "best"):
            raise ValueError(f"TaskCheckpoint: `weights` must be 'last' or 'best', got {self.weights!r}")
        if self.output.suffix != ".safetensors":
            raise ValueError(f"TaskCheckpoint: {self.output}: the output must be a .safetensors file")
        if self.output.exists() and not self.overwrite:
            raise ValueError(f"TaskCheckpoint: {self.output} exists already; choose another, or set overwrite=True")
        parse_dtype(self.dtype)
        if self.base.given is not None:
            open_checkpoint(self.base.given)

    def _write(self, state: Mapping[str, Any], metrics: dict[str, float], best: str | None) -> Path:
        if best is not None:
            state = best_state(best, self.backbone, "TaskCheckpoint")
        seed = os.environ.get("PL_GLOBAL_SEED")  # where `seed_everything` keeps it
        record = TaskRecord(self.task, self.save, self.base.hash, None if seed is None else int(seed), metrics)
        base = open_base(self.base.path) if self.save == "task_vector" else None
        head = {} if self.head is None else relative(state, self.head)
        write_task_file(self.output, record, relative(state, self.backbone), head, base, parse_dtype(self.dtype))
        self.base.discard()
        return self.output


def final_metrics(trainer: L.Trainer, weights: str) -> dict[str, float]:
    """The metrics of the kept weights: all of the last epoch's, or the score that chose the best checkpoint."""
    if weights == "best":
        checkpoint = best_checkpoint(trainer, "TaskCheckpoint")
        score = checkpoint.best_model_score
        return {} if score is None else {checkpoint.monitor: float(score)}
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
