"""Gram matrices of the inputs of linear layers and convolutions, G = XᵀX, which RegMean merges by (arXiv 2212.09849).

A convolution multiplies patches of its input by a matrix (dim 0 × the rest of its weight), so X has a patch a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 1 << 22  # values of X that are multiplied at a time, so that unfolded patches stay small


def measurable_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers whose inputs can be measured, by name: linear ones, and convolutions over images without groups.

    Weights that a module uses without calling a layer, as torch's attention does with its projections and stacked
    experts with theirs, stay without statistics, and RegMean averages them.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and _is_plain(layer))
    }


class GramMatrices:
    """Adds up XᵀX over all inputs X that some layers get inside a `with` block.

        with GramMatrices(measurable_layers(model)) as grams, torch.no_grad():
            for batch in batches:
                model(batch)
        save_checkpoint("cars.gram.safetensors", grams.tensors())

    Each batch is multiplied in float32 on the layer's device and added in float32 on the CPU. All positions count,
    those of padding tokens too. The memory is one (n, n) matrix for each layer of n inputs. Layers that share
    their weight have one sum, under the name of the first.

    Args:
        layers: name → layer.
    """

    def __init__(self, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
        self._layers = dict(layers)
        first: dict[int, str] = {}
        self._owners = {name: first.setdefault(id(layer.weight), name) for name, layer in layers.items()}
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> GramMatrices:
        self._hooks = [layer.register_forward_pre_hook(self._adding_to(name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """`<layer>.weight` → G, (n, n) float32; only of layers that were called."""
        return {f"{name}.weight" if name else "weight": total for name, total in self._sums.items()}

    def _adding_to(self, name: str) -> Any:
        def hook(layer: nn.Linear | nn.Conv2d, arguments: tuple[Tensor, ...]) -> None:
            gram = _gram(layer, arguments[0].detach()).cpu()
            owner = self._owners[name]
            self._sums[owner] = self._sums[owner].add_(gram) if owner in self._sums else gram

        return hook


@torch.no_grad()
def _gram(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """XᵀX of one call, (n, n) float32 on the inputs' device."""
    total: Tensor | None = None
    with torch.autocast(inputs.device.type, enabled=False):
        for part in _parts(layer, inputs):
            rows = _rows(layer, part.float())
            total = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
    assert total is not None  # `split` returns at least one part
    return total


def _parts(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> tuple[Tensor, ...]:
    """Some samples of a convolution's input (B, C, H, W) at a time; all of a linear layer's."""
    if isinstance(layer, nn.Linear):
        return (inputs,)
    inputs = inputs if inputs.ndim == 4 else inputs[None]
    patches = layer.kernel_size[0] * layer.kernel_size[1] * max(1, inputs[0].numel())
    return inputs.split(max(1, _ROWS // patches))


def _rows(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """X: a linear layer's inputs (…, n) → (N, n), or a convolution's (B, C, H, W) → (patches, C · kernel)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if isinstance(layer.padding, str):  # "same" pads more on the right and below where the total is odd
        total = [rate * (size - 1) for rate, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        rows, columns = total if layer.padding == "same" else (0, 0)
        inputs = F.pad(inputs, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = layer.padding
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)  # (B, C · kernel, places)
    return patches.transpose(1, 2).flatten(0, 1)


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros"
