"""MergeAtFitEnd: merge the backbone that a fit has just trained with those that other fits trained before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from freemerge.checkpoints import open_checkpoint
from freemerge.merging import MergeMethod, merge
from freemerge.merging.engine import parse_dtype
from freemerge.merging.patterns import compile_patterns
from freemerge.merging.plan import make_plan
from freemerge_callbacks._base import FitBase, open_base
from freemerge_callbacks._best import best_checkpoint, best_state
from freemerge_callbacks._others import base_hashes, check_base_hashes, find_others
from freemerge_callbacks._ranks import log_metrics, on_rank_zero
from freemerge_callbacks._task_files import open_finetuned
from freemerge_callbacks._weights import part_weights, refuse_placeholders, relative

OWN_LABEL = "the backbone of this fit"


class MergeAtFitEnd(Callback):
    """When a fit ends, merges its backbone with the other tasks' finished ones into one file.

    What can be wrong is found before training begins: missing files when the fit is set up, tensors that do not fit and
    another base (of which a TaskCheckpoint keeps record) as soon as the module is complete.

    Args:
        method: how to merge; where it takes one number per model, this fit's comes first, then those of `others`.
        others: the other tasks' fine-tuned models: paths or globs of TaskCheckpoint's files, other .safetensors files,
            Lightning or torch checkpoints and Hugging Face folders. They may hold more than the backbone.
        output: the .safetensors file to write.
        base: the pretrained model from which all of them were fine-tuned. None: the weights that this module starts
            with, which are kept in a hidden file beside `output` until the merge is written.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        weights: "last", as they are when the fit ends, or "best", from the best checkpoint of the Trainer's
            ModelCheckpoint.
        include: names of the tensors to merge, relative to the backbone: globs, or regular expressions after "re:".
            None for all.
        exclude: names of the tensors to leave as in the base, and of heads that only fine-tuned models have.
        dtype: of the merged floating-point tensors, for example "bfloat16". None for the base's own.
        overwrite: replace an existing `output`.

    Attributes:
        merged_path: the file written; None before.
    """

    def __init__(
        self,
        method: MergeMethod,
        others: list[str],
        output: str,
        base: str | None = None,
        backbone: str = "backbone",
        weights: Literal["last", "best"] = "last",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self.method = method
        self.others = others
        self.output = Path(output)
        self.base = FitBase(base, self.output, "MergeAtFitEnd")
        self.backbone = backbone
        self.weights = weights
        self.include = include
        self.exclude = exclude
        self.dtype = dtype
        self.overwrite = overwrite
        self.merged_path: Path | None = None
        self._found: list[Path] = []

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
        self.merged_path = None
        self._check_arguments()
        refuse_placeholders(trainer.strategy, "MergeAtFitEnd")
        if self.weights == "best":
            best_checkpoint(trainer, "MergeAtFitEnd")
        self._found = find_others(self.others, [self.output, self.base.path], "MergeAtFitEnd")
        self.method.check([OWN_LABEL, *map(str, self._found)])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        weights = part_weights(trainer, pl_module, self.backbone, "MergeAtFitEnd")
        on_rank_zero(trainer, lambda: self._check_fit(weights))
        self.base.begin(trainer, weights, digest=bool(base_hashes(self._found)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        self.base.resume(trainer)  # by now every strategy has restored the callbacks' states
        on_rank_zero(trainer, lambda: check_base_hashes(self._found, self.base.hash, "MergeAtFitEnd"))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        began = time.monotonic()
        weights = part_weights(trainer, pl_module, self.backbone, "MergeAtFitEnd")
        best = best_checkpoint(trainer, "MergeAtFitEnd").best_model_path if self.weights == "best" else None
        self.merged_path = on_rank_zero(trainer, lambda: self._merge(weights, best))
        log_metrics(trainer, {"merge/models": 1 + len(self._found), "merge/seconds": time.monotonic() - began})
        rank_zero_info(f"MergeAtFitEnd: merged {1 + len(self._found)} models into {self.merged_path}")

    def _check_arguments(self) -> None:
        if self.weights not in ("last", "best"):
            raise ValueError(f"MergeAtFitEnd: `weights` must be 'last' or 'best', got {self.weights!r}")
        if self.output.suffix != ".safetensors":
            raise ValueError(f"MergeAtFitEnd: {self.output}: the output must be a .safetensors file")
        if self.output.exists() and not self.overwrite:
            raise ValueError(f"MergeAtFitEnd: {self.output} exists already; choose another, or set overwrite=True")
        parse_dtype(self.dtype)
        compile_patterns(self.include, "include")
        compile_patterns(self.exclude, "exclude")
        if self.base.given is not None:
            open_checkpoint(self.base.given)

    def _check_fit(self, weights: Mapping[str, Tensor]) -> None:
        own = open_checkpoint(weights, label=OWN_LABEL)
        base = own.with_label("the base") if self.base.given is None else open_base(self.base.given)
        models = [own, *(open_finetuned(path, base) for path in self._found)]
        make_plan(base, models, self.include, self.exclude, parse_dtype(self.dtype))

    def _merge(self, weights: Mapping[str, Tensor], best: str | None) -> Path:
        base = open_base(self.base.path)
        own = weights if best is None else relative(best_state(best, self.backbone, "MergeAtFitEnd"), self.backbone)
        merged = merge(
            base,
            {OWN_LABEL: own, **{str(path): open_finetuned(path, base) for path in self._found}},
            self.method,
            include=self.include,
            exclude=self.exclude,
            dtype=self.dtype,
            output=self.output,
            overwrite=self.overwrite,
        )
        self.base.discard()
        return merged
