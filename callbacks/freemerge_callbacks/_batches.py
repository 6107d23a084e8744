"""Read inputs and labels from the batches of a user's loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Key = str | int
Adapt = Callable[[Any], tuple[Any, Any]]
"""Batch → (inputs, labels)."""

_LABELS = (
    "label",
    "target",
    "targets",
    "mask",
    "y",
    "class",
    "classes",
)  # common names of labels, suggested in messages


@dataclass(frozen=True)
class BatchFormat:
    """Where a batch keeps its inputs and its labels.

    Args:
        who: name of the callback, for error messages.
        inputs: the key of the inputs; or several keys, whose values are passed on as a dict (as a tuple if the keys are
            positions). None: the first entry of a pair, or everything in a dict except the labels.
        labels: the key of the labels. None: the second entry of a pair, or `labels` in a dict.
        adapt: batch → (inputs, labels); replaces the keys.
    """

    who: str
    inputs: Key | Sequence[Key] | None = None
    labels: Key | None = None
    adapt: Adapt | None = None

    def __post_init__(self) -> None:
        if self.adapt is not None and (self.inputs is not None or self.labels is not None):
            raise ValueError(f"{self.who}: pass either adapt, or inputs and labels")

    def read(self, batch: Any, task: str, keeps_labels: bool = False) -> tuple[Any, Any]:
        """Split a batch into inputs and labels.

        Args:
            batch: one batch of a loader.
            task: the task's name, for messages.
            keeps_labels: whether the labels of a dict stay among its inputs if `inputs` is None; the decoder of a
                seq2seq model needs them too.

        Returns:
            (inputs, labels).

        Raises:
            ValueError: if the batch has no such inputs or labels.
        """
        if self.adapt is not None:
            found = self.adapt(batch)
            if not (isinstance(found, (tuple, list)) and len(found) == 2):
                raise ValueError(
                    f"{self.who}: adapt must return (inputs, labels), and returned {_describe(found)} for '{task}'"
                )
            return found[0], found[1]
        if isinstance(batch, Mapping):
            labels_at: Key = "labels" if self.labels is None else self.labels
            labels = self._entry(batch, labels_at, task)
            if self.inputs is None:
                return {key: value for key, value in batch.items() if keeps_labels or key != labels_at}, labels
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            labels = self._entry(batch, 1 if self.labels is None else self.labels, task)
            if self.inputs is None:
                return batch[0], labels
        elif self.inputs is not None and isinstance(self.labels, str):  # an object with attributes
            labels = self._entry(batch, self.labels, task)
        else:
            raise ValueError(
                f"{self.who}: the loader of '{task}' must yield pairs (inputs, labels), or dicts with `labels`, and "
                f"yields {_describe(batch)}; adapt=... turns a batch into (inputs, labels)"
            )
        return self._named_inputs(batch, task), labels

    def inputs_of(self, batch: Any, task: str) -> Any:
        """The inputs of a batch that may have no labels.

        Args:
            batch: one batch of a loader.
            task: the task's name, for messages.

        Returns:
            The configured inputs; by default the first entry, a dict without its labels, or the batch itself.

        Raises:
            ValueError: if the batch has no such inputs.
        """
        if self.adapt is not None:
            return self.adapt(batch)[0]
        if self.inputs is not None:
            return self._named_inputs(batch, task)
        if isinstance(batch, Mapping):
            return {key: value for key, value in batch.items() if key != (self.labels or "labels")}
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def _named_inputs(self, batch: Any, task: str) -> Any:
        if isinstance(self.inputs, (str, int)):
            return self._entry(batch, self.inputs, task)
        values = {key: self._entry(batch, key, task) for key in self.inputs or ()}
        return tuple(values.values()) if all(isinstance(key, int) for key in values) else values

    def _entry(self, batch: Any, key: Key, task: str) -> Any:
        try:
            return batch[key]
        except (KeyError, IndexError, TypeError):
            if isinstance(key, str) and not isinstance(batch, Mapping) and hasattr(batch, key):
                return getattr(batch, key)
        known = list(batch) if isinstance(batch, Mapping) else []
        near = next((name for name in _LABELS if name in known), None) if self.labels is None else None
        advice = (
            f"; is it labels={near!r}?" if near else "; name its parts with inputs=... and labels=..., or adapt=..."
        )
        raise ValueError(
            f"{self.who}: a batch of '{task}' is {_describe(batch)} and has no {key!r}{advice if known else ''}"
        )


class Pairs:
    """Iterate over a loader as pairs (inputs, labels).

    Args:
        loader: the loader.
        task: the task's name, for messages.
        format: where its batches keep inputs and labels.
        kind: of the task: labels of a "classification" are checked, and may be (B, 1) or whole floats; those of
            "mean_iou" are checked; a "seq2seq" model reads its labels, too. None for a metric that is given labels as
            they are.
        classes: how many classes there are; 0 if that is not known yet.
    """

    def __init__(self, loader: Iterable, task: str, format: BatchFormat, kind: str | None, classes: int = 0) -> None:
        self.loader = loader
        self.task = task
        self.format = format
        self.kind = kind
        self.classes = classes

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield the pairs.

        Raises:
            ValueError: a batch has another format, or a label is not a class.
        """
        for batch in self.loader:
            inputs, labels = self.format.read(batch, self.task, keeps_labels=self.kind == "seq2seq")
            if self.kind == "classification":
                labels = self._classes_of(labels)
            elif self.kind == "mean_iou":
                self.check_classes(labels)
            yield inputs, labels

    def _classes_of(self, labels: Any) -> Tensor:
        """Convert labels (B,) or (B, 1), whole numbers of any dtype, to (B,) int64."""
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{self.format.who}: expected one class for each sample of '{self.task}', got {_describe(labels)}; "
                "pass a torchmetrics metric for such labels, or leave the task out"
            ) from None
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        whole = labels.long()
        if labels.ndim != 1 or (labels.is_floating_point() and not torch.equal(labels, whole.to(labels.dtype))):
            shape = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
            advice = f"metrics={{'{self.task}': 'mean_iou'}}" if labels.ndim > 2 else "a torchmetrics metric"
            raise ValueError(
                f"{self.format.who}: expected one class for each sample of '{self.task}', got labels {shape}; pass "
                f"{advice} for such labels"
            )
        self.check_classes(whole)
        return whole

    def check_classes(self, labels: Tensor) -> None:
        """Check that labels are classes, if the number of classes is known.

        Args:
            labels: (B, …) integers.

        Raises:
            ValueError: if a label is not a class.
        """
        if not self.classes or not isinstance(labels, Tensor):
            return
        wrong = labels[(labels < 0) | (labels >= self.classes)]
        if len(wrong):
            label, advice = int(wrong[0]), ""
            if self.kind == "mean_iou":
                metric = f"JaccardIndex('multiclass', num_classes={self.classes}, ignore_index={label})"
                advice = f"; to ignore this label, pass metrics={{'{self.task}': {metric}}}"
            raise ValueError(
                f"{self.format.who}: the loader of '{self.task}' yields the label {label}, and the model gives "
                f"logits of {self.classes} classes: labels are 0 to {self.classes - 1}{advice}"
            )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Tensor):
        return f"a Tensor {list(value.shape)}"
    return f"a {type(value).__name__}"
