"""PEFT adapters in a user's module: they are fused into the weights first, and the fused weights are merged.

Low-rank factors are never merged with each other, because the product of sums is not the sum of products.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def has_adapters(module: nn.Module) -> bool:
    """Check whether PEFT wraps any layer of a module.

    Args:
        module: the module.

    Returns:
        True if a layer is wrapped; PEFT is not imported to find out.
    """
    if "peft" not in sys.modules:
        return False
    return any(_is_wrapper(part) for part in module.modules())


def fused_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module with its adapters fused in; see `freemerge.training.fused_weights`.

    Args:
        module: the module; it is not changed.

    Returns:
        Name without adapters → tensor.
    """
    from freemerge.training import fused_weights as fuse

    return fuse(module)


def plain_names(module: nn.Module) -> dict[str, str]:
    """The names of a module's tensors; see `freemerge.training.plain_names`.

    Args:
        module: the module.

    Returns:
        Name without adapters → name in the module's state dict.
    """
    from freemerge.training import plain_names as names

    return names(module)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Disable a module's adapters inside the block, for weights that the adapters are already fused into.

    Args:
        module: the module.
    """
    if not has_adapters(module):
        yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    wrappers: list[Any] = [part for part in module.modules() if _is_wrapper(part) and not part.disable_adapters]
    for part in wrappers:
        part.enable_adapters(False)
    try:
        yield
    finally:
        for part in wrappers:
            part.enable_adapters(True)
        for parameter, requires_grad in trained:  # enabling an adapter makes PEFT set requires_grad on it
            parameter.requires_grad_(requires_grad)


@contextmanager
def loaded(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a module's tensors other values inside the block.

    Args:
        module: the module.
        state: name in the module's state dict → values.
    """
    tensors = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name in state}
    own = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.data = state[name].to(tensor.device, tensor.dtype)
        with torch.no_grad():
            yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = own[name]


def _is_wrapper(part: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))
