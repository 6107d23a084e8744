"""Fine-tuning by adapters: LoRA, (IA)³ and whatever else of PEFT can be merged into the weights.

An adapter only changes how the weights are trained. What comes out is a fine-tuned model with all its weights, hence a
task vector like any other; the adapter can be kept beside it.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from typing import Any

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


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model with its adapter merged in, as the model without an adapter names them.

    The model stays as it is, and no more than one of its layers is copied at a time.

    Args:
        model: what `add_adapter` returned.

    Returns:
        The model's state dict. Tensors that the adapter does not touch share memory with the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    weights: dict[str, Tensor] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[module.active_adapter]
        if isinstance(module, BaseTunerLayer):
            module = copy.deepcopy(module)
            module.merge(safe_merge=True)
            module = module.get_base_layer()
        own = module.state_dict(keep_vars=True)
        weights.update({prefix + name: tensor.detach() for name, tensor in own.items() if "." not in name})
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.")

    visit(base, "")
    return weights
