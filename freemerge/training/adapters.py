"""Fine-tuning by adapters: LoRA, (IA)³ and whatever else of PEFT can be merged into the weights.

An adapter only changes how the weights are trained. What comes out is a fine-tuned model with all its weights, hence a
task vector like any other; the adapter can be kept beside it.
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
    """A PEFT configuration, from what a YAML file can say.

    Args:
        settings: `{kind: lora, r: 8, …}` with any of PEFT's kinds, or `{class_path: peft.LoraConfig, init_args: {…}}`,
            or a configuration object.

    Raises:
        ValueError: if PEFT is not installed, or it cannot be understood.
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
            raise ValueError(f"peft: {settings['class_path']} is not a configuration of PEFT, such as peft.LoraConfig")
        arguments = dict(settings.get("init_args") or {})
    elif _SHORT in settings:
        kind = str(settings.pop(_SHORT)).lower()
        if kind not in known:
            near = difflib.get_close_matches(kind, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"peft.kind: PEFT has no {kind!r}{hint}; it has {', '.join(sorted(known))}")
        cls, arguments = known[kind], settings
    else:
        raise ValueError("peft: say which kind, for instance {kind: lora, r: 8, target_modules: [query, value]}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft: {cls.__name__}: {error}") from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("peft: fine-tuning by adapters needs PEFT: pip install 'freemerge[peft]'") from error
    return peft


def add_adapter(model: nn.Module, config: Any) -> nn.Module:
    """The model with a fresh adapter: only the adapter trains.

    Args:
        model: the model; changed in place.
        config: what `peft_config` returned.

    Returns:
        A `peft.PeftModel` around it, which is called like the model itself.

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
    except ValueError as error:  # such as target modules that are not there
        raise ValueError(f"peft: {type(model).__name__}: {' '.join(str(error).split())}") from error


def has_adapter(model: nn.Module) -> bool:
    """Whether a model carries an adapter of PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model with its adapter merged in; see `fused_weights`.

    Args:
        model: what `add_adapter` returned.
    """
    return fused_weights(model.get_base_model())


@torch.no_grad()
def fused_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module with the adapters in it merged in, under the names that it has without adapters.

    The module stays as it is, and no more than one of its layers is copied at a time.

    Args:
        module: it may be a `peft.PeftModel`, contain some, or have had layers of PEFT injected.

    Returns:
        The module's state dict. Tensors that no adapter changes share memory with the module.
    """
    weights: dict[str, Tensor] = {}
    for place in _places(module):
        layer = _merged(place.tuner)
        kept = place.layer.state_dict(keep_vars=True)
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if "." not in name:
                same = name in kept and torch.equal(tensor, kept[name])  # also where only the sign of a zero differs
                weights[place.plain + name] = (kept[name] if same else tensor).detach()
    return weights


def plain_names(module: nn.Module) -> dict[str, str]:
    """For each tensor of a module as it is named without adapters, its name in the module's state dict.

    Args:
        module: see `fused_weights`.
    """
    return {
        place.plain + name: place.own + name
        for place in _places(module)
        for name in place.layer.state_dict(keep_vars=True)
        if "." not in name
    }


class _Place(NamedTuple):
    """A layer, and what PEFT has put around it."""

    plain: str  # the prefix of its tensors' names without adapters
    own: str  # and in the module that is looked at
    layer: nn.Module  # as it was before
    tuner: nn.Module  # what computes instead of it: to be merged, a trained copy, or the layer itself


def _places(module: Any, plain: str = "", own: str = "", copied: nn.Module | None = None) -> Iterator[_Place]:
    """The layers of a module; `copied` is a trained copy of it, if there is one."""
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
    while _is_wrapper(module):  # parameters of one layer are wrapped one around the other
        module, own = module.base_layer, f"{own}base_layer."
    yield _Place(plain, own, module, tuner)
    for name, child in module.named_children():
        yield from _places(
            child, f"{plain}{name}.", f"{own}{name}.", None if copied is None else copied.get_submodule(name)
        )


def _is_wrapper(layer: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _merged(tuner: Any) -> nn.Module:
    """What computes the same as a wrapped layer, as one without a wrapper."""
    layer = copy.deepcopy(tuner) if _is_wrapper(tuner) else tuner
    while _is_wrapper(layer):
        layer.merge(safe_merge=True)
        layer = layer.base_layer
    return layer
