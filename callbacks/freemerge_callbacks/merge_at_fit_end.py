"""MergeAtFitEnd: merge the backbone of a fit that has just ended with the backbones of other fits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from freemerge.checkpoints import Checkpoint, check_folder, expand, hash_tensors, open_checkpoint, read_origin
from freemerge.merging import MergeMethod, make_plan, make_record, merge, parse_dtype
from freemerge.tensors import compile_patterns
from freemerge_callbacks._adapters import has_adapters
from freemerge_callbacks._base import is_resumed, open_finetuned
from freemerge_callbacks._best import best_state, completed, left_out
from freemerge_callbacks._fit_end import FitEndCallback
from freemerge_callbacks._others import base_hashes, check_base_hashes, find_others
from freemerge_callbacks._ranks import all_reach, log_metrics, on_rank_zero
from freemerge_callbacks._registry import Registry
from freemerge_callbacks._weights import (
    final_weights,
    in_memory,
    is_sharded,
    part_of,
    weights_of,
    while_in_file,
    whole_state,
)

OWN_LABEL = "the backbone of this fit"

_NO_FOLDERS = (".pt", ".pth", ".bin", ".ckpt", ".gguf")


class MergeAtFitEnd(FitEndCallback):
    """Merges a fit's backbone with the other tasks' fine-tuned backbones when the fit ends.

    Either `others` names the other models, or several jobs share a folder (`registry`): each job saves its weights
    there when it finishes, and the last one merges them all. If two jobs finish at the same time, one waits.

    Errors are raised before training begins: missing files when the fit is set up; tensors that do not fit, and a
    different base in a TaskCheckpoint file's record, as soon as the module is complete.

    Args:
        method: the merging method. If it takes one number per model, this fit's number comes first, then those of
            `others`; with a registry, those of its tasks in their order come first.
        others: the other tasks' fine-tuned models: paths or globs of TaskCheckpoint's files, other .safetensors files,
            Lightning or torch checkpoints and Hugging Face folders. They may hold more than the backbone.
        output: the path to write: a .safetensors file, or a folder for Hugging Face's `from_pretrained`, with the
            configuration and tokenizer of the folder `base`.
        base: path of the pretrained model from which all models were fine-tuned. None: this module's initial weights,
            which are saved in a hidden file beside `output` until the merge is written.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        weights: "last", the weights at the end of the fit, or "best", those of the best checkpoint of the Trainer's
            ModelCheckpoint.
        include: names of the tensors to merge, relative to the backbone: globs, or regular expressions after "re:".
            None for all.
        exclude: names of the tensors that keep the base's values, and of heads that only fine-tuned models have.
        dtype: dtype of the merged floating-point tensors, for example "bfloat16". None for the base's own.
        overwrite: whether to replace an existing `output`, and this task's file in the registry.
        registry: a folder that several jobs share.
        task: this fit's name in the registry.
        tasks: the names of all tasks that the registry waits for, in the order of the merge; or their number, in which
            case they are merged in the order of their sorted names.
        hash_inputs: whether the report holds the hashes of all models, which takes one pass over them.

    Attributes:
        merged_path: the path written; None before, and for a job that was not the last to finish.
        report: the record of the merge: `method`, `base`, `finetuned`, `tensors`, `versions` and so on, as in a merged
            folder's freemerge.json, and `output`, `hash` (of the merged tensors), `weights`, `ranks` (the number of
            processes that merged) and `seconds`; empty before.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(
        self,
        method: MergeMethod,
        others: list[str] | None = None,
        output: str = "merged.safetensors",
        base: str | None = None,
        backbone: str = "backbone",
        weights: Literal["last", "best"] = "last",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
        registry: str | None = None,
        task: str | None = None,
        tasks: list[str] | int | None = None,
        hash_inputs: bool = True,
    ) -> None:
        shared = None
        if registry is not None:
            if task is None or tasks is None:
                raise ValueError(
                    "MergeAtFitEnd: a registry needs `task`, this fit's name in it, and `tasks`, the names of all "
                    "tasks (or their number)"
                )
            shared = Registry(registry, task, tasks, "MergeAtFitEnd")
        elif task is not None or tasks is not None:
            raise ValueError("MergeAtFitEnd: `task` and `tasks` are for a registry; name the folder with registry=...")
        super().__init__(output, base, shared.path if shared else expand(output), backbone, weights, dtype, overwrite)
        self.method = method
        self.others = others
        self.include = include
        self.exclude = exclude
        self.registry = shared
        self.hash_inputs = hash_inputs
        self.merged_path: Path | None = None
        self.report: dict[str, Any] = {}
        self._start = Path.cwd()
        self._found: dict[str, Path] = {}
        self._best: Path | None = None

    @property
    def needs_hash(self) -> bool:
        """Whether the hash of a given base is needed: for the registry, or to compare it with records."""
        return self.registry is not None or bool(base_hashes(self._found.values()))

    def check_arguments(self, trainer: L.Trainer) -> None:
        """Check output, patterns, registry and method, and find the other models.

        Args:
            trainer: the Trainer.

        Raises:
            ValueError: if an argument is invalid or a model is missing.
        """
        self.merged_path, self.report, self._best = None, {}, None
        self._check_output()
        compile_patterns(self.include, "include")
        compile_patterns(self.exclude, "exclude")
        if self.registry is not None:
            self.registry.check()
        self._found = {}
        if self.registry is None or self.others:
            self._found = find_others(self.others or [], self._start, [self.output, self.base.path], "MergeAtFitEnd")
        self.method.check([*(self.registry.labels() if self.registry else [OWN_LABEL]), *self._found])

    def check_module(self, trainer: L.Trainer, module: L.LightningModule, weights: Mapping[str, Tensor]) -> None:
        """Check that the backbone and the finished models can be merged.

        Args:
            trainer: the Trainer; every rank calls this.
            module: the module.
            weights: the backbone's tensors.

        Raises:
            ValueError: if tensors do not match, or the task is already registered.
        """
        on_rank_zero(trainer, lambda: self._check_fit(weights, self._replaces(trainer)))

    def check_base(self, trainer: L.Trainer) -> None:
        """Check that the finished models have this fit's base.

        Args:
            trainer: the Trainer; every rank calls this.

        Raises:
            ValueError: if a model was fine-tuned from another base.
        """
        on_rank_zero(trainer, lambda: check_base_hashes(self._all_others(), self.base.hash, "MergeAtFitEnd"))

    def finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Merge the models; with a registry, register this task, and merge if it is the last.

        Args:
            trainer: the Trainer; every rank calls this.
            module: the module.
        """
        with self._own(trainer, module) as own:
            if self.registry is None:
                self._merge(trainer, {OWN_LABEL: own})
                return
            registry = self.registry
            with registry.turn(trainer):
                missing = on_rank_zero(trainer, lambda: self._register(trainer, registry, own))
                if missing:
                    waiting = f"'{registry.task}' is in {registry.folder}; waiting for {missing}"
                    rank_zero_info(f"MergeAtFitEnd: {waiting}")
                else:
                    self._merge(trainer, registry.registered())

    def _own(
        self, trainer: L.Trainer, module: L.LightningModule
    ) -> AbstractContextManager[Mapping[str, Tensor] | Path]:
        """This fit's weights: by name, or as a file that every rank can read."""
        best = self.best_path(trainer)
        file = self.output.with_name(f".{self.output.stem}.own.safetensors")  # hidden: no glob finds it
        if best is not None:
            partial = on_rank_zero(trainer, lambda: self._is_partial(trainer, module, best))
            if partial or has_adapters(module.get_submodule(self.backbone)):
                own = whole_state(trainer, module)

                def weights() -> dict[str, Tensor]:
                    found = best_state(best, self.backbone, "MergeAtFitEnd")
                    state = completed(found, module, own, self.backbone, "MergeAtFitEnd") if partial else found
                    return weights_of(module, self.backbone, state)

                return while_in_file(trainer, weights, file)
            self._best = Path(best)
            return nullcontext(self._best)
        return final_weights(trainer, module, self.backbone, "MergeAtFitEnd", file)

    def _is_partial(self, trainer: L.Trainer, module: L.LightningModule, best: str) -> bool:
        """Whether the best checkpoint leaves out frozen tensors of the backbone."""
        state, prefix = best_state(best, self.backbone, "MergeAtFitEnd"), f"{self.backbone}." if self.backbone else ""
        if is_sharded(trainer.strategy):
            return False
        return any(name.startswith(prefix) for name in left_out(state, module, self.backbone, "MergeAtFitEnd"))

    def _replaces(self, trainer: L.Trainer) -> bool:
        """Whether this fit may replace its task in the registry; a resumed fit may have registered it before."""
        return self.overwrite or is_resumed(trainer)

    @property
    def _options(self) -> dict[str, Any]:
        """Keyword arguments shared by `merge` and `make_plan`."""
        return {"include": self.include, "exclude": self.exclude, "dtype": parse_dtype(self.dtype)}

    def _check_output(self) -> None:
        if self.output.suffix in _NO_FOLDERS:
            raise ValueError(f"MergeAtFitEnd: {self.output}: the output must be a .safetensors file or a folder")
        if self.output.suffix == ".safetensors":
            self.refuse_existing()
        else:
            check_folder(self.output, self.overwrite)

    def _all_others(self) -> list[Path]:
        """The finished checkpoints of the other tasks, each once."""
        if self.registry is None:
            return list(self._found.values())
        return [
            *(path for task, path in self.registry.registered().items() if task != self.registry.task),
            *self._found.values(),
        ]

    def _check_fit(self, weights: Mapping[str, Tensor], replace: bool) -> None:
        if self.registry is not None:
            self.registry.refuse_registered(replace)
        own = open_checkpoint(weights, label=OWN_LABEL)
        base = own.with_label("the base") if self.base.given is None else self.base.open()
        models = [own, *(open_finetuned(path) for path in self._all_others())]
        make_plan(base, models, **self._options)

    def _register(self, trainer: L.Trainer, registry: Registry, own: Mapping[str, Tensor] | Path) -> str:
        weights = in_memory(self._open(own))
        record = self.task_record(trainer, registry.task, "weights", weights)
        registry.register(record, weights, self._replaces(trainer))
        if missing := registry.missing():
            self.base.discard()
            return missing
        check_base_hashes(self._all_others(), self.base.hash, "MergeAtFitEnd")
        return ""

    def _merge(self, trainer: L.Trainer, models: Mapping[str, Path | Mapping[str, Tensor]]) -> None:
        began = time.monotonic()
        models = {**models, **self._found}
        files = [self.base.path, *(model for model in models.values() if isinstance(model, Path))]
        shared = all_reach(trainer, files, self.output)
        if shared:
            self._write(models, distributed=True)  # every rank merges its part of the tensors
        else:
            on_rank_zero(trainer, lambda: self._write(models))
        report = on_rank_zero(trainer, lambda: self._record(models))
        self.merged_path = self.output
        self.report = report | {
            "weights": self.weights,
            "ranks": trainer.world_size if shared else 1,
            "seconds": time.monotonic() - began,
        }
        count = len(self.report["finetuned"])
        log_metrics(trainer, {"merge/models": count, "merge/seconds": self.report["seconds"]})
        rank_zero_info(f"MergeAtFitEnd: merged {count} models into {self.merged_path}")

    def _open(self, model: Path | Mapping[str, Tensor]) -> Checkpoint:
        """Open one of the merge's models, which may be this fit's own."""
        if model == self._best:
            return part_of(best_state(str(model), self.backbone, "MergeAtFitEnd"), self.backbone)
        return open_finetuned(model) if isinstance(model, Path) else open_checkpoint(model)

    def _write(self, models: Mapping[str, Path | Mapping[str, Tensor]], distributed: bool = False) -> None:
        merge(
            # A folder's configuration and tokenizer are found by its path.
            self.base.path if self.base.is_folder else self.base.open(),
            {label: self._open(model) for label, model in models.items()},
            self.method,
            **self._options,
            output=self.output,
            overwrite=self.overwrite,
            hash_inputs=self.hash_inputs,
            distributed=distributed,
        )

    def _record(self, models: Mapping[str, Path | Mapping[str, Tensor]]) -> dict[str, Any]:
        """The record of the written merge; also removes the saved initial weights, which are no longer needed."""
        if self.output.is_dir():  # the merge has written it there
            record = read_origin(self.output)
        else:
            labelled = [self._open(model).with_label(label) for label, model in models.items()]
            plan = make_plan(self.base.open(), labelled, **self._options)
            patterns = {"include": self.include, "exclude": self.exclude}
            record = make_record(plan, self.method, **patterns, hash_inputs=self.hash_inputs)
        self.base.discard()
        digest = hash_tensors(open_checkpoint(self.output)) if self.hash_inputs else None
        return record | {"output": str(self.output), "hash": digest}
