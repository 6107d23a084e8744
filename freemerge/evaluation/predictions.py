"""Predictions as a table: each sample's name and prediction."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from freemerge.data import Task, load_tokenizer, names_of
from freemerge.models import FreeAnswers, FreeModel, FreeOutput

COLUMNS = ("loader", "index", "sample", "routed_task", "class", "probability", "value")


def write_predictions(
    path: Path,
    model: FreeModel,
    tasks: Mapping[str, Task],
    predictions: Mapping[str, Iterable[FreeOutput | FreeAnswers]],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write predictions to a CSV file, one row per test sample.

    | column | content |
    |---|---|
    | loader | the task whose test data contain the sample |
    | index | the sample's index in them |
    | sample | its file, or its row in a table; empty if unknown |
    | routed_task | the task whose head, or expert of a language model, made the prediction |
    | class, probability | the prediction of a classification |
    | value | the number of a regression, or the text of a language model |

    Args:
        path: the file to write.
        model: the model that made the predictions.
        tasks: task name → task, in the order of the loaders.
        predictions: task name → results of `MultiTaskEvaluator.predict_step`, in the order of the task's test data.
        rank: this process's rank; it has predicted every world-th sample.
        world: the number of processes.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, batches in predictions.items():
            task = tasks[name]
            samples = names_of(task.test)
            rows = (row for batch in batches for row in _rows(model, task, batch))
            for position, row in enumerate(rows):
                index = rank + world * position
                writer.writerow([name, index, samples[index] if samples is not None else "", *row])


def _rows(model: FreeModel, task: Task, batch: FreeOutput | FreeAnswers) -> Iterable[tuple[Any, ...]]:
    """Routed task, class, probability and value of each sample of a batch."""
    if isinstance(batch, FreeAnswers):
        texts = _texts(task, batch.token_lists())
        return [(routed, "", "", text) for routed, text in zip(batch.task_names, texts, strict=True)]
    rows = []
    best = batch.logits.float().softmax(dim=-1).max(dim=-1).values.tolist()
    for routed, label, probability, logits in zip(
        batch.task_names, batch.labels.tolist(), best, batch.logits, strict=True
    ):
        names = model.class_names.get(routed)
        if names is None and model.num_outputs(routed) == 1:
            rows.append((routed, "", "", f"{float(logits[0]):.6g}"))
        else:
            rows.append((routed, names[label] if names else label, f"{probability:.4f}", ""))
    return rows


def _texts(task: Task, answers: list[list[int]]) -> list[str]:
    if task.tokenizer is None:
        return [" ".join(map(str, tokens)) for tokens in answers]
    tokenizer = load_tokenizer(task.tokenizer)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
