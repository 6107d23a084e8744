"""TaskEvaluation evaluates a module on several tasks, for MultiTaskEvaluation and MergePreview."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from freemerge.data import TaskSuite
from freemerge.inputs import select, to_device
from freemerge_callbacks._adapters import without_adapters
from freemerge_callbacks._batches import BatchFormat, Pairs
from freemerge_callbacks._loading import Source, as_in_validation, combined, is_data_module, loaders_of, open_source
from freemerge_callbacks._metrics import MEAN_IOU, check_value, label_of, mean_iou, open_metrics, shape_of
from freemerge_callbacks._predicting import (
    Features,
    Predict,
    Reweighted,
    check_loaders,
    evaluating,
    linear_head,
    predictor,
)
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._weights import get_part, refuse_placeholders


class TaskEvaluation:
    """Evaluates a module on several tasks.

    Args:
        who: name of the callback, for error messages.
        loaders: task → loader or data module; or one suite or data module for all tasks.
        heads: task → module or file; None if the module's forward returns logits.
        metrics: task → metric; tasks left out use the suite's metric, or accuracy.
        backbone: dotted path of the backbone.
        head: dotted path of the module's own head.
        split: the split to evaluate, "val" or "test".
        batch_norm: task → loader of training data, or a number of batches of a suite's training data, on which
            batch-norm statistics are measured.
        format: where batches keep their inputs and labels.
        features: how to read the features from the backbone's output; see `find_features`.
    """

    def __init__(
        self,
        who: str,
        loaders: L.LightningDataModule | Mapping[str, Iterable | L.LightningDataModule],
        heads: Mapping[str, nn.Module | str] | None,
        metrics: Mapping[str, str | Metric] | None,
        backbone: str,
        head: str,
        split: str,
        batch_norm: Mapping[str, Iterable] | int | None,
        format: BatchFormat | None = None,
        features: Features = None,
    ) -> None:
        self.who = who
        self.format = format or BatchFormat(who)
        self.features = features
        self.loaders = loaders
        self.heads = heads
        self.metrics = metrics
        self.backbone = backbone
        self.head = head
        self.split = split
        self.batch_norm = batch_norm
        self._sources: dict[str, Source] = {}
        self._read: dict[str, nn.Module] = {}
        self._metrics: dict[str, Any] = {}  # TaskMetric, Metric, or MEAN_IOU until the number of classes is known
        self._classes: dict[str, int] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in order; empty before `open`."""
        return tuple(self._sources)

    @property
    def own_task(self) -> str | None:
        """The task that uses the module's own head because `heads` leaves it out; None if there is none."""
        missing = [task for task in self._sources if self.heads is not None and task not in self.heads]
        return missing[0] if missing else None

    def open(self, trainer: L.Trainer) -> None:
        """Build the loaders, read the heads' files and look up the metrics.

        Args:
            trainer: the Trainer.

        Raises:
            ValueError: if a loader, head or metric is missing or invalid, or the evaluation would be inexact.
        """
        if self.split not in ("val", "test"):
            raise ValueError(f"{self.who}: `split` must be 'val' or 'test', got {self.split!r}")
        if isinstance(self.batch_norm, int) and not (isinstance(self.loaders, TaskSuite) and self.batch_norm > 0):
            raise ValueError(
                f"{self.who}: `batch_norm` must be a dict of loaders or, if `loaders` is a suite, a positive number "
                f"of batches; got {self.batch_norm}"
            )
        refuse_placeholders(trainer.strategy, self.who)
        self._sources = self._open_sources(trainer)
        check_loaders(trainer, {task: source.loader for task, source in self._sources.items()}, self.who)
        self._check_heads()
        self._metrics = open_metrics(self.metrics, self._sources, self.loaders, self.who)
        self._classes = {}

    def check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Check that the module has the named parts and can be evaluated on a batch of each task.

        Args:
            trainer: the Trainer.
            module: the module.

        Raises:
            ValueError: if the evaluation of a task fails; names the task.
        """
        get_part(module, self.backbone, self.who)
        heads, device = self._heads_of(module), trainer.strategy.root_device
        with evaluating([module, *(heads or {}).values()], device), self._as_in_validation(trainer):
            predict = self._binary_as_two(predictor(trainer, module, self.backbone, heads, {}, self.features))
            for task, pairs in self._pairs(trainer).items():
                self._try(task, pairs, predict, device)

    def _try(self, task: str, pairs: Pairs, predict: Predict, device: torch.device) -> None:
        """Evaluate one batch of a task, and detect its number of classes."""
        from freemerge.evaluation import LabelSpace, MultiTaskMetrics

        batch = next(iter(pairs), None)
        if batch is None:
            raise ValueError(f"{self.who}: the loader of '{task}' must yield pairs (inputs, labels), but it is empty")
        batch = to_device(batch, device)
        one = self._output(predict, _first_sample(batch), task)  # one sample, so that messages show its shapes
        if isinstance(self._metrics[task], str):
            self._metrics[task] = mean_iou(one, self.who, task)
        kind = self._kind(task)
        if kind == "classification" and not (isinstance(one, Tensor) and one.ndim == 2):
            advice = f"pass metrics={{'{task}': 'mean_iou'}}" if getattr(one, "ndim", 0) > 2 else ""
            raise ValueError(
                f"{self.who}: expected logits (B, C) for '{task}', got {shape_of(one)}; "
                f"{advice or 'does it need heads={...}?'}"
            )
        if kind in ("classification", MEAN_IOU):
            self._classes[task] = pairs.classes = max(one.shape[1], 2)
            pairs.check_classes(batch[1])
        output = self._output(predict, batch, task)
        try:
            space = LabelSpace({task: self._classes.get(task, 0)})
            metrics = MultiTaskMetrics(space, {task: self._metrics[task]}).to(device)
            metrics.update(task, output, batch[1])
        except Exception as error:
            raise ValueError(
                f"{self.who}: the metric of '{task}' fails on a batch: {' '.join(str(error).split())}"
            ) from error
        check_value(metrics.per_task[task], self.who, task)

    def _output(self, predict: Predict, batch: tuple[Any, Any], task: str) -> Any:
        try:
            return predict(batch[0], task)
        except Exception as error:
            raise ValueError(
                f"{self.who}: the model fails on a batch of '{task}': {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _pairs(self, trainer: L.Trainer) -> dict[str, Pairs]:
        return {
            task: Pairs(source.batches(trainer), task, self.format, self._kind(task), self._classes.get(task, 0))
            for task, source in self._sources.items()
        }

    def _as_in_validation(self, trainer: L.Trainer) -> AbstractContextManager[None]:
        extra = self.batch_norm.values() if isinstance(self.batch_norm, Mapping) else ()
        loaders = [*(source.loader for source in self._sources.values()), *extra]
        return as_in_validation(trainer, self.split, loaders)

    def _kind(self, task: str) -> str | None:
        """The kind of a task; None if its metric takes outputs and labels unchanged."""
        metric = self._metrics[task]
        return MEAN_IOU if isinstance(metric, str) or label_of(metric) == MEAN_IOU else getattr(metric, "kind", None)

    def _binary_as_two(self, predict: Predict) -> Predict:
        """Turn a classification with one logit z, (B, 1), into one of two classes with the logits 0 and z, (B, 2)."""

        def predict_classes(inputs: Any, task: str) -> Any:
            output = predict(inputs, task)
            one = isinstance(output, Tensor) and output.shape[1:] == (1,) and self._kind(task) == "classification"
            return torch.cat([torch.zeros_like(output), output], dim=1) if one else output

        return predict_classes

    def run(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        weights: Mapping[str, Tensor],
        tasks: Iterable[str] | None = None,
        merged: bool = True,
    ) -> dict[str, float]:
        """Evaluate the module on each task. Every rank must call this, and every rank gets the result.

        Args:
            trainer: the Trainer.
            module: the module.
            weights: tensors to use instead of the module's own, under the module's names, on any device.
            tasks: the tasks to evaluate; None for all.
            merged: whether `weights` come from a merge; for these the batch-norm statistics are measured again if
                `batch_norm` is given.

        Returns:
            Task → value of its metric.
        """
        from freemerge.evaluation import LabelSpace, evaluate

        heads, device = self._heads_of(module), trainer.strategy.root_device
        # The given weights include the adapters already.
        plain = without_adapters(module) if weights else nullcontext()
        with evaluating([module, *(heads or {}).values()], device), plain, self._as_in_validation(trainer):
            weights = {name: tensor.to(device) for name, tensor in weights.items()}
            if weights and merged and self.batch_norm is not None:
                weights |= self._measured(trainer, module, weights)
            predict = self._binary_as_two(predictor(trainer, module, self.backbone, heads, weights, self.features))
            pairs = self._pairs(trainer)
            chosen = {task: pairs[task] for task in tasks or pairs}
            space = LabelSpace({task: self._classes.get(task, 0) for task in pairs})
            return evaluate(predict, chosen, space, device, self._metrics)

    def named(self, results: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Results under the names that they are logged with.

        Args:
            results: task → value.
            prefix: prefix of the names.

        Returns:
            `<prefix>/<task>/<metric>` for each task, and their mean, `<prefix>/mean_acc`, or `<prefix>/mean_score` if
            not all metrics are accuracies. There is no mean if lower is better for any task.
        """
        found = {f"{prefix}/{task}/{label_of(self._metrics[task])}": value for task, value in results.items()}
        if all(self.higher_is_better(task) for task in results):
            found[f"{prefix}/mean_{self.mean_label}"] = sum(results.values()) / len(results)
        return found

    @property
    def mean_label(self) -> str:
        """The name of the mean over tasks: "acc" if all metrics are accuracies, else "score"."""
        return "acc" if set(map(label_of, self._metrics.values())) == {"acc"} else "score"

    def higher_is_better(self, task: str) -> bool:
        """Whether higher values of a task's metric are better.

        Args:
            task: the task.

        Returns:
            False for metrics such as perplexity.
        """
        return self._metrics[task].higher_is_better is not False

    def _measured(self, trainer: L.Trainer, module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Measure the backbone's batch-norm statistics with these weights; returned under the module's names."""
        from freemerge.models import reestimate_batch_norm

        streams: list[Iterable[Any]]
        if isinstance(self.batch_norm, int):
            assert isinstance(self.loaders, TaskSuite)  # see `open`
            loaders = {name: self.loaders.for_task(name).train_dataloader() for name in self.loaders.names}
            streams = [islice(loader, self.batch_norm) for loader in loaders.values()]
        else:
            streams = [
                ((self.format.inputs_of(batch, task),) for batch in Source(loader).batches(trainer))
                for task, loader in (self.batch_norm or {}).items()
            ]
        part = "" if self.heads is None else self.backbone
        wrapped = Reweighted(trainer, module, self.backbone, part, weights)
        return wrapped.named(reestimate_batch_norm(wrapped, chain(*streams), trainer.strategy.root_device))

    def _open_sources(self, trainer: L.Trainer) -> dict[str, Source]:
        if isinstance(self.loaders, TaskSuite):
            on_rank_zero(trainer, self.loaders.prepare_data)
            parts = {name: self.loaders.for_task(name) for name in self.loaders.names}
            return {name: Source(getattr(part, f"{self.split}_dataloader")(), part) for name, part in parts.items()}
        whole = self.loaders if is_data_module(self.loaders) else None
        loaders = combined(self.loaders) if whole is None else loaders_of(trainer, whole, self.split)
        if not isinstance(loaders, Mapping):
            found = "" if whole is None else f"{type(whole).__name__}.{self.split}_dataloader() must return "
            raise ValueError(
                f"{self.who}: {found or '`loaders` must be '}a dict, task → loader, but "
                f"{'is' if whole is None else 'returns'} a {type(loaders).__name__}; or pass "
                "loaders={'task': data_module}"
            )
        sources = {task: open_source(trainer, loader, self.split, self.who, task) for task, loader in loaders.items()}
        return sources if whole is None else {task: replace(source, data=whole) for task, source in sources.items()}

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        if unknown := [task for task in self.heads if task not in self._sources]:
            raise ValueError(f"{self.who}: `heads` names '{unknown[0]}', a task without a loader")
        missing = [task for task in self._sources if task not in self.heads]
        if len(missing) > 1:
            raise ValueError(f"{self.who}: no heads for {', '.join(missing)}; only one task may use the module's own")
        files = {task: head for task, head in self.heads.items() if not isinstance(head, nn.Module)}
        self._read = {task: linear_head(head, self.who) for task, head in files.items()}

    def _heads_of(self, module: nn.Module) -> dict[str, nn.Module] | None:
        if self.heads is None:
            return None
        known = {task: head for task, head in self.heads.items() if isinstance(head, nn.Module)} | self._read
        return {
            task: known[task] if task in known else get_part(module, self.head, self.who, "head")
            for task in self._sources
        }


def _first_sample(batch: tuple[Any, Any]) -> tuple[Any, Any]:
    try:
        return select(batch, slice(1))
    except (IndexError, KeyError, TypeError):  # part of the batch has no sample dimension
        return batch
