"""Descriptions of heads in model folders as plain data.

Layers of `torch.nn`, heads by cosine and sequences of them are described by their constructor arguments, and any other
head by its class and the arguments that its `recipe()` returns, if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freemerge.checkpoints import CheckpointError
from freemerge.models.class_heads import CosineHead
from freemerge.models.classes import import_class, instantiate, recipe_arguments
from freemerge.names import class_name

_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    CosineHead: ("in_features", "out_features"),
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


def head_from_state(state: Mapping[str, Tensor]) -> nn.Linear | CosineHead:
    """A head of freemerge's own, from its tensors alone: linear, or by cosine."""
    outputs, width = state["weight"].shape
    head = CosineHead(width, outputs) if "scale" in state else nn.Linear(width, outputs)
    head.load_state_dict(dict(state))
    return head


def describe_head(head: nn.Module, what: str) -> dict[str, Any]:
    """Describe a head as plain data.

    Args:
        head: the head.
        what: the head, such as `the head of 'a'`, for messages.

    Returns:
        `class` with `arguments`, or with `layers` for a sequence; JSON-serialisable.

    Raises:
        ValueError: if JSON cannot represent the result of the head's `recipe()`.
    """
    described = _describe_layers(head)
    if described is not None:
        with torch.device("meta"):
            again = build_head(described, "", what, "")
        found = [(name, tensor.shape) for name, tensor in again.state_dict().items()]
        if found == [(name, tensor.shape) for name, tensor in head.state_dict().items()]:
            return described
    return {"class": f"{type(head).__module__}.{type(head).__qualname__}", "arguments": recipe_arguments(head, what)}


def _describe_layers(module: nn.Module) -> dict[str, Any] | None:
    """The description of a layer of `torch.nn` or a sequence of such layers; None for other modules."""
    kind = type(module)
    if vars(module).get("forward") is not None:  # the instance has a `forward` of its own
        return None
    if kind is nn.Sequential:
        layers = [[name, _describe_layers(layer)] for name, layer in module.named_children()]
        return None if any(layer is None for _, layer in layers) else {"class": "Sequential", "layers": layers}
    if kind not in _ATTRIBUTES:
        return None
    arguments = {name: getattr(module, name) for name in _ATTRIBUTES[kind]}
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    if kind is nn.Linear or (kind is nn.LayerNorm and module.elementwise_affine):
        arguments["bias"] = module.bias is not None
    return {"class": kind.__name__, "arguments": arguments}


def build_head(described: Mapping[str, Any], where: str, what: str, remedy: str, trust: bool = False) -> nn.Module:
    """Build an untrained head from its description.

    Args:
        described: the result of `describe_head`.
        where: the folder, for messages.
        what: the head, such as `the head of 'a'`, for messages.
        remedy: what the caller can do instead, such as `pass heads={"a": …}`, for messages.
        trust: whether classes from outside torch may be imported.

    Raises:
        CheckpointError: if the head's class may not be imported, is unknown, or cannot be built.
    """
    name, arguments = str(described.get("class")), described.get("arguments")
    if name == "Sequential":
        sequence = nn.Sequential()
        for key, layer in described["layers"]:
            sequence.add_module(key, build_head(layer, where, what, remedy, trust))
        return sequence
    if name in _LAYERS:
        return _LAYERS[name](**described["arguments"])
    if "." not in name:
        raise CheckpointError(
            f"{where}: {what} is a {name!r}, which this version of freemerge does not know; update freemerge"
        )
    kind = import_class(name, where, what, remedy, trust)
    if not issubclass(kind, nn.Module):
        raise CheckpointError(f"{where}: {what} is a {class_name(kind)}, which is not an nn.Module; {remedy}")
    return instantiate(kind, arguments, where, what, remedy)
