"""MergeAtFitEnd: merge the backbone that a fit has just trained with those that other fits trained before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from freemerge.checkpoints import Checkpoint, hash_tensors, open_checkpoint, save_checkpoint
from freemerge.merging import MergeMethod, merge
from freemerge.merging.engine import parse_dtype
from freemerge.merging.plan import make_plan
from freemerge.merging.selection import compile_patterns
from freemerge_callbacks._others import find_others
from freemerge_callbacks._ranks import log_metrics, on_rank_zero
from freemerge_callbacks._weights import backbone_weights, refuse_placeholders, relative

OWN_LABEL = "the backbone of this fit"


class MergeAtFitEnd(Callback):
    """When a fit ends, merges its backbone with the other tasks' finished ones into one file.

    What can be wrong is found before training begins: missing files when the fit is set up, tensors that do not fit as
    soon as the module is complete.

    Args:
        method: how to merge; where it takes one number per model, this fit's comes first, then those of `others`.
        others: the other tasks' fine-tuned models: paths or globs of .safetensors files, Lightning or torch checkpoints
            and Hugging Face folders. They may hold more than the backbone.
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
        self.base = None if base is None else Path(base)
        self.backbone = backbone
        self.weights = weights
        self.include = include
        self.exclude = exclude
        self.dtype = dtype
        self.overwrite = overwrite
        self.merged_path: Path | None = None
        self._found: list[Path] = []
        self._base_hash: str | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(output=str(self.output))

    def state_dict(self) -> dict[str, Any]:
        return {"base_hash": self._base_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base_hash = state_dict["base_hash"]

    @property
    def kept_base(self) -> Path:
        """Where the weights that the module starts with are kept if no `base` is given; hidden, so no glob finds it."""
        return self.output.with_name(f".{self.output.stem}.base.safetensors")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        self.merged_path = None
        self._check_arguments()
        refuse_placeholders(trainer.strategy, "MergeAtFitEnd")
        if self.weights == "best":
            best_checkpoint(trainer)
        own = [self.output, self.kept_base, *([self.base] if self.base else [])]
        self._found = find_others(self.others, own, "MergeAtFitEnd")
        self.method.check([OWN_LABEL, *map(str, self._found)])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        weights = backbone_weights(trainer, pl_module, self.backbone, "MergeAtFitEnd")
        fresh = self.base is None and trainer.ckpt_path is None
        on_rank_zero(trainer, lambda: self._check_fit(weights))
        if fresh:
            self._base_hash = on_rank_zero(trainer, lambda: keep(weights, self.kept_base))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # By now every strategy has restored the callbacks' states, from which `_base_hash` comes.
        if self.base is None and trainer.ckpt_path is not None and not trainer.fast_dev_run:
            on_rank_zero(trainer, lambda: check_kept(self.kept_base, self._base_hash))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        began = time.monotonic()
        weights = backbone_weights(trainer, pl_module, self.backbone, "MergeAtFitEnd")
        best = best_checkpoint(trainer).best_model_path if self.weights == "best" else None
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
        if self.base is not None:
            open_checkpoint(self.base)

    def _check_fit(self, weights: Mapping[str, Tensor]) -> None:
        own = open_checkpoint(weights, label=OWN_LABEL)
        base = own.with_label("the base") if self.base is None else open_checkpoint(self.base)
        models = [own, *(open_checkpoint(path) for path in self._found)]
        make_plan(base, models, self.include, self.exclude, parse_dtype(self.dtype))

    def _merge(self, weights: Mapping[str, Tensor], best: str | None) -> Path:
        own = weights if best is None else best_weights(best, self.backbone)
        merged = merge(
            self.base or self.kept_base,
            {OWN_LABEL: own, **{str(path): path for path in self._found}},
            self.method,
            include=self.include,
            exclude=self.exclude,
            dtype=self.dtype,
            output=self.output,
            overwrite=self.overwrite,
        )
        if self.base is None:
            self.kept_base.unlink()
        return merged


def best_checkpoint(trainer: L.Trainer) -> ModelCheckpoint:
    """The Trainer's first ModelCheckpoint that knows which of its checkpoints is the best.

    Raises:
        ValueError: there is none, or it writes checkpoints that are folders of shards.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k != 0:
            break
    else:
        raise ValueError(
            "MergeAtFitEnd: weights='best' needs a ModelCheckpoint with a `monitor` (and save_top_k ≠ 0) among the "
            "Trainer's callbacks; add one, or take weights='last'"
        )
    strategy = trainer.strategy
    folder = (isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded") or (
        isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint
    )
    if folder:
        raise ValueError(
            f"MergeAtFitEnd: weights='best' cannot read the sharded checkpoints of this {type(strategy).__name__}; "
            "give it save_distributed_checkpoint=False (FSDP: state_dict_type='full'), or take weights='last'"
        )
    return callback


def best_weights(path: str, backbone: str) -> dict[str, Tensor]:
    """The backbone's tensors in a Lightning checkpoint, read without running its code.

    Raises:
        ValueError: no checkpoint was written, or it holds no such backbone.
    """
    if not path:
        raise ValueError("MergeAtFitEnd: weights='best', but ModelCheckpoint has saved nothing; was the metric logged?")
    weights = relative(open_checkpoint(path), backbone)
    if not weights:
        raise ValueError(f"MergeAtFitEnd: {path}: no tensor's name starts with '{backbone}.'")
    return weights


def keep(weights: Mapping[str, Tensor], path: Path) -> str:
    """Save the weights that a fit starts from; returns their hash."""
    save_checkpoint(path, weights)
    return hash_tensors(weights)


def check_kept(path: Path, expected: str | None) -> None:
    """Require that `path` holds the very weights that the fit, which is now resumed, started from.

    Raises:
        ValueError: it is gone, or holds something else.
    """
    way_out = "give the pretrained model with base=..."
    if expected is None:
        raise ValueError(f"MergeAtFitEnd: the checkpoint to resume from was saved without this callback; {way_out}")
    if not path.exists():
        raise ValueError(f"MergeAtFitEnd: {path}, the weights that the resumed fit started from, is gone; {way_out}")
    if hash_tensors(untied(open_checkpoint(path))) != expected:
        raise ValueError(f"MergeAtFitEnd: {path} is not what the resumed fit started from; {way_out}")


def untied(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors, those too that a file leaves out because they are tied to others."""
    return {name: checkpoint.tensor(name) for name in dict.fromkeys((*checkpoint.names, *checkpoint.tied))}
