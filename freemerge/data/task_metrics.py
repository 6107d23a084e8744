"""Metrics of tasks: torchmetrics' metrics by name, and the conversion of a model's output to a metric's input.

A metric is written `name` or `kind:name`, for instance `accuracy`, `recall@5`, `seq2seq:perplexity`. The kind of task
(see `freemerge.data.Task`) determines the form of outputs and labels:

- classification: logits (B, C), labels (B,). Metrics: accuracy, f1_macro (over the classes that occur), matthews,
  recall@k (the fraction of samples whose class is among the k highest logits).
- regression: predictions (B,) or (B, 1), labels (B,). Metrics: pearson, spearman.
- seq2seq: logits (B, L, V), generated tokens (B, L) or texts; labels of the same length, −100 at ignored positions.
- causal_lm: logits (B, L, V); labels (B, L) are the input tokens: the logits at position i predict label i + 1.
  Metrics of both: perplexity (from logits), exact_match (the fraction of samples with every token, or the text, right).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from freemerge.data.tasks import METRICS, Task, check_kind
from freemerge.inputs import IGNORED


@dataclass(frozen=True)
class TaskMetric:
    """The metric of a task.

    Args:
        kind: kind of the task.
        name: name of the metric.

    Raises:
        ValueError: if there is no such kind, or the metric does not suit it.
    """

    kind: str = "classification"
    name: str = "accuracy"

    def __post_init__(self) -> None:
        check_kind("metrics", self.kind, self.name)

    @classmethod
    def of(cls, task: Task) -> TaskMetric:
        """The metric that a task is configured with.

        Args:
            task: the task.

        Returns:
            `task.metric`, or the default of its kind.
        """
        return cls(task.kind, task.metric or METRICS[task.kind][0])

    @classmethod
    def parse(cls, text: str) -> TaskMetric:
        """Parse `name` or `kind:name`.

        Args:
            text: a name without a kind belongs to the first kind that has it as its default, or else to the first kind
                that has it at all.

        Returns:
            The metric.

        Raises:
            ValueError: if there is no such kind or metric.
        """
        kind, _, name = text.rpartition(":")
        if kind:
            return cls(kind, name)
        wanted = "recall@k" if name.startswith("recall@") else name
        by_default = [kind for kind, names in METRICS.items() if names[0] == wanted]
        having = [kind for kind, names in METRICS.items() if wanted in names]
        if not having:
            known = ", ".join(dict.fromkeys(name for names in METRICS.values() for name in names))
            raise ValueError(f"there is no metric '{text}'; choose one of {known}")
        return cls((by_default or having)[0], name)

    @property
    def label(self) -> str:
        """The name that the metric is logged under."""
        return "acc" if self.name == "accuracy" else self.name

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value is better."""
        return self.name != "perplexity"

    @property
    def compares_classes(self) -> bool:
        """Whether the metric compares predicted classes with true classes, one per sample."""
        return self.name in ("accuracy", "f1_macro", "matthews")

    def build(self, num_classes: int | None = None) -> Metric:
        """Build the torchmetrics metric; see `metric_for`.

        Args:
            num_classes: C, for classification.

        Returns:
            The metric in its initial state.
        """
        return metric_for(self.name, num_classes)

    def read(self, output: Any, labels: Any) -> tuple[Any, Any]:
        """Convert a model's output and the labels of a batch to the arguments of the metric's `update`.

        Args:
            output: logits, predictions, tokens or texts; see the docstring of this module for shapes.
            labels: the batch's labels, as this kind of task has them.

        Returns:
            (predictions or scores, labels) for `update`.

        Raises:
            ValueError: if the output does not fit the metric.
        """
        if not isinstance(output, Tensor):
            return list(output), list(labels)
        if self.kind == "regression":
            if output.numel() != labels.numel():
                raise ValueError(f"{self.name} needs one number per sample, got shape {list(output.shape)}")
            return output.reshape(-1).double(), labels.reshape(-1).double()
        if self.kind == "causal_lm" and output.ndim == 3:
            output, labels = output[:, :-1], labels[:, 1:]
        if self.name == "perplexity":
            if output.ndim != 3:
                raise ValueError(f"perplexity needs logits (B, L, V), got shape {list(output.shape)}")
            return output.float(), labels
        if self.name == "exact_match":
            return (output.argmax(dim=2) if output.ndim == 3 else output), labels
        return (output if self.name.startswith("recall@") else output.argmax(dim=1)), labels


def metric_for(name: str, num_classes: int | None = None) -> Metric:
    """Build a torchmetrics metric by name. It is exact over all ranks, because its states are sums or all values.

    Args:
        name: accuracy, f1_macro, matthews, recall@k, pearson, spearman, exact_match or perplexity.
        num_classes: C, for metrics of classification.

    Returns:
        A metric of classes (B,) and classes (B,), or of scores (B, C) and classes (B,) for recall@k; see the docstring
        of this module for the others. Tokens labelled −100 are ignored.

    Raises:
        ValueError: if there is no such metric, or it needs the number of classes.
    """
    # Each import waits until it is needed: all of torchmetrics' image and text metrics take long to import.
    from torchmetrics import regression

    metric = TaskMetric.parse(name)
    name = metric.name
    if metric.kind == "classification":
        if not num_classes:
            raise ValueError(f"{name} needs the number of classes")
        return _compare_classes(name, num_classes)
    if name == "pearson":
        return regression.PearsonCorrCoef().set_dtype(torch.float64)
    if name == "spearman":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will save all targets")  # exact ranks need all targets
            return regression.SpearmanCorrCoef().set_dtype(torch.float64)
    if name == "exact_match":
        return ExactMatch()
    from torchmetrics.text import Perplexity

    return Perplexity(ignore_index=IGNORED).set_dtype(torch.float64)


def _compare_classes(name: str, num_classes: int) -> Metric:
    from torchmetrics import classification

    if name == "accuracy":
        return classification.MulticlassAccuracy(num_classes, average="micro")
    if name == "f1_macro":
        return classification.MulticlassF1Score(num_classes, average="macro")
    if name == "matthews":
        return classification.MulticlassMatthewsCorrCoef(num_classes)
    top_k = min(int(name.removeprefix("recall@")), num_classes)
    return classification.MulticlassRecall(num_classes, top_k=top_k, average="micro")


class ExactMatch(Metric):
    """The fraction of samples in which every token is right, or whose text is right up to spaces at its ends.

    torchmetrics' `ExactMatch` compares classes only, not texts.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor | Sequence[str], wanted: Tensor | Sequence[str]) -> None:
        """Add a batch.

        Args:
            predicted: tokens (B, L), or B texts.
            wanted: tokens (B, L), −100 at positions that are ignored, or B texts.

        Raises:
            ValueError: if the shapes differ, or one holds tokens and the other texts.
        """
        if isinstance(predicted, Tensor) and isinstance(wanted, Tensor):
            if predicted.shape != wanted.shape:
                raise ValueError(
                    f"exact_match needs tokens of one shape, got {list(predicted.shape)} and {list(wanted.shape)}; pad "
                    "both to the same length, or decode them and compare texts"
                )
            self.right += ((predicted == wanted) | (wanted == IGNORED)).all(dim=1).sum()
        elif isinstance(predicted, Tensor) or isinstance(wanted, Tensor):
            raise ValueError("exact_match compares tokens with tokens or texts with texts, got one of each")
        else:
            self.right += sum(a.strip() == b.strip() for a, b in zip(predicted, wanted, strict=True))
        self.total += len(wanted)

    def compute(self) -> Tensor:
        """The fraction over all batches so far.

        Returns:
            float32 scalar in [0, 1].
        """
        return self.right / self.total
