"""Checks of a task's labels: type, range, and whether there are enough for validation and test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from freemerge.data import Task, listed
from freemerge.pipeline.checks.findings import Findings


def check_labels(task: Task, findings: Findings, splits: tuple[str, ...]) -> None:
    """Check all labels of a task that its datasets hold in memory.

    Args:
        task: the task.
        findings: receives the faults and doubts.
        splits: the splits that a stage will read, of train, val and test.
    """
    known: dict[str, Tensor] = {}
    for split in splits:
        dataset = getattr(task, split)
        if _size(dataset) == 0:
            findings.fault(f"task {task.name!r}: its {split} data are empty; {_USE[split]}")
        elif (labels := labels_of(dataset)) is not None and check_values(task, split, labels, findings):
            known[split] = labels
    if task.kind == "classification":
        _check_classes(task, known, findings)
    if task.kind == "regression":
        _check_numbers(task, known, findings)


_USE = {
    "train": "give it samples to learn from",
    "val": "scales, experts and the router are chosen on them: give it some, or let its source cut them off train",
    "test": "the report is made of them: give it some, or leave evaluate out of run.stages",
}


def labels_of(dataset: Dataset) -> Tensor | None:
    """All labels (N,) of a dataset that holds them in memory, as `labels` or `targets`; None for others."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if isinstance(labels, (list, tuple)) and labels and all(isinstance(each, (int, float)) for each in labels):
        labels = torch.tensor(labels)
    matches = isinstance(labels, Tensor) and labels.dim() == 1 and len(labels) == _size(dataset)
    return labels if matches else None


def check_values(task: Task, split: str, labels: Any, findings: Findings) -> bool:
    """Check that labels have the type, shape and range of their kind of task.

    Args:
        task: the task.
        split: the split that they are from.
        labels: the labels of a dataset or of a batch, (N,); for language modelling (B, L).
        findings: receives a fault.

    Returns:
        Whether they have.
    """
    where = f"task {task.name!r}, {split}"
    if not isinstance(labels, Tensor):
        findings.fault(f"{where}: labels are {type(labels).__name__}, expected a tensor of one label per sample")
        return False
    if task.kind == "regression":
        if labels.dim() != 1 or labels.is_complex():
            findings.fault(
                f"{where}: labels have shape {tuple(labels.shape)}, a regression wants one number per sample"
            )
            return False
        if not bool(labels.isfinite().all()):
            row = int((~labels.isfinite()).nonzero()[0])
            findings.fault(f"{where}: the label of sample {row} is {float(labels[row])}, expected a number")
            return False
        return True
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        findings.fault(
            f"{where}: labels are {_dtype(labels)}, a {task.kind} wants int64"
            + ("; set the task's kind to regression if they are numbers" if task.kind == "classification" else "")
        )
        return False
    if task.kind != "classification":
        return True
    if labels.dim() != 1:
        findings.fault(
            f"{where}: labels have shape {tuple(labels.shape)}, a classification wants one class's index per sample"
        )
        return False
    low, high, classes = int(labels.min()), int(labels.max()), task.num_classes
    if low < 0 or high >= classes:
        one_based = "; labels count from 0: subtract 1" if low == 1 and high == classes else ""
        findings.fault(
            f"{where}: labels range from {low} to {high}, expected 0 to {classes - 1} for the {classes} classes"
            f"{one_based or '; name all classes, or mend the labels'}"
        )
        return False
    return True


def _check_classes(task: Task, known: dict[str, Tensor], findings: Findings) -> None:
    counts = {split: labels.long().bincount(minlength=task.num_classes) for split, labels in known.items()}
    if "train" in counts and bool((absent := counts["train"] == 0).any()):
        names = [task.class_names[index] for index in absent.nonzero().flatten().tolist()]
        findings.doubt(f"task {task.name!r}: its train data have no sample of {listed(names)}, which cannot be learnt")
    for split in ("val", "test"):
        if split not in counts:
            continue
        present = counts[split] > 0
        missing = ~present & (counts["train"] > 0 if "train" in counts else True)
        names = [task.class_names[index] for index in missing.nonzero().flatten().tolist()]
        if names and int(present.sum()) == 1:
            only = task.class_names[int(present.nonzero()[0])]
            findings.doubt(
                f"task {task.name!r}: all its {split} samples are of class {only!r}: a model that always says so "
                "scores 100 %; draw them from all classes"
            )
        elif names:
            findings.doubt(
                f"task {task.name!r}: its {split} data have no sample of {listed(names)}; no score counts them"
            )


def _check_numbers(task: Task, known: dict[str, Tensor], findings: Findings) -> None:
    for split, labels in known.items():
        if split != "train" and bool((labels == labels[0]).all()):
            findings.fault(
                f"task {task.name!r}: all {len(labels)} labels of its {split} data are {float(labels[0]):g}, so "
                f"{task.metric} cannot be computed; give it samples with different labels"
            )


def _size(dataset: Any) -> int:
    return len(dataset)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
