"""Measuring a run's models on all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freemerge.evaluation import LabelSpace, Routing, evaluate, evaluate_routing
from freemerge.models import FreeModel
from freemerge.pipeline.artifacts import Artifacts


class Measure:
    """Accuracy of models on the suite's tasks.

    Args:
        files: the run's files.
        device: where to compute.
    """

    def __init__(self, files: Artifacts, device: torch.device) -> None:
        self.files = files
        self.suite = files.suite
        self.device = device

    def loaders(self, split: str) -> dict[str, Any]:
        """Task → loader of its `val` or `test` data."""
        self.suite.prepare_data()
        self.suite.setup()
        return getattr(self.suite, f"{split}_dataloader")()

    def _label_space(self) -> LabelSpace:
        return LabelSpace({task: self.suite.task(task).num_classes for task in self.suite.names})

    def shared(
        self, weights: Mapping[str, Tensor], heads: Mapping[str, nn.Module], loaders: Mapping[str, Any]
    ) -> dict[str, float]:
        """One backbone for all tasks, each with its own head."""
        return self.free(FreeModel(self.files.backbone(weights), heads), loaders, oracle=True)

    def individual(self, loaders: Mapping[str, Any]) -> dict[str, float]:
        """Each task's own fine-tuned model."""
        scores, heads = {}, self.files.heads()
        for task, weights in self.files.finetuned_weights().items():
            scores |= self.shared(weights, heads, {task: loaders[task]})
        return scores

    def free(self, model: FreeModel, loaders: Mapping[str, Any], oracle: bool) -> dict[str, float]:
        """A FREE model that is told each sample's task (`oracle`), or finds it by itself."""
        model = model.eval().to(self.device)
        return evaluate(
            lambda inputs, task: model(inputs, task=task if oracle else None), loaders, self._label_space(), self.device
        )

    def routing(self, model: FreeModel, loaders: Mapping[str, Any]) -> Routing:
        """Which tasks' samples a FREE model takes for which tasks', and where it abstains."""
        return evaluate_routing(model.eval().to(self.device), loaders, self.device)
