"""Adapters that PEFT computes, if it is installed: LoHa, LoKr, VeRA, OFT, AdaLoRA and others.

For each tensor a single layer like the base's is built and adapted by PEFT according to the configuration; the change
of the layer's weight is the difference. So at most one layer of the base is in memory, and the result is PEFT's own.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.adapters.changes import BaseReader, Change, Run
from freemerge.checkpoints.formats.adapters.config import AdapterConfig, shown
from freemerge.checkpoints.formats.adapters.layers import Layer, find_layer
from freemerge.checkpoints.formats.adapters.patterns import PatternMatcher
from freemerge.checkpoints.memory import flat_range
from freemerge.errors import CheckpointError

_Answer = TypeVar("_Answer")

# Prefixes of a module's tensor names, by the kind of adapter.
_PREFIXES = {
    "ADALORA": "lora_", "BOFT": "boft_", "C3A": "c3a_", "DELORA": "delora_", "FOURIERFT": "fourierft_",
    "GRALORA": "gralora_", "HIRA": "hira_", "HRA": "hra_", "LOHA": "hada_", "LOKR": "lokr_", "LORA": "lora_",
    "MISS": "miss_", "OFT": "oft_", "RANDLORA": "randlora_", "ROAD": "road_", "SHIRA": "shira_", "VBLORA": "vblora_",
    "VERA": "vera_lambda_", "WAVEFT": "waveft_",
}  # fmt: skip
# Their layers share tensors, whose sizes depend on all layers.
_SHARING = {"RANDLORA", "VBLORA", "VERA"}
# Their differences do not depend on the base's values, and PEFT returns them directly.
_ADDED = {"ADALORA", "C3A", "FOURIERFT", "LOHA", "LOKR", "RANDLORA", "VBLORA", "VERA", "WAVEFT"}
# Before PEFT reads the file, it removes the ranks that training has dropped.
_SIZED_LATER = {"ADALORA"}
_CHANGE_BIASES = {"ROAD"}
# Variants of LoRA that cannot be merged, or that change the layers of a model.
_NO_DIFFERENCE = {"alora_invocation_tokens", "arrow_config", "layer_replication", "use_qalora"}
# Settings that select layers or other trained parts; the names in the file give both.
_CHOICES = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "trainable_token_indices")
_MOST = 1 << 16  # bound on ranks, vectors and blocks: PEFT allocates tensors of these sizes before it reads the file
_SIZES = re.compile(r"r|init_r|target_r|l|num_vectors|vector_length|\w*block_size|\w*block_num|\w+_k")
_KEPT = 2  # modules whose differences are cached while the chunks of their tensors are read


def can_compute(config: AdapterConfig) -> bool:
    """Whether PEFT computes this kind of adapter."""
    return config.kind in _PREFIXES and config.variant not in _NO_DIFFERENCE


@dataclass(frozen=True)
class PeftModules:
    """The modules of an adapter that PEFT computes.

    Args:
        config: the adapter's configuration.
        weights: its file.
        modules: module → names of its tensors in the file.
        shared: names of the tensors that all modules share.
    """

    config: AdapterConfig
    weights: Checkpoint
    modules: Mapping[str, tuple[str, ...]]
    shared: tuple[str, ...]

    @cached_property
    def stored(self) -> frozenset[str]:
        """The names of all these tensors in the file."""
        return frozenset((*self.shared, *(name for own in self.modules.values() for name in own)))

    def changes(self, base: Checkpoint | None) -> dict[str, Change]:
        """The changes of the base by its tensor names.

        Raises:
            CheckpointError: PEFT cannot adapt the layer, or is not installed.
        """
        layers = None
        if base is not None:
            layers = _Layers(self, base)
            layers.check()
        found: dict[str, Change] = {}
        for module in self.modules:
            found[f"{module}.weight"] = _Computed(f"{module}.weight", module, layers)
            if self.config.kind in _CHANGE_BIASES:
                found[f"{module}.bias"] = _Computed(f"{module}.bias", module, layers, optional=True)
        return found


def find_modules(config: AdapterConfig, weights: Checkpoint, names: Iterable[str], root: str) -> PeftModules:
    """The modules that PEFT computes, found by the names in an adapter's file.

    Args:
        config: the adapter's configuration, see `can_compute`.
        weights: its file.
        names: names of the tensors in the file.
        root: prefix of the module names.

    Raises:
        CheckpointError: PEFT is not installed, or the file has no tensor of such an adapter.
    """
    folder = config.path.parent
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"{folder}: is a {config.kind} adapter, for which PEFT is needed: pip install 'freemerge[peft]'"
        )
    of_module = re.compile(rf"{re.escape(root)}(.+?)\.(?:base_layer\.)?{re.escape(_PREFIXES[config.kind])}.+")
    modules: dict[str, list[str]] = {}
    shared = []
    for name in names:
        if found := of_module.fullmatch(name):
            modules.setdefault(found[1], []).append(name)
        elif not name.startswith(root):
            shared.append(name)
    if not modules:
        raise CheckpointError(f"{folder}: holds no tensor of a {config.kind} adapter; is it a whole model?")
    return PeftModules(config, weights, {module: tuple(own) for module, own in modules.items()}, tuple(shared))


@dataclass(frozen=True)
class _Computed(Change):
    """A difference that PEFT computes."""

    name: str
    module: str
    layers: _Layers | None
    optional: bool = False
    needs_base = True

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        return base or (0,)

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        assert self.layers is not None  # values are only read after the adapter is bound to its base
        whole = self.layers.difference(self.module, self.name)
        return whole.clone() if run is None else flat_range(whole, *run)


@dataclass(frozen=True)
class _Layers:
    """The base's layers, adapted by PEFT one at a time."""

    adapter: PeftModules
    base: Checkpoint
    # PEFT draws random numbers, and layers are inserted and removed
    lock: threading.Lock = field(default_factory=threading.Lock)
    recent: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse settings that PEFT does not accept, before anything is read."""
        self._asking(next(iter(self.adapter.modules)), lambda: self._settings(tuple(self.adapter.modules)[:1]))

    def difference(self, module: str, name: str) -> Tensor:
        """The change of a tensor, (*shape) float32."""
        with self.lock:
            if module not in self.recent:
                found = self._compute(module)
                while len(self.recent) >= _KEPT:
                    self.recent.pop(next(iter(self.recent)))
                self.recent[module] = found
            return self.recent[module][name]

    def _compute(self, module: str) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return self._asking(module, lambda: self._ask(module))

    def _ask(self, module: str) -> dict[str, Tensor]:
        """The changes of a module's tensors by PEFT, (*shape) float32 each, by name."""
        kind = self.adapter.config.kind
        if kind in _SHARING:
            if not self.models:
                self.models[""] = self._adapt(tuple(self.adapter.modules))
            model = self.models[""]
        else:
            model = self._adapt((module,))
        layer: Any = model.get_submodule(f"base_model.model.{module}")
        if kind in _ADDED:
            weight = f"{module}.weight"
            delta = layer.get_delta_weight("default").float()
            return {weight: delta.reshape(self.base.spec(weight).shape).contiguous()}
        before = {key: value.detach().clone() for key, value in layer.get_base_layer().named_parameters()}
        layer.merge(adapter_names=["default"])
        after = dict(layer.get_base_layer().named_parameters())
        return {f"{module}.{key}": after[key].detach().float() - before[key] for key in before}

    def _asking(self, module: str, ask: Callable[[], _Answer]) -> _Answer:
        """Call PEFT; its many kinds of errors become a CheckpointError."""
        config = self.adapter.config
        try:
            return ask()
        except CheckpointError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{config.path.parent}: PEFT cannot compute what this {config.kind} adapter does to '{module}' "
                f"({type(error).__name__}: {reason}); save the adapter again with the PEFT that is installed"
            ) from None

    def _adapt(self, modules: tuple[str, ...]) -> nn.Module:
        """Build layers like the base's, without the rest of the model, with the adapter's tensors in them."""
        from peft import PeftModel
        from peft.utils import set_peft_model_state_dict

        holder = nn.Module()
        for module in modules:
            _put(holder, module, self._layer(module))
        empty = self.adapter.config.kind not in _SIZED_LATER
        model = PeftModel(holder, self._settings(modules), low_cpu_mem_usage=empty)
        stored = (*self.adapter.shared, *(name for module in modules for name in self.adapter.modules[module]))
        tensors = {name: self.adapter.weights.tensor(name).clone() for name in stored}
        result: Any = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=empty)
        missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        missing += [
            name for name in result.missing_keys if f".{_PREFIXES[self.adapter.config.kind]}" in name and not empty
        ]
        if wrong := [*result.unexpected_keys, *missing]:
            known = "is not in its file" if wrong[0] in missing else "is in its file and unknown to PEFT"
            raise CheckpointError(
                f"{self.adapter.config.path.parent}: '{wrong[0]}' of the adapter {known}; save the adapter again"
            )
        return model.eval()

    def _layer(self, module: str) -> nn.Module:
        """Build a layer like the base's, with its values, or without values where they are not needed."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        if not self.base.has(weight):
            raise CheckpointError(
                f"{self.adapter.config.path.parent}: adapts '{module}', which the base does not have; is this the base "
                "that the adapter was trained on?"
            )
        shape = tuple(self.base.spec(weight).shape)
        kind, biased = find_layer(self.base, weight), self.base.has(bias)
        with torch.device("meta"):
            if kind is Layer.EMBEDDING:
                layer: nn.Module = nn.Embedding(shape[0], shape[1])
            elif kind is Layer.TRANSPOSED:
                from transformers.pytorch_utils import Conv1D  # PEFT recognizes such layers by this class

                layer = Conv1D(shape[1], shape[0])
            elif kind is Layer.CONVOLUTION:
                convolution: type[nn.Module] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
                layer = convolution(shape[1], shape[0], shape[2:], bias=biased)
            elif kind is Layer.LINEAR:
                layer = nn.Linear(shape[1], shape[0], bias=biased)
            else:
                raise CheckpointError(
                    f"{self.adapter.config.path.parent}: adapts '{module}', whose weight {list(shape)} does not "
                    "belong to a supported layer; merge the adapter into its base model with PEFT first"
                )
        if self.adapter.config.kind in _ADDED:
            values = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in layer.named_parameters()}
        else:
            values = {
                name: self.base.tensor(f"{module}.{name}").float().cpu().clone() for name, _ in layer.named_parameters()
            }
        for name, value in values.items():
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
        return layer

    def _settings(self, modules: tuple[str, ...]) -> Any:
        """PEFT's configuration of these modules: their names, and the values that patterns give them."""
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        config = self.adapter.config
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.kind)]
        values = {key: value for key, value in config.values.items() if key not in ("auto_mapping", "runtime_config")}
        known = {setting.name for setting in fields(kind)}
        if unknown := [key for key, value in values.items() if key not in known and value]:
            raise CheckpointError(
                f"{config.path}: has the setting '{unknown[0]}', which the installed PEFT does not know; update PEFT"
            )
        for key, value in values.items():
            if isinstance(value, int) and _SIZES.fullmatch(key) and value > _MOST:
                raise CheckpointError(
                    f"{config.path}: {key} is {shown(value)}, expected at most {_MOST}; save it again"
                )
        values = {key: value for key, value in values.items() if key in known}
        values |= {key: None for key in _CHOICES if key in known}
        values |= {"target_modules": list(modules), "task_type": None, "inference_mode": True}
        for key in ("rank_pattern", "alpha_pattern"):
            if values.get(key):
                values[key] = self._meaning(key, values[key], modules)
        return kind.from_peft_type(**values)

    def _meaning(self, key: str, patterns: Mapping[str, Any], modules: tuple[str, ...]) -> dict[str, Any]:
        if self.adapter.config.kind == "ADALORA":  # tensor names, and the ranks that they keep
            return {name: kept for name, kept in patterns.items() if any(f".{m}." in f".{name}" for m in modules)}
        matcher = PatternMatcher(patterns, f"{self.adapter.config.path}: {key}")
        found = {module: matcher.find(module) for module in modules}
        return {f"^{re.escape(module)}": patterns[pattern] for module, pattern in found.items() if pattern is not None}


def _put(holder: nn.Module, name: str, layer: nn.Module) -> None:
    """Insert a layer at its dotted name, creating empty parent modules."""
    *path, last = name.split(".")
    for part in path:
        if part not in dict(holder.named_children()):
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    holder.add_module(last, layer)
