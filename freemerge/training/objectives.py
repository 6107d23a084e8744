"""The loss and the metrics of each kind of task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric

from freemerge.data import Kind, Task, TaskMetric
from freemerge.inputs import IGNORED
from freemerge.training.probe import fit_probe, fit_regression_probe


@dataclass(frozen=True)
class Objective:
    """A task's loss and metric.

    | kind | outputs | labels | loss |
    |---|---|---|---|
    | classification | (B, C) | int64 (B,) | cross-entropy |
    | regression | (B, 1) | float32 (B,) | squared error |
    | seq2seq | (B, L, V) | int64 (B, L), −100 is ignored | cross-entropy |
    | causal_lm | (B, L, V) | int64 (B, L), the input tokens, −100 is ignored | cross-entropy of the next token |

    Exact match, computed from logits, tests whether every token of the target is the most likely one given the target's
    preceding tokens, that is, whether greedy decoding would generate the target.

    Args:
        kind: kind of task.
        num_outputs: number of classes C; 1 for regression.
        metric: the task's metric.
        label_smoothing: label smoothing of the cross-entropy.
    """

    kind: Kind
    num_outputs: int
    metric: TaskMetric
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, task: Task | int, label_smoothing: float = 0.0) -> Objective:
        """Make the objective of a task.

        Args:
            task: the task, or the number of classes of a classification.
            label_smoothing: label smoothing of the cross-entropy.

        Returns:
            The objective.
        """
        if isinstance(task, int):
            return cls("classification", task, TaskMetric(), label_smoothing)
        return cls(task.kind, task.num_outputs, TaskMetric.of(task), label_smoothing)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch over its samples, or over its tokens with a label.

        Args:
            outputs: see the class's table.
            labels: see the class's table.

        Returns:
            float32 scalar.
        """
        outputs, labels = self._align(outputs, labels)
        if self.kind == "regression":
            return F.mse_loss(outputs, labels)
        flat = outputs.flatten(0, -2)  # (B, C), or (B · L, V)
        return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, label_smoothing=self.label_smoothing)

    def fit_probe(self, features: Tensor, labels: Tensor) -> nn.Linear:
        """Fit a linear head on frozen features.

        Args:
            features: (N, F) float.
            labels: (N,) int64 classes, or float32 numbers.

        Returns:
            A linear layer F → num_outputs.
        """
        if self.kind == "regression":
            return fit_regression_probe(features, labels)
        return fit_probe(features, labels, self.num_outputs)

    def make_metrics(self) -> nn.ModuleDict:
        """Make metrics in their initial state.

        Returns:
            The task's metric under its label, and `loss`, the mean loss without label smoothing.
        """
        return nn.ModuleDict({self.metric.label: self.metric.build(self.num_outputs), "loss": MeanMetric()})

    def update(self, metrics: nn.ModuleDict, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch to metrics.

        Args:
            metrics: the result of `make_metrics`.
            outputs: see the class's table.
            labels: see the class's table.
        """
        _metric(metrics, self.metric.label).update(*self.metric.read(outputs, labels))
        outputs, labels = self._align(outputs, labels)
        if self.kind == "regression":
            losses = F.mse_loss(outputs, labels, reduction="none")
        else:
            flat = labels.flatten()
            losses = F.cross_entropy(outputs.flatten(0, -2), flat, ignore_index=IGNORED, reduction="none")
            losses = losses[flat != IGNORED]
        _metric(metrics, "loss").update(losses)

    def _align(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs in float32 and labels of matching shapes; a causal model's logits are shifted by one."""
        outputs = outputs.float()
        if self.kind == "regression":
            return outputs.squeeze(1), labels.float()
        return (outputs[:, :-1], labels[:, 1:]) if self.kind == "causal_lm" else (outputs, labels)


def _metric(metrics: nn.ModuleDict, name: str) -> Metric:
    metric = metrics[name]
    assert isinstance(metric, Metric)  # see `Objective.make_metrics`
    return metric
