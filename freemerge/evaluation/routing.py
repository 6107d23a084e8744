"""Router confusion matrix: how many samples of each task are routed to each task, and how many are abstained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from freemerge.inputs import to_device
from freemerge.models import FreeModel
from freemerge.runtime.process_group import rank_and_world


@dataclass(frozen=True)
class Routing:
    """The router's confusion matrix and abstentions.

    Args:
        tasks: the K tasks.
        counts: int64 (K, K), samples of each task (row) by their most likely task (column), including samples that the
            router abstained on.
        abstained: int64 (K,), samples of each task that the router abstained on.
    """

    tasks: tuple[str, ...]
    counts: Tensor
    abstained: Tensor

    @property
    def accuracy(self) -> dict[str, float]:
        """Task → fraction of its samples that were routed to it."""
        fractions = self.counts.diag() / self.counts.sum(dim=1).clamp(min=1)
        return dict(zip(self.tasks, fractions.tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain data.

        Returns:
            Task → `routed_to`, its samples by the task they were routed to, and `abstained`.
        """
        return {
            task: {
                "routed_to": dict(zip(self.tasks, row.tolist(), strict=True)),
                "abstained": int(abstained),
            }
            for task, row, abstained in zip(self.tasks, self.counts, self.abstained, strict=True)
        }


@torch.no_grad()
def evaluate_routing(model: FreeModel, loaders: Mapping[str, Iterable], device: torch.device | str = "cpu") -> Routing:
    """Route every sample of every task, without running any expert.

    With several ranks, each routes every world-th batch, and all get the sums.

    Args:
        model: the model, on `device`.
        loaders: task name → iterable of (inputs, labels).
        device: the device to compute on.

    Returns:
        The counts.
    """
    rank, world = rank_and_world()
    tasks = model.tasks
    counts = torch.zeros(len(tasks), len(tasks) + 1, dtype=torch.long, device=device)
    for task, loader in loaders.items():
        row = counts[tasks.index(task)]
        for inputs, _ in islice(loader, rank, None, world):
            logits, abstained = model.route(to_device(inputs, device))
            row[: len(tasks)] += logits.argmax(dim=1).bincount(minlength=len(tasks))
            row[-1] += abstained.sum()
    if world > 1:
        dist.all_reduce(counts)
    counts = counts.cpu()
    return Routing(tasks, counts[:, :-1], counts[:, -1])
