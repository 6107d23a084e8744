"""Held-out tasks: a head for each, though nothing was fine-tuned on them."""

from __future__ import annotations

import torch
from torch import nn

from freemerge.models import extract_features
from freemerge.pipeline.store.artifacts import Artifacts


def held_out_heads(files: Artifacts, device: torch.device) -> dict[str, nn.Module]:
    """Task → head, for the suite's held-out tasks.

    A held-out task takes the head that it shares with merged tasks, or one of its class names where heads are made of
    them, or the model's own; otherwise a probe of the base's features of its own training data. No weight of the
    backbone ever sees it.

    Args:
        files: the run's files.
        device: where to compute features.
    """
    heads: dict[str, nn.Module] = {}
    for task in files.suite.held_out:
        group = [name for name in files.suite.head_group(task) if name != task]
        if group:
            heads[task] = files.heads()[group[0]]
            continue
        tuner = files.base_tuner()
        data = files.suite.for_task(task)
        objective = tuner.objective_of(data.task)
        head = tuner.frozen_head(data.task)
        if head is None:
            backbone = tuner.backbone.to(device)
            head = objective.fit_probe(*extract_features(backbone, data.train_dataloader(), device))
        heads[task] = head
    return heads
