"""The artifacts of a run: the folder and key of each stage, and the models that are read back from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import freemerge
from freemerge.checkpoints import expand_name, hash_tensors, load_checkpoint, locate
from freemerge.data import TaskSuite
from freemerge.experts import PackedExpert, class_path, load_expert
from freemerge.merging import MeasuredMethod, MergeMethod, WeightAverage, collected, merge
from freemerge.models import (
    Backbone,
    ConvRouter,
    EarlyRouter,
    FreeModel,
    LanguageBackbone,
    Router,
    feature_width,
    head_from_state,
)
from freemerge.pipeline.settings import Settings
from freemerge.pipeline.store.stage_folder import StageFolder, content
from freemerge.training import FineTuner


class Artifacts:
    """The files of a run.

    Args:
        tuner: the template that is fine-tuned on each task; its backbone is the base or, if the suite has pretraining
            data, is pretrained to become the base.
        suite: the tasks.
        folder: the run's folder.
        settings: the stages' settings.
        config: the configuration as plain data, by top-level key (model, trainer, pretrain, …); stages depend on it.
        seed: the run's seed.
    """

    def __init__(
        self,
        tuner: FineTuner,
        suite: TaskSuite,
        folder: Path,
        settings: Settings,
        config: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.tuner = tuner
        self.suite = suite
        self.folder = folder
        self.settings = settings
        self.config = config
        self.seed = seed

    # -- the results of earlier stages --------------------------------------------------------------------------------

    def base_tuner(self) -> FineTuner:
        """A copy of the template with the base's weights."""
        tuner = copy.deepcopy(self.tuner)
        tuner.backbone.load_weights(self.base_weights())
        return tuner

    def base_weights(self) -> dict[str, Tensor]:
        """The weights of the base: the run's own, or those that the template's backbone was loaded with."""
        if not self.pretrains:
            return self.tuner.backbone.weights()
        if not self.base_path.is_file():
            self.require(self.pretrain_stage())
        return load_checkpoint(self.base_path)

    @property
    def pretrains(self) -> bool:
        """Whether this run pretrains the base: it is not pretrained, and the suite has pretraining data."""
        return not self.tuner.backbone.pretrained and self.suite.has_pretraining

    @property
    def base_path(self) -> Path:
        """The file of the run's own base, which all later stages read if it exists."""
        own = self.folder / "base.safetensors"
        return own if own.is_file() else self.folder / "pretrain" / "base.safetensors"

    def finetuned_paths(self) -> dict[str, Path]:
        """Task → file of the backbone of its individual model, for merges that read tensor by tensor."""
        folders = {task: self._require_folder(self.finetune_stage(task)) for task in self.suite.names}
        return {task: folder / "backbone.safetensors" for task, folder in folders.items()}

    def finetuned_weights(self) -> dict[str, dict[str, Tensor]]:
        """Task → weights of the backbone of its individual model."""
        return {task: self.finetuned(task) for task in self.suite.names}

    def finetuned(self, task: str) -> dict[str, Tensor]:
        """The weights of the backbone of one task's individual model."""
        return load_checkpoint(self._require_folder(self.finetune_stage(task)) / "backbone.safetensors")

    def finished(self, run: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Path]]:
        """The base, and task → the file of its individual model's backbone.

        Args:
            run: a run folder whose files to take as they are; None for this run's own, by their keys.
        """
        if run is None:
            return self.base_weights(), self.finetuned_paths()
        base = run / "base.safetensors"
        return (
            load_checkpoint(base) if base.exists() else self.tuner.backbone.weights(),
            {task: run / "finetune" / task / "backbone.safetensors" for task in self.suite.names},
        )

    def heads(self, shared: bool = True, run: Path | None = None) -> dict[str, nn.Module]:
        """Task → head.

        Args:
            shared: tasks that share a head get the mean of the group's, which only differ where heads train along;
                otherwise each has the one that it was fine-tuned with.
            run: see `finished`.
        """
        states = {}
        for task in self.suite.names:
            folder = run / "finetune" / task if run is not None else self._require_folder(self.finetune_stage(task))
            path = folder / "head.safetensors"  # not there where the head is the model's own
            states[task] = load_checkpoint(path) if path.is_file() else {}
        heads: dict[str, nn.Module] = {}
        for task in states:
            group = [states[member] for member in (self.suite.head_group(task) if shared else (task,))]
            heads[task] = self._head(task, {name: _mean([other[name] for other in group]) for name in group[0]})
        return heads

    def _head(self, task: str, state: dict[str, Tensor]) -> nn.Module:
        """A head with these weights: linear, by cosine, the model's own, or what the template's `make_head` returns."""
        if not self.tuner.makes_own_heads:
            return head_from_state(state) if state else nn.Identity()
        head = self.tuner.make_head(self.suite.task(task).num_outputs)
        head.load_state_dict(state)
        return head

    def free_weights(self) -> dict[str, Tensor]:
        """The merged backbone that carries the experts."""
        self.require(self.merge_stage())
        return load_checkpoint(self.merged_path(self.settings.merge.free))

    def free_model(self) -> FreeModel:
        """The FREE model, from the files of the stages."""
        merged, experts = self.free_weights(), {}
        for task in self.suite.names:
            self.require(self.expert_stage(task))
            experts[task] = PackedExpert(load_expert(self.expert_path(task), merged))
        routing = self.require(self.router_stage())["results"]
        router = self.new_router()
        router.load_state_dict(load_checkpoint(self.router_stage().path / "router.safetensors"))
        names = {task: self.suite.task(task).class_names for task in self.suite.names}
        backbone, settings = self._served(merged), self.settings.router
        return FreeModel(
            backbone, self.heads(), experts, router, _given(names), threshold=routing["threshold"], top_n=settings.top_n
        ).eval()

    def merged_model(self) -> FreeModel:
        """The merged backbone with the tasks' heads, without experts and router; callers name each sample's task."""
        names = {task: self.suite.task(task).class_names for task in self.suite.names}
        return FreeModel(self._served(self.free_weights()), self.heads(), class_names=_given(names)).eval()

    def _served(self, weights: Mapping[str, Tensor]) -> Backbone:
        """A backbone to deploy: a language model has the tokenizer of its tasks, which its folder then holds."""
        backbone = self.backbone(weights)
        known = [name for task in self.suite.names if (name := self.suite.task(task).tokenizer) is not None]
        if isinstance(backbone, LanguageBackbone) and known:
            backbone.tokenizer = expand_name(known[0])
        return backbone

    def new_router(self) -> Router:
        """An untrained router for the suite."""
        settings, tasks = self.settings.router, len(self.suite.names)
        if settings.kind == "conv":
            return ConvRouter(tasks, self.suite.image_shape[0], settings.width, **settings.judging)
        inputs, _ = next(iter(self.suite.for_task(self.suite.names[0]).val_dataloader()))
        width = feature_width(inputs, self.backbone(self.free_weights()).eval(), settings.point)
        segments = 2 if isinstance(inputs, Mapping) and "token_type_ids" in inputs else 1
        return EarlyRouter(tasks, settings.point, width, segments, **settings.judging)

    def backbone(self, weights: Mapping[str, Tensor]) -> Backbone:
        """A copy of the template's backbone with these weights."""
        backbone = copy.deepcopy(self.tuner.backbone)
        backbone.load_weights(dict(weights))
        return backbone

    # -- stages and their keys ----------------------------------------------------------------------------------------

    def _key(self, *parts: str) -> dict[str, Any]:
        return {
            "freemerge": freemerge.__version__,
            "seed": self.seed,
            **{part: self.config.get(part) for part in parts},
        }

    def stages(self) -> list[Callable[[], StageFolder]]:
        """Functions that make each stage, in order; a stage's key depends on the current files of earlier stages."""
        tasks = self.suite.names
        return [
            *([self.pretrain_stage] if self.pretrains else []),
            *(partial(self.finetune_stage, task) for task in tasks),
            self.merge_stage,
            self.extraction_stage,
            *(partial(self.expert_stage, task) for task in tasks),
            self.router_stage,
        ]

    def pretrain_stage(self) -> StageFolder:
        """The stage that pretrains the base."""
        settings = self.settings.pretrain
        inputs = self._key("trainer", "pretrain") | {
            "backbone": self._backbone_hash,
            "pretraining_data": self.suite.pretraining_fingerprint(),
            "batch_size": settings.batch_size or self.suite.batch_size,
        }
        return StageFolder(self.folder / "pretrain", "pretrain", inputs)

    @cached_property
    def _backbone_hash(self) -> str:
        return hash_tensors(self.tuner.backbone.weights())

    def _base_content(self) -> str:
        return content(self.base_path) if self.pretrains else self._backbone_hash

    def finetune_stage(self, task: str) -> StageFolder:
        """The fine-tuning of a task: backbone.safetensors and head.safetensors."""
        group = self.suite.head_group(task)
        own = dict(self.config.get("finetune") or {})
        taken = {"model": own.pop("models", {}).get(task), "exclude": own.pop("exclude", None)}  # not of other tasks
        inputs = self._key("trainer", "model") | {
            "finetune": own,
            **({"taken": taken | {"content": self._content_of_model(task)}} if taken["model"] else {}),
            "base": self._base_content(),
            "task": task,
            # A shared head is fitted to the data of its whole group; other tasks have no effect.
            "group": {member: self.suite.task_fingerprint(member) for member in group},
            "batch_size": self.suite.batch_size,
            "order": list(group),
        }
        made_from = ("pretrain",) if self.pretrains else ()
        return StageFolder(self.folder / "finetune" / task, f"finetune {task}", inputs, made_from)

    def finished_model(self, task: str) -> dict[str, Tensor]:
        """Weights of the finished model that `finetune.models` names for a task, under the base's names.

        Raises:
            CheckpointError, MergeError: the model cannot be read, or is not one of this base.
        """
        settings = self.settings.finetune
        source = self._places[settings.models[task]]
        # The average of one model is that model; merging it also checks it, matches names and applies adapters.
        return merge(self.base_weights(), [source], WeightAverage(), exclude=settings.exclude)

    @cached_property
    def _places(self) -> dict[str, Path]:
        """Finished model, as the settings name it → its local path; each is looked up on the Hub only once."""
        models = self.settings.finetune.models
        return {source: locate(source) for task, source in models.items() if task in self.suite.names}

    def _content_of_model(self, task: str) -> dict[str, str]:
        place = self._places[self.settings.finetune.models[task]]
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        return {file.name: content(file) for file in files if file.suffix in (".safetensors", ".bin", ".pt", ".ckpt")}

    def _of_all_tasks(self) -> dict[str, Any]:
        """The content of all files of fine-tuning, and the validation data."""
        tasks, stages = self.suite.names, {task: self.folder / "finetune" / task for task in self.suite.names}
        return {
            "tasks": list(tasks),
            "models": {task: content(stages[task] / "backbone.safetensors") for task in tasks},
            "heads": {task: content(stages[task] / "head.safetensors") for task in tasks},
            "head_groups": {task: list(self.suite.head_group(task)) for task in tasks},
            "data": {task: self.suite.task_fingerprint(task) for task in tasks},
        }

    def _all_finetuned(self) -> tuple[str, ...]:
        return tuple(f"finetune {task}" for task in self.suite.names)

    def merge_stage(self) -> StageFolder:
        """The stage that merges, with the search for the scales."""
        inputs = self._key("merge") | {"base": self._base_content()} | self._of_all_tasks()
        if inputs["merge"] and not self.collected:
            inputs["merge"] = {name: said for name, said in inputs["merge"].items() if name != "statistics_samples"}
        return StageFolder(self.folder / "merge", "merge", inputs, self._all_finetuned())

    def extraction_stage(self) -> StageFolder:
        """The stage that extracts the experts, with the search for their scale."""
        settings = self.settings.experts
        inputs = self._key() | self._of_all_tasks() | {
            "base": self._base_content(),
            "merged": self._merged_content(),
            "scales": self.settings.merge.scales,
            "kind": settings.kind if isinstance(settings.kind, str) else class_path(settings.kind),
            "extraction": settings.extraction,
            "values": settings.values,
        }  # fmt: skip
        return StageFolder(self.folder / "extracted", "experts extracted", inputs, ("merge",))

    def expert_stage(self, task: str) -> StageFolder:
        """The stage that trains a task's expert."""
        group = self.suite.head_group(task)
        inputs = self._key("trainer", "experts") | {
            "task": task,
            "extracted": content(self.extracted_path(task)),
            "merged": self._merged_content(),
            "model": content(self.folder / "finetune" / task / "backbone.safetensors"),
            "group_heads": {name: content(self.folder / "finetune" / name / "head.safetensors") for name in group},
            "task_data": self.suite.task_fingerprint(task),
            "batch_size": self.settings.experts.batch_size or self.suite.batch_size,
        }
        return StageFolder(self.folder / "experts" / task, f"experts {task}", inputs, ("experts extracted",))

    def router_stage(self) -> StageFolder:
        """The stage that trains the router."""
        tasks = self.suite.names
        inputs = self._key("trainer", "router") | {
            "tasks": list(tasks),
            "data": {task: self.suite.task_fingerprint(task) for task in tasks},
            "batch_size": self.settings.router.batch_size or self.suite.batch_size,
        }
        early = self.settings.router.kind == "early"  # it uses features of the merged backbone
        if early:
            inputs["merged"] = self._merged_content()
        return StageFolder(self.folder / "router", "router", inputs, ("merge",) if early else ())

    def _merged_content(self) -> str:
        return content(self.merged_path(self.settings.merge.free))

    def tune_stage(self, name: str, inputs: Mapping[str, Any]) -> StageFolder:
        """The folder of the search for a method's parameters.

        Args:
            name: name of the tuned method.
            inputs: what the search depends on, in addition to the data and the seed.
        """
        data = {task: self.suite.task_fingerprint(task) for task in self.suite.names}
        inputs = self._key() | {"order": list(data), "task_data": data, **inputs}
        return StageFolder(self.folder / "tune" / _file_name(name), f"tune {name}", inputs)

    def statistics_path(self, method: MeasuredMethod, task: str, run: Path | None = None) -> Path:
        """The file of a task's statistics that a method needs; see `finished` for `run`."""
        return (run or self.folder) / "merge" / "statistics" / f"{task}.{method.collected_as}.safetensors"

    @property
    def collected(self) -> dict[str, MeasuredMethod]:
        """The statistics that the stage `merge` collects: their name → a method that needs them."""
        found: dict[str, MeasuredMethod] = {}
        for method in self.settings.merge.lines.values():
            self.with_statistics(method, found)
        return dict(sorted(found.items()))

    def with_statistics(
        self, method: MergeMethod, found: dict[str, MeasuredMethod] | None = None, run: Path | None = None
    ) -> MergeMethod:
        """A method with the files of its statistics, where it asks to collect them.

        Args:
            method: how to merge.
            found: what it asks for is added here.
            run: see `finished`.
        """

        def paths(measured: MeasuredMethod) -> list[str]:
            if found is not None:
                found.setdefault(measured.collected_as, measured)
            return [str(self.statistics_path(measured, task, run)) for task in self.suite.names]

        return collected(method, paths)

    def merged_path(self, method: str) -> Path:
        """The file of the backbone that the method of that name merged."""
        return self.folder / "merge" / f"{_file_name(method)}.safetensors"

    def extracted_path(self, task: str) -> Path:
        """The file of a task's expert before training."""
        return self.folder / "extracted" / f"{task}.safetensors"

    def expert_path(self, task: str) -> Path:
        """The file of a task's expert after training."""
        return self.folder / "experts" / task / "expert.safetensors"

    def has_experts(self) -> bool:
        """Whether all tasks' experts and the router have been made with this configuration."""
        stages = [*(self.expert_stage(task) for task in self.suite.names), self.router_stage()]
        return all(stage.record() is not None for stage in stages)

    def require(self, stage: StageFolder) -> dict[str, Any]:
        """The record of a finished stage.

        Args:
            stage: the stage.

        Raises:
            ValueError: it is not finished; the message says what to add to `run.stages`.
        """
        record = stage.record()
        if record is None:
            raise ValueError(
                f"{self.folder}: stage {stage.name!r} has not been done with this configuration; "
                f"add {stage.name.split()[0]} to run.stages"
            )
        return record

    def _require_folder(self, stage: StageFolder) -> Path:
        self.require(stage)
        return stage.path


def _given(class_names: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    return {task: names for task, names in class_names.items() if names}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of the weights of a head that several tasks share; integers, such as counts, are the first task's."""
    return torch.stack(list(tensors)).mean(dim=0) if tensors[0].is_floating_point() else tensors[0]


def _file_name(name: str) -> str:
    return name.replace(" ", "_").lower()
