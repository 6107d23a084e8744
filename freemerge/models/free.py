"""FreeModel: the merged backbone, an expert and a head per task, and the router, in one module.

    FreeModel(images)              routes each sample, runs each expert's group, returns routed tasks and logits
    FreeModel(images, task="x")    uses task x's expert and head for the whole batch

There is one backbone in memory. Experts are switched into its weights for the duration of their group and out again,
bit for bit (`ExpertSwitch`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from freemerge.checkpoints import CheckpointError, hash_tensors, load_checkpoint, save_checkpoint
from freemerge.experts import ExpertSwitch, SparseExpert, check_fits, check_hash, load_expert, save_expert
from freemerge.models.backbones import Backbone, TransformersBackbone
from freemerge.models.router import Router

FORMAT = "freemerge-free-model-1"


@dataclass  # not frozen: Lightning moves predictions to the CPU field by field
class FreeOutput:
    """What a FreeModel says of a batch.

    Args:
        task: (B,) int64, which task each sample was routed to: an index into `tasks`.
        logits: (B, C) of that task's head, where C is the largest number of classes; −inf past a head's own classes.
        router_logits: (B, K) what the router said, or None where the caller named the task.
        tasks: the K task names.
    """

    task: Tensor
    logits: Tensor
    router_logits: Tensor | None
    tasks: tuple[str, ...]

    @property
    def task_names(self) -> list[str]:
        """The routed task of each sample, by name."""
        return [self.tasks[i] for i in self.task.tolist()]

    @property
    def labels(self) -> Tensor:
        """(B,) int64, the most likely class in the routed task's own label space."""
        return self.logits.argmax(dim=1)


class FreeModel(nn.Module):
    """One merged backbone that serves many tasks (FREE-Merging, arXiv 2411.16815).

    Args:
        backbone: the backbone with the merged weights loaded.
        heads: task name → head, features (B, F) → logits (B, C_k); their order is the order of the tasks.
        experts: task name → expert; tasks without one use the merged backbone as it is.
        router: images → task logits (B, K); without one, the task must be named in each call.
        class_names: task name → names of its classes, kept for whoever uses the model.

    Raises:
        ValueError: if an expert names no task or does not fit the backbone, or the router has another number of tasks.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Mapping[str, nn.Module],
        experts: Mapping[str, SparseExpert] | None = None,
        router: Router | None = None,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.router = router
        self.experts = dict(experts or {})
        self.class_names = {task: list(names) for task, names in (class_names or {}).items()}
        for task, expert in self.experts.items():
            if task not in self.heads:
                raise ValueError(
                    f"FreeModel: there is an expert for {task!r} but no head; tasks: {', '.join(self.tasks)}"
                )
            check_fits(expert, backbone.weights())
        if router is not None and router.config["num_tasks"] != len(self.heads):
            raise ValueError(
                f"FreeModel: the router knows {router.config['num_tasks']} tasks, there are {len(self.heads)} heads"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names, in the order of the router's outputs."""
        return tuple(self.heads)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        self.experts = {task: expert.to(device) for task, expert in self.experts.items()}
        return self

    def forward(self, images: Tensor, task: str | None = None) -> FreeOutput:
        """Logits of a batch, each sample by its own task's expert and head.

        Args:
            images: (B, C, H, W); B may be 0.
            task: use this task for every sample instead of the router.

        Raises:
            ValueError: if the task is unknown, or none is named and there is no router.
        """
        if task is not None:
            if task not in self.heads:
                raise ValueError(f"FreeModel: unknown task {task!r}; tasks: {', '.join(self.tasks)}")
            router_logits = None
            routed = torch.full((len(images),), self.tasks.index(task), dtype=torch.long, device=images.device)
        else:
            if self.router is None:
                raise ValueError("FreeModel: there is no router; name the task: model(images, task=…)")
            router_logits = self.router(images)
            routed = router_logits.argmax(dim=1)
        width = max(self._num_classes(name) for name in self.tasks)
        logits: Tensor | None = None
        for index in routed.unique().tolist():
            name = self.tasks[index]
            group = (routed == index).nonzero().squeeze(1)
            outputs = self.heads[name](self.features(images[group], name))  # (b, C_k)
            if logits is None:
                logits = outputs.new_full((len(images), width), float("-inf"))
            logits[group, : outputs.shape[1]] = outputs
        if logits is None:  # an empty batch
            logits = torch.empty((0, width), device=images.device)
        return FreeOutput(routed, logits, router_logits, self.tasks)

    def features(self, images: Tensor, task: str) -> Tensor:
        """Features (B, F) of the merged backbone with `task`'s expert switched in; the weights are restored after."""
        expert = self.experts.get(task)
        if expert is None:
            return self.backbone(images)
        switch = ExpertSwitch(self.backbone.weights())
        switch.attach(expert)
        try:
            return self.backbone(images)
        finally:
            switch.detach()

    def _num_classes(self, task: str) -> int:
        return self.heads[task].out_features

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the model to a folder: the merged backbone as its own library writes it, and beside it
        `experts/<task>.safetensors`, `heads.safetensors`, `router.safetensors` and `freemerge.json`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(directory)
        merged_hash = hash_tensors(self.backbone.weights())
        for task, expert in self.experts.items():
            tagged = replace(expert, metadata={**expert.metadata, "task": task, "merged_hash": merged_hash})
            save_expert(directory / "experts" / f"{task}.safetensors", tagged)
        save_checkpoint(directory / "heads.safetensors", self.heads.state_dict())
        if self.router is not None:
            save_checkpoint(directory / "router.safetensors", self.router.state_dict())
        description = {
            "format": FORMAT,
            "backbone": {"pooling": getattr(self.backbone, "pooling", None)},
            "merged_hash": merged_hash,
            "tasks": {
                task: {"num_classes": self._num_classes(task), "class_names": self.class_names.get(task)}
                for task in self.tasks
            },
            "experts": sorted(self.experts),
            "router": self.router.config if self.router is not None else None,
        }
        (directory / "freemerge.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        return directory

    @classmethod
    def from_pretrained(cls, directory: str | Path, backbone: Backbone | None = None) -> FreeModel:
        """Load a folder written by `save_pretrained`.

        Args:
            directory: the folder.
            backbone: a backbone with the folder's merged weights, for models that are not from transformers.

        Raises:
            CheckpointError: if the folder is not a FREE model, or an expert belongs to other merged weights.
        """
        directory = Path(directory)
        try:
            description = json.loads((directory / "freemerge.json").read_text())
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory}: not a FREE model (no freemerge.json)") from error
        if description.get("format") != FORMAT:
            raise CheckpointError(
                f"{directory}/freemerge.json: format {description.get('format')!r}, expected {FORMAT!r}"
            )
        if backbone is None:
            backbone = TransformersBackbone(pretrained=str(directory), pooling=description["backbone"]["pooling"])
        merged_hash = hash_tensors(backbone.weights())
        if merged_hash != description["merged_hash"]:
            raise CheckpointError(
                f"{directory}: the merged backbone has hash {merged_hash[:12]}, freemerge.json says "
                f"{description['merged_hash'][:12]}; the folder's files do not belong together"
            )
        experts = {}
        for task in description["experts"]:
            path = directory / "experts" / f"{task}.safetensors"
            experts[task] = load_expert(path)
            check_hash(experts[task].metadata, "merged", merged_hash, path)
        heads = {
            task: nn.Linear(backbone.feature_dim, info["num_classes"]) for task, info in description["tasks"].items()
        }
        router = Router(**description["router"]) if description["router"] is not None else None
        names = {task: info["class_names"] for task, info in description["tasks"].items() if info["class_names"]}
        model = cls(backbone, heads, experts, router, names)
        model.heads.load_state_dict(load_checkpoint(directory / "heads.safetensors"))
        if router is not None:
            router.load_state_dict(load_checkpoint(directory / "router.safetensors"))
        return model.eval()
