"""Fine-tuning with adapters: LoRA, (IA)³ and every other PEFT method that can be merged into the weights.

An adapter only changes how the weights are trained: the result is a complete fine-tuned model, hence a task vector like
any other. The adapter can be saved as well.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SHORT = "kind"


def peft_config(settings: Any) -> Any:
    """Make a PEFT configuration from settings in YAML.

    Args:
        settings: `{kind: lora, r: 8, …}` with any of PEFT's types, or `{class_path: peft.LoraConfig, init_args: {…}}`,
            or a configuration object.

    Returns:
        A `peft.PeftConfig`.

    Raises:
        ValueError: if PEFT is not installed, the type is unknown, or an argument is invalid.
    """
    peft = _peft()
    if isinstance(settings, peft.PeftConfig):
        return settings
    settings = dict(settings)
    known = {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if "class_path" in settings:
        module, _, name = str(settings["class_path"]).rpartition(".")
        cls = getattr(importlib.import_module(module or "peft"), name, None)
        if not (isinstance(cls, type) and issubclass(cls, peft.PeftConfig)):
            raise ValueError(f"peft: {settings['class_path']} is not a PEFT configuration such as peft.LoraConfig")
        arguments = dict(settings.get("init_args") or {})
    elif _SHORT in settings:
        kind = str(settings.pop(_SHORT)).lower()
        if kind not in known:
            near = difflib.get_close_matches(kind, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"peft.kind: PEFT has no {kind!r}{hint}; known kinds: {', '.join(sorted(known))}")
        cls, arguments = known[kind], settings
    else:
        raise ValueError("peft: set kind, for instance {kind: lora, r: 8, target_modules: [query, value]}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft: {cls.__name__}: {error}") from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("peft: fine-tuning with adapters needs PEFT: pip install 'freemerge[peft]'") from error
    return peft


def add_adapter(model: nn.Module, config: Any) -> nn.Module:
    """Add a new adapter to a model; only the adapter is trainable.

    Args:
        model: the model; changed in place.
        config: the result of `peft_config`.

    Returns:
        A `peft.PeftModel` that wraps the model and is called like it.

    Raises:
        ValueError: if the adapter does not fit the model, or cannot be merged into its weights.
    """
    peft = _peft()
    if config.is_prompt_learning:
        raise ValueError(
            f"peft: {type(config).__name__} learns a prompt, which cannot be merged into weights; use LoRA or (IA)³"
        )
    try:
        return peft.get_peft_model(model, copy.deepcopy(config))
    except ValueError as error:  # for instance, target modules that do not exist
        raise ValueError(f"peft: {type(model).__name__}: {' '.join(str(error).split())}") from error


def has_adapter(model: nn.Module) -> bool:
    """Check whether a model has a PEFT adapter.

    Args:
        model: any module.

    Returns:
        True for a `peft.PeftModel`.
    """
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model with its adapter merged in; see `fused_weights`.

    Args:
        model: the result of `add_adapter`.

    Returns:
        The base model's state dict with merged weights.
    """
    return fused_weights(model.get_base_model())


@torch.no_grad()
def fused_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module with its adapters merged in, under the names that they have without adapters.

    PEFT's own `merge_and_unload` would change the module or need a copy of it: this function leaves the module
    unchanged, and copies one layer at a time.

    Args:
        module: a `peft.PeftModel`, a module that contains some, or one that PEFT has injected layers into.

    Returns:
        A state dict. Tensors that no adapter changes share memory with the module.
    """
    weights: dict[str, Tensor] = {}
    for place in _adapted_layers(module):
        layer = _merged(place.tuner)
        kept = place.layer.state_dict(keep_vars=True)
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if "." not in name:
                same = name in kept and torch.equal(tensor, kept[name])  # true if only the sign of a zero differs
                weights[place.plain + name] = (kept[name] if same else tensor).detach()
    return weights


def plain_names(module: nn.Module) -> dict[str, str]:
    """Map the names that a module's tensors have without adapters to their names in the module's state dict.

    Args:
        module: see `fused_weights`.

    Returns:
        Name without adapters → name in `module.state_dict()`; the adapters' own tensors are not included.
    """
    return {
        place.plain + name: place.own + name
        for place in _adapted_layers(module)
        for name in place.layer.state_dict(keep_vars=True)
        if "." not in name
    }


class _AdaptedLayer(NamedTuple):
    """A layer and the PEFT wrapper around it."""

    plain: str  # prefix of its tensors' names without adapters
    own: str  # prefix of its tensors' names in the given module
    layer: nn.Module  # the original layer
    tuner: nn.Module  # the module that runs in its place: a wrapper to merge, a trained copy, or the layer itself


def _adapted_layers(
    module: Any, plain: str = "", own: str = "", copied: nn.Module | None = None
) -> Iterator[_AdaptedLayer]:
    """Iterate over the layers of a module; `copied` is PEFT's trained copy of the module, if there is one."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    if has_adapter(module):
        inner = module.get_base_model()
        own += next(f"{name}." for name, found in module.named_modules() if found is inner)
        module = inner
    if hasattr(module, "token_adapter"):
        module, own = module.token_adapter, f"{own}token_adapter."
    elif isinstance(module, AuxiliaryTrainingWrapper):
        copied = module.modules_to_save[module.active_adapter]
        module, own = module.original_module, f"{own}original_module."
    tuner = module if copied is None else copied
    while _is_wrapper(module):  # PEFT nests wrappers for several parameters of one layer
        module, own = module.base_layer, f"{own}base_layer."
    yield _AdaptedLayer(plain, own, module, tuner)
    for name, child in module.named_children():
        yield from _adapted_layers(
            child, f"{plain}{name}.", f"{own}{name}.", None if copied is None else copied.get_submodule(name)
        )


def _is_wrapper(layer: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _merged(tuner: Any) -> nn.Module:
    """A layer without wrappers that computes the same as a wrapped layer."""
    layer = copy.deepcopy(tuner) if _is_wrapper(tuner) else tuner
    while _is_wrapper(layer):
        layer.merge(safe_merge=True)
        layer = layer.base_layer
    return layer
