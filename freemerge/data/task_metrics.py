"""What a task is judged by: torchmetrics' metrics by name, and how a model's output for a batch is read for each.

A metric is written `name` or `kind:name`, for instance `accuracy`, `recall@5`, `seq2seq:perplexity`. The kind of task
(see `freemerge.data.Task`) tells what outputs and labels are:

- classification: logits (B, C), labels (B,). accuracy, f1_macro (over the classes that occur), matthews, recall@k (the
  share of samples whose class is among the k best).
- regression: predictions (B,) or (B, 1), labels (B,). pearson, spearman.
- seq2seq: logits (B, L, V), or generated tokens (B, L), or texts; labels of the same length, −100 where nothing counts.
- causal_lm: logits (B, L, V), labels the inputs' own tokens (B, L): the logits at one place are for the next label.
  For both: perplexity (from logits), exact_match (the share of samples in which every token, or the text, is right).
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
    """One task's metric.

    Args:
        kind: of the task.
        name: of the metric.

    Raises:
        ValueError: there is no such kind, or the metric does not suit it.
    """

    kind: str = "classification"
    name: str = "accuracy"

    def __post_init__(self) -> None:
        check_kind("metrics", self.kind, self.name)

    @classmethod
    def of(cls, task: Task) -> TaskMetric:
        """What a task says that it is judged by."""
        return cls(task.kind, task.metric or METRICS[task.kind][0])

    @classmethod
    def parse(cls, text: str) -> TaskMetric:
        """`name` or `kind:name`. A name alone stands for the first kind whose default it is, or which has it.

        Raises:
            ValueError: there is no such kind or metric.
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
        """What it is called where it is logged."""
        return "acc" if self.name == "accuracy" else self.name

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better."""
        return self.name != "perplexity"

    @property
    def of_classes(self) -> bool:
        """Whether it compares classes, one per sample."""
        return self.name in ("accuracy", "f1_macro", "matthews")

    def build(self, num_classes: int | None = None) -> Metric:
        """A metric that counts nothing yet; see `metric_for`."""
        return metric_for(self.name, num_classes)

    def read(self, output: Any, labels: Any) -> tuple[Any, Any]:
        """A model's output and the labels of a batch → what the metric's `update` takes.

        Args:
            output: logits, predictions, tokens or texts; see the head of this module.
            labels: of this kind of task.

        Raises:
            ValueError: they do not fit the metric.
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
    """A torchmetrics metric by name, exact over all ranks: its states are sums, or all values.

    Args:
        name: accuracy, f1_macro, matthews, recall@k, pearson, spearman, exact_match or perplexity.
        num_classes: C, for those that compare classes.

    Returns:
        A metric of classes (B,) and classes (B,); for recall@k of scores (B, C) and classes (B,); for the others see
        the head of this module. Tokens labelled −100 do not count.

    Raises:
        ValueError: there is no such metric, or it needs the number of classes.
    """
    # Each from its own place and when it is wanted: all of torchmetrics' texts and images take long to import.
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
            warnings.filterwarnings("ignore", message=".*will save all targets")  # ranks cannot be had for less
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
    """The share of samples that are right in every token, or as a text (spaces at both ends apart)."""

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
            wanted: tokens (B, L), −100 where any is right, or B texts.

        Raises:
            ValueError: the two are not of one shape, or one holds tokens and the other texts.
        """
        if isinstance(predicted, Tensor) and isinstance(wanted, Tensor):
            if predicted.shape != wanted.shape:
                raise ValueError(
                    f"exact_match needs tokens of one shape, got {list(predicted.shape)} and {list(wanted.shape)}; pad "
                    "both to one length, or decode them and compare texts"
                )
            self.right += ((predicted == wanted) | (wanted == IGNORED)).all(dim=1).sum()
        elif isinstance(predicted, Tensor) or isinstance(wanted, Tensor):
            raise ValueError("exact_match compares tokens with tokens or texts with texts, got one of each")
        else:
            self.right += sum(a.strip() == b.strip() for a, b in zip(predicted, wanted, strict=True))
        self.total += len(wanted)

    def compute(self) -> Tensor:
        """The share so far."""
        return self.right / self.total
