"""MultiTaskEvaluator: evaluates one finished model with Lightning's `validate`, `test` and `predict`."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor

from freemerge.data import TaskMetric
from freemerge.evaluation.metrics import LabelSpace, MultiTaskMetrics
from freemerge.evaluation.report import mean_score
from freemerge.inputs import IGNORED, Inputs, named, select
from freemerge.models import FreeAnswers, FreeModel, FreeOutput, LanguageBackbone

_LONGEST = 128  # tokens of a predicted answer


class MultiTaskEvaluator(L.LightningModule):
    """Evaluates a FreeModel on a suite: each dataloader has the data of one task, in the suite's order.

    Args:
        model: the model. It routes each sample; a model without a router is given each sample's task.
        tasks: the task of each dataloader, in order.
        oracle: give the true task to the model instead of letting it route.
        metrics: task name → metric; tasks without an entry use accuracy.

    Attributes:
        results: task name → value of its metric in the latest evaluation.

    Raises:
        ValueError: if the model lacks one of the tasks.
    """

    def __init__(
        self,
        model: FreeModel,
        tasks: tuple[str, ...],
        oracle: bool = False,
        metrics: Mapping[str, TaskMetric] | None = None,
    ) -> None:
        super().__init__()
        unknown = [task for task in tasks if task not in model.tasks]
        if unknown:
            raise ValueError(f"the model has no task {', '.join(unknown)}; its tasks: {', '.join(model.tasks)}")
        self.model = model
        self.tasks = tasks
        self.oracle = oracle or model.router is None
        kinds = {task: metric.kind for task, metric in (metrics or {}).items()}
        self.label_space = LabelSpace(
            {
                task: model.num_outputs(task) if kinds.get(task, "classification") == "classification" else 0
                for task in model.tasks
            }
        )
        self.metrics = MultiTaskMetrics(self.label_space, metrics)
        self.results: dict[str, float] = {}

    def forward(self, inputs: Inputs, task: str | None = None) -> FreeOutput:
        """Run the model on a batch.

        Args:
            inputs: a batch.
            task: the task of all samples; None routes each sample.

        Returns:
            The model's output.
        """
        return self.model(inputs, task=task)

    def _step(self, batch: tuple[Inputs, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        inputs, labels = batch
        task = self.tasks[dataloader_idx]
        keep = self._own_samples(batch_idx, len(labels), dataloader_idx)
        output = self.model(select(inputs, slice(keep)), task=task if self.oracle else None)
        self.metrics.update(task, output, labels[:keep])

    def _own_samples(self, batch_idx: int, size: int, dataloader_idx: int) -> int:
        """How many leading samples of this batch are not repetitions added by the distributed sampler.

        Without shuffling, the sampler gives rank r the samples r + world · position, and repeats some at the end.
        """
        world = self.trainer.world_size
        if world == 1:
            return size
        loaders = self.trainer.val_dataloaders if self.trainer.validating else self.trainer.test_dataloaders
        assert loaders is not None  # Lightning sets them before it runs a step
        loader = list(loaders.values())[dataloader_idx]
        total, first = len(loader.dataset), self.trainer.global_rank + world * batch_idx * loader.batch_size
        return max(0, min(size, -(-(total - first) // world)))

    def validation_step(self, batch: tuple[Inputs, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of its task.

        Args:
            batch: (inputs, labels).
            batch_idx: index of the batch in its loader.
            dataloader_idx: index of the task.
        """
        self._step(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: tuple[Inputs, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of its task.

        Args:
            batch: (inputs, labels).
            batch_idx: index of the batch in its loader.
            dataloader_idx: index of the task.
        """
        self._step(batch, batch_idx, dataloader_idx)

    def predict_step(
        self, batch: tuple[Inputs, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> FreeOutput | FreeAnswers:
        """Predict a batch; each sample is routed unless `oracle` is set.

        Args:
            batch: (inputs, labels). Of the labels, only a language model's are used, to find where its answer starts.
            batch_idx: ignored.
            dataloader_idx: index of the task.

        Returns:
            The model's output, or the answers of a language model.
        """
        inputs, labels = batch
        task = self.tasks[dataloader_idx] if self.oracle else None
        if not isinstance(backbone := self.model.backbone, LanguageBackbone):
            return self.model(inputs, task=task)
        given = named(inputs)
        if backbone.kind == "causal_lm":
            given = {"prompt_mask": ~_answers(inputs, labels), **given}
        return self.model.generate(given, task=task, max_new_tokens=_LONGEST, do_sample=False, num_beams=1)

    def _log_results(self, split: str) -> None:
        computed = self.metrics.compute()
        self.results = {task: computed[task] for task in self.tasks}
        self.metrics.reset()
        named = self.metrics.named
        values = {f"{split}/{task}/{named[task].label}": value for task, value in self.results.items()}
        self.log_dict(values, sync_dist=False)
        mean = "mean_acc" if all(named[task].name == "accuracy" for task in self.tasks) else "mean_score"
        self.log(f"{split}/{mean}", mean_score(self.results, {task: named[task].name for task in self.tasks}))

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics, and log `val/<task>/<metric>` and their mean."""
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        """Compute the metrics, and log `test/<task>/<metric>` and their mean."""
        self._log_results("test")


def _answers(inputs: Inputs, labels: Tensor) -> Tensor:
    """The tokens of a causal model's inputs that are the answer: bool (B, L).

    They are the tokens with a loss; if all tokens of a text have one, it has no answer.
    """
    labelled = labels != IGNORED
    given = named(inputs)
    padding = ~given["attention_mask"].bool() if "attention_mask" in given else torch.zeros_like(labelled)
    if padding.shape != labelled.shape:  # the labels belong to a decoder
        return labelled
    return labelled & ~(labelled | padding).all(dim=1, keepdim=True)
