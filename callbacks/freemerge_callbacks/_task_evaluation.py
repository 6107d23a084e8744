"""What MultiTaskEvaluation and MergePreview have in common: loaders, heads, metrics, and one number for each task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING

import lightning as L
from torch import Tensor, nn
from torchmetrics import Metric

from freemerge.data import TaskSuite
from freemerge_callbacks._predicting import (
    Pairs,
    Reweighted,
    check_loaders,
    count_classes,
    evaluating,
    linear_head,
    predictor,
)
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._weights import get_part, refuse_placeholders

if TYPE_CHECKING:  # slow to import, and wanted when the first fit begins
    from freemerge.evaluation import TaskMetric


class TaskEvaluation:
    """Evaluates a module on several tasks.

    Args:
        who: what messages begin with.
        loaders: task → loader of (inputs, labels), or a suite.
        heads: task → module or file; None where the module's forward gives logits.
        metrics: task → metric; accuracy, or the suite's own, for those left out.
        backbone: dotted path of the backbone.
        head: dotted path of the module's own head.
        split: which part of a suite's data.
        batch_norm: task → loader, or how many batches of a suite's training data, to measure batch norm on.
    """

    def __init__(
        self,
        who: str,
        loaders: TaskSuite | Mapping[str, Iterable],
        heads: Mapping[str, nn.Module | str] | None,
        metrics: Mapping[str, str | Metric] | None,
        backbone: str,
        head: str,
        split: str,
        batch_norm: Mapping[str, Iterable] | int | None,
    ) -> None:
        self.who = who
        self.loaders = loaders
        self.heads = heads
        self.metrics = metrics
        self.backbone = backbone
        self.head = head
        self.split = split
        self.batch_norm = batch_norm
        self._loaders: dict[str, Iterable] = {}
        self._read: dict[str, nn.Module] = {}
        self._metrics: dict[str, TaskMetric | Metric] = {}
        self._classes: dict[str, int] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in order; once opened."""
        return tuple(self._loaders)

    @property
    def own_task(self) -> str | None:
        """The task that `heads` leaves to the module's own head, if there is one; once opened."""
        missing = [task for task in self._loaders if self.heads is not None and task not in self.heads]
        return missing[0] if missing else None

    def open(self, trainer: L.Trainer) -> None:
        """Build the loaders, read the heads' files and look up the metrics.

        Raises:
            ValueError: something is missing or would make the result inexact.
        """
        if self.split not in ("val", "test"):
            raise ValueError(f"{self.who}: `split` must be 'val' or 'test', got {self.split!r}")
        if isinstance(self.batch_norm, int) and not (isinstance(self.loaders, TaskSuite) and self.batch_norm > 0):
            raise ValueError(
                f"{self.who}: `batch_norm` must be a dict of loaders or, where `loaders` is a suite, a positive number "
                f"of batches; got {self.batch_norm}"
            )
        refuse_placeholders(trainer.strategy, self.who)
        self._loaders = self._open_loaders(trainer)
        check_loaders(trainer, self._loaders, self.who)
        self._check_heads()
        self._metrics = self._open_metrics()
        self._classes = {}

    def check(self, module: nn.Module) -> None:
        """Require that the module has the parts that were named."""
        get_part(module, self.backbone, self.who)
        self._heads_of(module)

    def run(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        weights: Mapping[str, Tensor],
        tasks: Iterable[str] | None = None,
        merged: bool = True,
    ) -> dict[str, float]:
        """Task → value of its metric. Every rank must call this, and all get the result.

        Args:
            trainer: the Trainer.
            module: the module.
            weights: tensors to use instead of the module's own, under the module's names, on any device.
            tasks: which; None for all.
            merged: whether the weights, where there are any, are those of a merge, for which batch norm is measured
                anew if that was asked for.
        """
        from freemerge.evaluation import LabelSpace, TaskMetric, evaluate

        heads, device = self._heads_of(module), trainer.strategy.root_device
        with evaluating([module, *(heads or {}).values()], device):
            weights = {name: tensor.to(device) for name, tensor in weights.items()}
            if weights and merged and self.batch_norm is not None:
                weights |= self._measured(trainer, module, weights)
            predict = predictor(trainer, module, self.backbone, heads, weights)
            pairs = {task: Pairs(loader, task, self._metrics[task], self.who) for task, loader in self._loaders.items()}
            if not self._classes:
                named = {task: metric for task, metric in self._metrics.items() if isinstance(metric, TaskMetric)}
                classes = {task: pairs[task] for task, metric in named.items() if metric.kind == "classification"}
                self._classes = dict.fromkeys(pairs, 0) | count_classes(predict, classes, device, self.who)
            chosen = {task: pairs[task] for task in tasks or pairs}
            return evaluate(predict, chosen, LabelSpace(self._classes), device, self._metrics)

    def named(self, results: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Names under which results are logged: `<prefix>/<task>/<metric>` for each task, and their mean.

        The mean is called `<prefix>/mean_acc`, or `<prefix>/mean_score` if not all are accuracies. There is none where
        less is better for one of them.
        """
        found = {f"{prefix}/{task}/{self._label(task)}": value for task, value in results.items()}
        if all(self.higher_is_better(task) for task in results):
            found[f"{prefix}/mean_{self.mean_label}"] = sum(results.values()) / len(results)
        return found

    @property
    def mean_label(self) -> str:
        """What a mean over the tasks is a mean of."""
        return "acc" if {self._label(task) for task in self._metrics} == {"acc"} else "score"

    def higher_is_better(self, task: str) -> bool:
        """Whether more is better in a task's metric."""
        return self._metrics[task].higher_is_better is not False

    def _label(self, task: str) -> str:
        metric = self._metrics[task]
        return getattr(metric, "label", type(metric).__name__)

    def _measured(self, trainer: L.Trainer, module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The statistics of the backbone's batch norms with these weights, under the module's names."""
        from freemerge.models import reestimate_batch_norm

        if isinstance(self.batch_norm, int):
            loaders = {name: self.loaders.for_task(name).train_dataloader() for name in self.loaders.names}
            streams = [islice(loader, self.batch_norm) for loader in loaders.values()]
        else:
            streams = list(self.batch_norm.values())
        part = "" if self.heads is None else self.backbone
        wrapped = Reweighted(trainer, module, self.backbone, part, weights)
        return wrapped.named(reestimate_batch_norm(wrapped, chain(*streams), trainer.strategy.root_device))

    def _open_loaders(self, trainer: L.Trainer) -> dict[str, Iterable]:
        if not isinstance(self.loaders, TaskSuite):
            return dict(self.loaders)
        on_rank_zero(trainer, self.loaders.prepare_data)
        parts = {name: self.loaders.for_task(name) for name in self.loaders.names}
        return {name: getattr(part, f"{self.split}_dataloader")() for name, part in parts.items()}

    def _open_metrics(self) -> dict[str, TaskMetric | Metric]:
        from freemerge.evaluation import TaskMetric

        given = dict(self.metrics or {})
        if unknown := [task for task in given if task not in self._loaders]:
            raise ValueError(f"{self.who}: a metric for '{unknown[0]}', a task without a loader")
        metrics: dict[str, TaskMetric | Metric] = dict.fromkeys(self._loaders, TaskMetric())
        if isinstance(self.loaders, TaskSuite):
            tasks = [self.loaders.task(name) for name in self.loaders.names]
            metrics |= {task.name: TaskMetric.of(task) for task in tasks}
        return metrics | {
            task: TaskMetric.parse(metric) if isinstance(metric, str) else metric for task, metric in given.items()
        }

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        if unknown := [task for task in self.heads if task not in self._loaders]:
            raise ValueError(f"{self.who}: a head for '{unknown[0]}', a task without a loader")
        missing = [task for task in self._loaders if task not in self.heads]
        if len(missing) > 1:
            raise ValueError(f"{self.who}: no heads for {', '.join(missing)}; only one task may use the module's own")
        files = {task: head for task, head in self.heads.items() if not isinstance(head, nn.Module)}
        self._read = {task: linear_head(head, self.who) for task, head in files.items()}

    def _heads_of(self, module: nn.Module) -> dict[str, nn.Module] | None:
        if self.heads is None:
            return None
        known = {**self.heads, **self._read}
        return {
            task: known[task] if task in known else get_part(module, self.head, self.who, "head")
            for task in self._loaders
        }
