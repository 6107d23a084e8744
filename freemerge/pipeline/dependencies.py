"""The configuration that a run's results depend on: models, Trainer and settings as plain data.

Everything is read from the objects themselves, so a run has the same keys whether a configuration file or a Python
program made them. Arguments that only place or show a fit are left out, and so are the Trainer's defaults. Data and
base weights are hashed elsewhere (`freemerge.pipeline.store.artifacts`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from freemerge.checkpoints import hash_tensors
from freemerge.names import class_name
from freemerge.pipeline.settings import FitSettings, Settings
from freemerge.training import FineTuner

_PRESENTATION = frozenset({
    "accelerator", "devices", "num_nodes", "strategy", "logger", "enable_progress_bar", "enable_model_summary",
    "log_every_n_steps", "default_root_dir", "profiler", "detect_anomaly", "enable_autolog_hparams",
})  # fmt: skip
_NOT_RESULTS = frozenset({
    "training", "gradient_checkpointing", "name_or_path", "warnings_issued",  # of transformers' models
    "head", "objective", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices",
})  # fmt: skip
"""Attributes of modules that change no result, or that are set for each task."""


def dependencies(tuner: FineTuner, trainer: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The configuration by top-level key (model, trainer, pretrain, …), as plain data.

    Args:
        tuner: the template; the weights of its backbone are not included.
        trainer: arguments of the Trainer.
        settings: the stages' settings.

    Returns:
        Key → plain data, which JSON can hold.
    """
    stages = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {
        "model": _model(tuner),
        "trainer": _trainer(trainer),
        **{name: _settings(stage) for name, stage in stages.items()},
    }


def _model(tuner: FineTuner) -> dict[str, Any]:
    attributes = {name: value for name, value in _public(tuner).items() if name not in ("optimizer", "schedule")}
    return {
        "class": class_name(type(tuner)),
        **plain(attributes),
        **_optimization(tuner.optimizer, tuner.schedule),
        "backbone": {
            "class": class_name(type(tuner.backbone)),
            **plain(_public(tuner.backbone)),
            "model": _architecture(tuner.backbone.model),
        },
    }


def _trainer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that differ from the Trainer's defaults and may change a result."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(L.Trainer.__init__).parameters.items()}
    given = {}
    for name, value in arguments.items():
        if name in _PRESENTATION or value is defaults.get(name) or (name == "callbacks" and not value):
            continue
        described = plain([value] if name == "callbacks" and not isinstance(value, (list, tuple)) else value)
        if described != plain(defaults.get(name)):
            given[name] = described
    return given


def _settings(stage: Any) -> dict[str, Any]:
    left_out = ("cache", "share")  # a place, and the former name of `fraction`
    values = {field.name: getattr(stage, field.name) for field in fields(stage) if field.name not in left_out}
    others = {name: value for name, value in values.items() if name not in ("trainer", "optimizer", "schedule")}
    described = plain(others)
    if "trainer" in values:
        described["trainer"] = _trainer(values["trainer"])
    if isinstance(stage, FitSettings):
        described |= _optimization(stage.optimizer, stage.schedule)
    return described


def _optimization(optimizer: Callable | None, schedule: Any) -> dict[str, Any]:
    """Describe an optimizer and a schedule by what they make: a class, a partial and a lambda may mean the same."""
    try:
        made = (optimizer or torch.optim.AdamW)([nn.Parameter(torch.zeros(2, 2))])
    except Exception:  # it needs the model's own parameters: describe the function instead
        return {"optimizer": plain(optimizer), "schedule": plain(schedule)}
    groups = [{key: plain(value) for key, value in group.items() if key != "params"} for group in made.param_groups]
    one = groups[0] if len(groups) == 1 else {"groups": groups}
    described = {"optimizer": {"class": class_name(type(made)), **one}}
    if not callable(schedule):
        return {**described, "schedule": schedule}
    scheduler = schedule(made)
    state = {key: value for key, value in scheduler.state_dict().items() if not key.startswith("_")}
    return {**described, "schedule": {"class": class_name(type(scheduler)), **plain(state)}}


def _public(module: nn.Module) -> dict[str, Any]:
    """A module's public attributes, without parameters and submodules."""
    return {
        name: value for name, value in vars(module).items() if not name.startswith("_") and name not in _NOT_RESULTS
    }


def _architecture(module: nn.Module) -> dict[str, Any]:
    """A module's class, and a hash of its submodules' classes and attributes."""
    parts = [
        [name, class_name(type(part)), {key: value for key, value in _public(part).items() if _is_simple(value)}]
        for name, part in module.named_modules()
    ]
    text = json.dumps(plain(parts), sort_keys=True)
    return {"class": class_name(type(module)), "architecture": hashlib.sha256(text.encode()).hexdigest()}


def _is_simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_simple(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool)) or inspect.isroutine(value)


def plain(value: Any, parents: tuple[int, ...] = ()) -> Any:
    """Convert a value to plain data that is equal for equal values, in every process and wherever files are.

    Args:
        value: the value. An object becomes its class and its public attributes.
        parents: the ids of the objects that contain it, which end a recursion.

    Returns:
        Data that JSON can hold.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, (str, Path)):
        return _without_folder(str(value))
    if isinstance(value, Enum):
        return plain(value.value, parents)
    if isinstance(value, Tensor):
        return hash_tensors({"": value})
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if id(value) in parents:
        return class_name(type(value))
    parents = (*parents, id(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item, parents) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, parents) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, parents) for item in value), key=json.dumps)
    if isinstance(value, partial):
        return {"function": plain(value.func), "args": plain(value.args), "keywords": plain(value.keywords)}
    if isinstance(value, nn.Module):
        return {**_architecture(value), "weights": hash_tensors(value.state_dict())}
    if hasattr(value, "__qualname__"):
        return _function(value)
    if callable(getattr(value, "to_dict", None)):  # a configuration of PEFT or transformers
        return {"class": class_name(type(value)), **plain(value.to_dict(), parents)}
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(getattr(value, "__dict__", ()))
    attributes = {name: getattr(value, name) for name in names if not name.startswith("_")}
    return {"class": class_name(type(value)), **plain(attributes, parents)}


def _function(function: Any) -> str:
    """The name of a class or function; for a lambda, its place and a hash of its code."""
    code = getattr(function, "__code__", None)
    if function.__qualname__.endswith("<lambda>") and code is not None:
        digest = hashlib.sha256(code.co_code + repr((code.co_consts, code.co_names)).encode()).hexdigest()
        return f"{class_name(function)} {digest[:16]}"
    return class_name(function)


def _without_folder(text: str) -> str:
    """The name of a file or folder without its path; its content is hashed elsewhere."""
    return Path(text).name if "/" in text and Path(text).exists() else text
