"""Evaluation of a run's models on all tasks, each by its own metric."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from freemerge.evaluation import LabelSpace, Predict, Routing, TaskMetric, evaluate, evaluate_routing
from freemerge.inputs import Inputs
from freemerge.models import FreeModel, batch_norms, reestimate_batch_norm
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.tensors.rounding import IN_MEMORY, round_to


class Measure:
    """Scores of models on the suite's tasks.

    Args:
        files: the run's files.
        device: where to compute.
        precision: the Trainer's; with `bf16-mixed` and `16-mixed`, models compute under autocast, as in its own
            validation.
    """

    def __init__(self, files: Artifacts, device: torch.device, precision: str = "32-true") -> None:
        self.files = files
        self.suite = files.suite
        self.device = device
        self._mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    def loaders(self, split: str) -> dict[str, Any]:
        """Task → loader of its `val` or `test` data."""
        self.suite.prepare_data()
        self.suite.setup()
        return getattr(self.suite, f"{split}_dataloader")()

    @property
    def metrics(self) -> dict[str, str]:
        """Task → name of its metric, held-out tasks included."""
        return {task: TaskMetric.of(self.suite.task(task)).name for task in (*self.suite.names, *self.suite.held_out)}

    def _evaluate(self, predict: Predict, loaders: Mapping[str, Any]) -> dict[str, float]:
        tasks = {name: self.suite.task(name) for name in (*self.suite.names, *self.suite.held_out)}
        space = LabelSpace({name: task.num_classes for name, task in tasks.items()})
        metrics = {name: TaskMetric.of(task) for name, task in tasks.items()}

        def predict_in_precision(inputs: Inputs, task: str) -> Any:
            with self._autocast():
                return predict(inputs, task)

        return evaluate(predict_in_precision, loaders, space, self.device, metrics)

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self._mixed is None else torch.autocast(self.device.type, self._mixed)

    def shared(
        self, weights: Mapping[str, Tensor], heads: Mapping[str, nn.Module], loaders: Mapping[str, Any]
    ) -> dict[str, float]:
        """Task → score of one backbone with each task's own head.

        Args:
            weights: the backbone's weights.
            heads: task → head.
            loaders: task → loader; these tasks are evaluated.
        """
        backbone = self.files.backbone(weights).eval().to(self.device)
        heads = {task: head.eval().to(self.device) for task, head in heads.items()}
        return self._evaluate(lambda inputs, task: heads[task](backbone(inputs)), loaders)

    @property
    def has_own_statistics(self) -> bool:
        """Whether the backbone has batch norm whose statistics are measured again after a merge."""
        return bool(self.files.settings.merge.batch_norm_batches and batch_norms(self.files.tuner.backbone))

    def with_own_statistics(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measure the batch norm statistics of merged weights on training data of all tasks.

        Args:
            weights: weights of the backbone.

        Returns:
            The weights with the measured statistics; the same weights if the backbone has no batch norm.
        """
        if not self.has_own_statistics:
            return weights
        batches = self.files.settings.merge.batch_norm_batches
        backbone = self.files.backbone(weights).to(self.device)
        mixture = self.suite.mixture(batch_size=self.suite.batch_size)
        mixture.setup()
        with isolate_rng(include_cuda=False):  # the same augmentations each time; other draws stay as they are
            torch.manual_seed(self.files.seed)
            measured = reestimate_batch_norm(backbone.model, mixture.train_dataloader(), self.device, batches)
        stored = {name: round_to(tensor, weights[name].dtype, name, IN_MEMORY) for name, tensor in measured.items()}
        return {**weights, **{name: tensor.to(weights[name].device) for name, tensor in stored.items()}}

    def individual(self, loaders: Mapping[str, Any]) -> dict[str, float]:
        """Task → score of its own fine-tuned model."""
        scores: dict[str, float] = {}
        heads = self.files.heads(shared=False)
        for task in self.files.suite.names:  # one model in memory at a time
            scores |= self.shared(self.files.finetuned(task), heads, {task: loaders[task]})
        return scores

    def free(
        self, model: FreeModel, loaders: Mapping[str, Any], told: Literal["task", "head", "nothing"]
    ) -> dict[str, float]:
        """Task → score of a FREE model.

        Args:
            model: the model.
            loaders: task → loader.
            told: what the model is told of each sample: its task, only the head to use, or nothing.
        """
        model = model.eval().to(self.device)
        return self._evaluate(
            lambda inputs, task: model(inputs) if told == "nothing" else model(inputs, **{told: task}), loaders
        )

    def routing(self, model: FreeModel, loaders: Mapping[str, Any]) -> Routing:
        """Router confusion matrix of a FREE model, with the number of abstentions for each task."""
        with self._autocast():
            return evaluate_routing(model.eval().to(self.device), loaders, self.device)
