"""Heads in a folder: what they are, as plain data.

Layers of `torch.nn` and sequences of them are described by their arguments. Any other head is named by its class, with
the arguments that its `recipe()` gives, where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from freemerge.checkpoints import CheckpointError
from freemerge.models.classes import import_class, make, recipe_arguments
from freemerge.names import class_name

_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.BatchNorm1d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.Dropout: ("p",),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.Flatten: ("start_dim", "end_dim"),
    **dict.fromkeys((nn.Identity, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus), ()),
}
_LAYERS = {layer.__name__: layer for layer in _ATTRIBUTES}


def describe_head(head: nn.Module, what: str) -> dict[str, Any]:
    """A head as plain data.

    Args:
        head: the head.
        what: how messages call it.

    Raises:
        ValueError: if its `recipe()` gives what JSON cannot hold.
    """
    described = _of_layers(head)
    if described is not None:
        with torch.device("meta"):
            again = build_head(described, "", what, "")
        found = [(name, tensor.shape) for name, tensor in again.state_dict().items()]
        if found == [(name, tensor.shape) for name, tensor in head.state_dict().items()]:
            return described
    return {"class": f"{type(head).__module__}.{type(head).__qualname__}", "arguments": recipe_arguments(head, what)}


def _of_layers(module: nn.Module) -> dict[str, Any] | None:
    kind = type(module)
    if vars(module).get("forward") is not None:  # of this very object
        return None
    if kind is nn.Sequential:
        layers = [[name, _of_layers(layer)] for name, layer in module.named_children()]
        return None if any(layer is None for _, layer in layers) else {"class": "Sequential", "layers": layers}
    if kind not in _ATTRIBUTES:
        return None
    arguments = {name: getattr(module, name) for name in _ATTRIBUTES[kind]}
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    if kind is nn.Linear or (kind is nn.LayerNorm and module.elementwise_affine):
        arguments["bias"] = module.bias is not None
    return {"class": kind.__name__, "arguments": arguments}


def build_head(described: Mapping[str, Any], where: str, what: str, give: str, trust: bool = False) -> nn.Module:
    """A head, untrained, from its description.

    Args:
        described: what `describe_head` said.
        where: the folder, for messages.
        what: what it is, for messages.
        give: what the caller can do instead, such as `pass heads={"a": …}`.
        trust: whether classes that are not torch's may be imported.

    Raises:
        CheckpointError: if it is of another class that may not be imported, or cannot be made.
    """
    name, arguments = str(described.get("class")), described.get("arguments")
    if name == "Sequential":
        sequence = nn.Sequential()
        for key, layer in described["layers"]:
            sequence.add_module(key, build_head(layer, where, what, give, trust))
        return sequence
    if name in _LAYERS:
        return _LAYERS[name](**described["arguments"])
    if "." not in name:
        raise CheckpointError(f"{where}: {what} is a {name!r}, which this version does not know; update freemerge")
    kind = import_class(name, where, what, give, trust)
    if not issubclass(kind, nn.Module):
        raise CheckpointError(f"{where}: {what} is a {class_name(kind)}, which is no nn.Module; {give}")
    return make(kind, arguments, where, what, give)
