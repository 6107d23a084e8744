"""Batch normalisation after a merge: its running statistics are measured again.

The running mean and variance of a fine-tuned model describe that model's activations. Their average over models does
not describe the merged model's, which is why a merged model with batch norm performs far below its potential until its
own statistics are measured (REPAIR, arXiv 2211.08403).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from freemerge.inputs import to_device
from freemerge.runtime.process_group import rank_and_world


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers whose statistics can be measured, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


@torch.no_grad()
def reestimate_batch_norm(
    module: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str | None = None,
    max_batches: int | None = None,
) -> dict[str, Tensor]:
    """Measure the statistics of a module's batch norms on data; the module is left as it was.

    In one pass every layer normalises by the statistics of the batch, as in training, while all else is in evaluation
    mode. A layer's statistics are the exact mean and unbiased variance of all that came in over the pass, accumulated
    in float64 on the CPU, however the data were cut into batches. Under several ranks each takes every world-th batch,
    and the sums are added up; all ranks must call it with the same batches.

    Args:
        module: any module.
        batches: batches that are (inputs, …), or inputs alone.
        device: where to compute; None is where the module is.
        max_batches: stop after so many.

    Returns:
        `<layer>.running_mean` and `<layer>.running_var` for every batch norm with running statistics, as the module's
        state dict names them, on the module's devices; empty if there is none, without touching the data.

    Raises:
        ValueError: if there is no batch.
    """
    layers = batch_norms(module)
    if not layers:
        return {}
    rank, world = rank_and_world()
    device = device or next(module.parameters()).device
    sums = {name: torch.zeros(3, layer.num_features, dtype=torch.float64) for name, layer in layers.items()}
    modes = {part: part.training for part in module.modules()}
    hooks = [layer.register_forward_pre_hook(_adding_to(sums[name])) for name, layer in layers.items()]
    try:
        module.eval()
        for layer in layers.values():  # with these two, a layer uses the batch's statistics and keeps its own
            layer.training, layer.track_running_stats = True, False
        for batch in islice(batches, rank, max_batches, world):
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            module(to_device(inputs, device))
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.track_running_stats = True
        for part, training in modes.items():
            part.training = training
    measured = {}
    for name, layer in layers.items():
        count, total, squares = _over_ranks(sums[name], device) if world > 1 else sums[name]
        if float(count[0]) < 2:
            raise ValueError("batch norm cannot be re-estimated: there are no data")
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
        for buffer, value in (("running_mean", mean), ("running_var", variance)):
            measured[f"{name}.{buffer}" if name else buffer] = value.to(getattr(layer, buffer))
    return measured


def _adding_to(sums: Tensor) -> Any:
    """A hook that adds count, sum and sum of squares of each channel of a layer's input (B, C, …) to `sums` (3, C)."""

    def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].transpose(0, 1).flatten(1).float()  # (C, B · places)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        mean, variance, count = mean.double().cpu(), variance.double().cpu(), values.shape[1]
        sums.add_(torch.stack([torch.full_like(mean, count), count * mean, count * (variance + mean.square())]))

    return hook


def _over_ranks(sums: Tensor, device: torch.device | str) -> Tensor:
    sums = sums.to(device)
    dist.all_reduce(sums)
    return sums.cpu()
