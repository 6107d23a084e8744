"""Heads for held-out tasks, on which nothing was fine-tuned."""

from __future__ import annotations

import torch
from torch import nn

from freemerge.pipeline.store.artifacts import Artifacts


def held_out_heads(files: Artifacts, device: torch.device) -> dict[str, nn.Module]:
    """Make a head for each of the suite's held-out tasks.

    It is the head that the task shares with merged tasks, a head made from its class names, or the model's own;
    otherwise a probe or prototypes of the base's features of the task's training data. The backbone never trains on the
    task.

    Args:
        files: the run's files.
        device: where to compute features.

    Returns:
        Task → head.
    """
    heads: dict[str, nn.Module] = {}
    for task in files.suite.held_out:
        group = [name for name in files.suite.head_group(task) if name != task]
        if group:
            heads[task] = files.heads()[group[0]]
            continue
        tuner = files.base_tuner()
        data = files.suite.for_task(task)
        objective, head = tuner.objective_of(data.task), tuner.heads.frozen(data.task)
        if head is None:
            tuner.backbone.to(device)
            head = tuner.heads.fitted(objective, data, device)
        heads[task] = head
    return heads
