"""The settings of `adapter_config.json`, checked for types and feasible sizes before they are used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch

from freemerge.checkpoints.formats.adapters.patterns import PatternMatcher
from freemerge.checkpoints.json_files import read_object
from freemerge.errors import CheckpointError

CONFIG = "adapter_config.json"

_Item = TypeVar("_Item")

_LARGEST_NUMBER = torch.finfo(torch.float32).max
# Initializations that subtract the initial LoRA from the base's weight: the factors differ from a modified base.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
# Settings named like LoRA variants that do not change the meaning of the factors.
_HARMLESS = {
    "use_rslora", "use_dora", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter.

    Args:
        path: path of the file, for messages.
        kind: PEFT's name for the method, such as "LORA".
        values: all settings of the file; `read_config` checks those that the properties return.
    """

    path: Path
    kind: str
    values: Mapping[str, Any] = field(repr=False)

    def scale(self, module: str, rank: int) -> float:
        """s = α/r, or α/√r with rsLoRA; `alpha_pattern` may set α for modules whose names end with a pattern.

        Args:
            module: the module's name.
            rank: r, of the stored factors, whatever the configuration says.
        """
        pattern = self._alphas.find(module)
        alpha = self.values.get("lora_alpha", 8) if pattern is None else self.values["alpha_pattern"][pattern]
        return alpha / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def flag(self, key: str) -> bool:
        """Whether a setting is enabled."""
        return bool(self.values.get(key))

    def is_feedforward(self, module: str) -> bool:
        """Whether (IA)³ scales the inputs of a module rather than its outputs."""
        patterns = self.values.get("feedforward_modules") or ()
        if isinstance(patterns, str):
            return self._feedforward.find(module) is not None
        return any(module.endswith(pattern) for pattern in patterns)

    def is_target(self, module: str) -> bool:
        """Whether `target_modules` names a module."""
        targets = self.values.get("target_modules") or ()
        if isinstance(targets, str):
            return self._targets.find(module) is not None
        return any(f".{module}".endswith(f".{target}") for target in targets)

    def is_saved(self, module: str) -> bool:
        """Whether `modules_to_save` names a module, which was then trained as a whole."""
        names = self.values.get("modules_to_save")
        return isinstance(names, list) and any(f".{module}".endswith(f".{name}") for name in names)

    def parameters(self, module: str) -> tuple[str, ...]:
        """The parameters of a module that `target_parameters` matches by the ends of their names."""
        found: dict[str, None] = {}
        for target in self.values.get("target_parameters") or ():
            owner, _, parameter = target.rpartition(".")
            # A target without a module name would match every module, including those with their own factors.
            if f".{module}.{parameter}".endswith(f".{target}") and (owner or not self.is_target(module)):
                found[parameter] = None
        return tuple(found)

    def token_indices(self, module: str) -> tuple[int, ...]:
        """The trained rows of an embedding."""
        indices = self.values.get("trainable_token_indices") or self.values.get("token_indices") or ()
        if isinstance(indices, Mapping):
            indices = next((own for key, own in indices.items() if f".{module}".endswith(f".{key}")), ())
        return tuple(indices)

    @property
    def variant(self) -> str | None:
        """The setting that selects an unsupported variant of LoRA, including variants added in the future."""
        return next((key for key, value in self.values.items() if value and _is_variant(key)), None)

    @cached_property
    def _alphas(self) -> PatternMatcher:
        return PatternMatcher(self.values.get("alpha_pattern") or (), f"{self.path}: alpha_pattern")

    @cached_property
    def _targets(self) -> PatternMatcher:
        return PatternMatcher([self.values["target_modules"]], f"{self.path}: target_modules", whole=True)

    @cached_property
    def _feedforward(self) -> PatternMatcher:
        return PatternMatcher([self.values["feedforward_modules"]], f"{self.path}: feedforward_modules", whole=True)


def read_config(folder: Path) -> AdapterConfig:
    """Read and check the configuration of an adapter's folder.

    Raises:
        CheckpointError: it cannot be read, a setting has an invalid type or size, or the factors are relative to a base
            other than the published one.
    """
    path = folder / CONFIG
    values = read_object(path)
    _check(path, values)
    start = values.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.match(start):
        raise CheckpointError(
            f"{path}: init_lora_weights is '{start}', so its factors are not relative to the published base; save "
            "it again with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return AdapterConfig(path, values["peft_type"], values)


def _check(path: Path, values: Mapping[str, Any]) -> None:
    """Check the settings that are used, with one rule for each type of value."""

    def expect(right: bool, key: str, expected: str) -> None:
        if not right:
            raise CheckpointError(f"{path}: {key} is {shown(values.get(key))}, expected {expected}; save it again")

    expect(isinstance(values.get("peft_type"), str), "peft_type", "the name of a method, such as 'LORA'")
    for key in ("fan_in_fan_out", "use_dora", "use_rslora"):
        expect(isinstance(values.get(key, False), bool | None), key, "true or false")
    expect(_is_number(values.get("lora_alpha", 8)), "lora_alpha", "a finite number")
    for key in ("alpha_pattern", "rank_pattern"):
        patterns = values.get(key) or {}
        expect(isinstance(patterns, dict), key, "an object that maps names of modules to numbers")
        if key == "alpha_pattern":
            expect(all(map(_is_number, patterns.values())), key, "finite numbers only")
    for key in ("target_modules", "feedforward_modules"):
        names = values.get(key) or ()
        expect(isinstance(names, str) or _is_list(names, str), key, "a pattern or a list of names")
    expect(_is_list(values.get("target_parameters") or [], str), "target_parameters", "a list of names")
    for key in ("trainable_token_indices", "token_indices"):
        indices = values.get(key) or ()
        lists = indices.values() if isinstance(indices, dict) else [indices]
        expect(all(map(_is_indices, lists)), key, "a list of row numbers, or an object of such lists")


def _is_number(value: object) -> bool:
    """Whether a value is a number that float32 can represent; numbers in JSON may be larger, infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER


def _is_list(value: object, kind: type[_Item]) -> TypeGuard[Sequence[_Item]]:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _is_indices(value: object) -> bool:
    if not _is_list(value, int) or any(isinstance(item, bool) for item in value):
        return False
    return all(0 <= item < 1 << 31 for item in value) and len(set(value)) == len(value)


def shown(value: object) -> str:
    """A value as shortened JSON."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"


def _is_variant(key: str) -> bool:
    if key in ("layer_replication", "alora_invocation_tokens"):
        return True
    return key.startswith("use_") or key.endswith("_config") if key not in _HARMLESS else False
