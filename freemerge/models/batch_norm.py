"""Re-estimation of batch norm's running statistics after a merge.

The running mean and variance of a fine-tuned model describe that model's activations; their average over several models
does not describe the activations of the merged model. A merged model with batch norm therefore performs far below its
potential until its statistics are re-estimated (REPAIR, arXiv 2211.08403).
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
    """The batch norm layers with running statistics, by name.

    Args:
        module: any module.
    """
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
    """Measure the statistics of a module's batch norms on data; the module itself does not change.

    Every batch norm normalises by the statistics of the batch, as in training, while all other modules are in
    evaluation mode. The result is the exact mean and unbiased variance of a layer's inputs over all batches,
    accumulated in float64 on the CPU. `torch.optim.swa_utils.update_bn` averages the statistics of batches instead, and
    changes the module. With several ranks, each takes every world-th batch and the sums are added; all ranks must call
    the function with the same batches.

    Args:
        module: any module.
        batches: batches of the form (inputs, …), or inputs alone.
        device: device to compute on; None is the module's.
        max_batches: maximum number of batches; None uses all.

    Returns:
        `<layer>.running_mean` and `<layer>.running_var`, (C,) each, for every batch norm with running statistics, named
        as in the module's state dict and on the module's devices. Empty, without reading the data, if there is none.

    Raises:
        ValueError: if a batch norm gets fewer than two values per channel.
    """
    layers = batch_norms(module)
    if not layers:
        return {}
    rank, world = rank_and_world()
    device = device or next(module.parameters()).device
    sums = {name: torch.zeros(3, layer.num_features, dtype=torch.float64) for name, layer in layers.items()}
    modes = {part: part.training for part in module.modules()}
    hooks = [layer.register_forward_pre_hook(_accumulator(sums[name])) for name, layer in layers.items()]
    try:
        module.eval()
        for layer in layers.values():  # use the batch's statistics and leave the running ones unchanged
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
        count, total, squares = _sum_over_ranks(sums[name], device) if world > 1 else sums[name]
        if float(count[0]) < 2:
            raise ValueError("batch norm cannot be re-estimated: there are no data")
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
        for buffer, value in (("running_mean", mean), ("running_var", variance)):
            measured[f"{name}.{buffer}" if name else buffer] = value.to(getattr(layer, buffer))
    return measured


def _accumulator(sums: Tensor) -> Any:
    """A hook that adds count, sum and sum of squares of each channel of a layer's input (B, C, …) to `sums` (3, C)."""

    def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].transpose(0, 1).flatten(1).float()  # (C, B · positions)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        mean, variance, count = mean.double().cpu(), variance.double().cpu(), values.shape[1]
        sums.add_(torch.stack([torch.full_like(mean, count), count * mean, count * (variance + mean.square())]))

    return hook


def _sum_over_ranks(sums: Tensor, device: torch.device | str) -> Tensor:
    """The sum over all ranks, on the CPU; `device` is where the ranks communicate."""
    sums = sums.to(device)
    dist.all_reduce(sums)
    return sums.cpu()
