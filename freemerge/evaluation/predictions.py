"""Predictions as a table: the name of each sample and the model's prediction for it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from freemerge.data import Task, load_tokenizer, names_of
from freemerge.models import FreeModel, FreeOutput

COLUMNS = ("loader", "index", "sample", "routed_task", "class", "probability", "value")


def write_predictions(
    path: Path,
    model: FreeModel,
    tasks: Mapping[str, Task],
    predictions: Mapping[str, Iterable[FreeOutput | list[list[int]]]],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write a CSV file, one line per test sample.

    | column | what |
    |---|---|
    | loader | the task whose test data the sample is of |
    | index | its place in them |
    | sample | its file, or its row in a table; empty where the source does not say |
    | routed_task | the task whose head has answered |
    | class, probability | of a classification |
    | value | the number of a regression, the text of a language model |

    Args:
        path: the file.
        model: what has predicted.
        tasks: task name → task, in the order of the loaders.
        predictions: task name → batches in the order of its test data, as `MultiTaskEvaluator.predict_step` gives them.
        rank: which of the processes this is: it has had every world-th sample.
        world: how many processes there are.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, batches in predictions.items():
            task = tasks[name]
            samples = names_of(task.test)
            said = (row for batch in batches for row in _rows(model, task, batch))
            for position, row in enumerate(said):
                index = rank + world * position
                writer.writerow([name, index, samples[index] if samples is not None else "", *row])


def _rows(model: FreeModel, task: Task, batch: FreeOutput | list[list[int]]) -> Iterable[tuple[Any, ...]]:
    """Routed task, class, probability and value of each sample of a batch."""
    if isinstance(batch, list):
        return [(task.name, "", "", text) for text in _texts(task, batch)]
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
