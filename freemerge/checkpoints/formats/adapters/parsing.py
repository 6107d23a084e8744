"""Parse the tensor names of an adapter's file: which change of which base tensor each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.adapters.changes import Change, Rows, Scaled, ScaledVector
from freemerge.checkpoints.formats.adapters.config import CONFIG, AdapterConfig
from freemerge.checkpoints.formats.adapters.lora import Decomposed, LowRank
from freemerge.checkpoints.formats.adapters.stacked import StackedModule
from freemerge.errors import CheckpointError

PREFIX = "base_model.model."  # PEFT's two wrappers around the model

_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_MOST_PARAMETERS = 6  # parameters of one module with factors; all assignments are tried
_WRAPPED = re.compile(r"(?:\.base_layer)+\.")
_TUNED = re.compile(r"(.+?)\.(lora_.+|ia3_l|(?:token_adapter\.)?trainable_tokens_delta)")


def split_names(names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each stored name with its module and its role in the module: `base_model.model.layer.q.lora_A.weight` →
    `layer.q`, `lora_A.weight`. For whole tensors, their name in the base and None.
    """
    for name in names:
        inner = _WRAPPED.sub(".", name.removeprefix(PREFIX))
        found = _TUNED.fullmatch(inner)
        yield (name, found[1], found[2]) if found else (name, inner, None)


@dataclass(frozen=True)
class Parser:
    """Parses the tensors of an adapter's file, one by one."""

    folder: Path
    config: AdapterConfig
    weights: Checkpoint
    recent: dict[str, Tensor] = field(default_factory=dict)

    def parse(self, names: Iterable[str]) -> tuple[dict[str, Change], list[StackedModule], list[str]]:
        """The changes of single tensors, the modules whose parameters have factors, and the names of the rest."""
        parts = list(split_names(names))
        stacked = self._stacked(parts)
        of_parameters = {name for module in stacked for level in module.levels for name in level}
        changes: dict[str, Change] = {}
        rest = []
        for name, module, kind in parts:
            if name in of_parameters:
                continue
            if kind is None:
                rest.append(name)
                continue
            if ".base_layer." in name:
                raise CheckpointError(
                    f"{self.folder}: '{name}' is of torch's MultiheadAttention, to whose out_proj PEFT may add its "
                    "difference twice; merge the adapter into its base model with the PEFT that trained it first"
                )
            for target, change in self._changes(name, module, kind).items():
                if target in changes:
                    raise CheckpointError(f"{self.folder}: the adapter changes the tensor '{target}' in two ways")
                changes[target] = change
        return changes, stacked, rest

    def _changes(self, name: str, module: str, kind: str) -> dict[str, Change]:
        """The changes of base tensors by one stored tensor; a pair of factors is handled at A."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        shape, dtype = self.weights.spec(name)
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"{self.folder}: '{name}' has dtype {dtype}, expected a floating-point one; save it again"
            )
        if kind == "ia3_l":
            scaled = Scaled(self.weights, name, self.config.is_feedforward(module), self.config.flag("fan_in_fan_out"))
            if scaled.inputs:
                return {weight: scaled}
            return {weight: scaled, bias: replace(scaled, transposed=False, optional=True)}
        if kind.endswith("trainable_tokens_delta"):
            if len(shape) != 2:
                raise CheckpointError(f"{self.folder}: '{name}' has shape {list(shape)}, expected rows of an embedding")
            return {weight: Rows(self.weights, name, self._find_indices(name, module))}
        stem = name.removesuffix(kind)
        if kind in ("lora_A.weight", "lora_embedding_A"):
            return {weight: self._pair(name, stem, module, embedding=kind == "lora_embedding_A")}
        if kind == "lora_B.bias":
            return {bias: ScaledVector(self.weights, name, self._scale(module, stem + "lora_A.weight"))}
        factor = stem + ("lora_embedding_A" if kind == "lora_embedding_B" else "lora_A.weight")
        known = kind in ("lora_B.weight", "lora_embedding_B", *_MAGNITUDES)
        if not known or (not self.weights.has(factor) and not self.weights.has(stem + "lora_embedding_A")):
            raise CheckpointError(
                f"{self.folder}: holds '{name}', which is not part of a supported LoRA; merge the adapter into its "
                "base "
                "model with PEFT first"
            )
        return {}

    def _stacked(self, names: Iterable[tuple[str, str, str | None]]) -> list[StackedModule]:
        """The modules with factors of parameters that `target_parameters` names.

        Args:
            names: see `split_names`.
        """
        wrappers: dict[str, list[str]] = {}
        for name, module, kind in names:
            if kind == "lora_A.weight" and self.config.parameters(module):
                wrappers.setdefault(module, []).append(name)
        found = []
        for module, rights in wrappers.items():
            parameters = self.config.parameters(module)
            rights.sort(key=lambda name: name.count("base_layer."))
            levels = tuple((right.removesuffix("lora_A.weight") + "lora_B.weight", right) for right in rights)
            for left, right in levels:
                self._check_pair(right, left)
            if not len(levels) <= len(parameters) <= _MOST_PARAMETERS:
                raise CheckpointError(
                    f"{self.folder}: has factors of {len(levels)} parameters of '{module}', and target_parameters in "
                    f"{CONFIG} names {len(parameters)}; save the adapter again"
                )
            found.append(StackedModule(module, parameters, levels, self.weights, self.config, self.recent))
        return found

    def _pair(self, name: str, stem: str, module: str, embedding: bool) -> Change:
        other = stem + ("lora_embedding_B" if embedding else "lora_B.weight")
        left, _ = self._check_pair(name, other)
        transposed = embedding or (len(left) == 2 and self.config.flag("fan_in_fan_out"))
        pair = LowRank(self.weights, other, name, self._scale(module, name), self.recent, transposed, fixed=embedding)
        magnitude = next((stem + kind for kind in _MAGNITUDES if self.weights.has(stem + kind)), None)
        if self.config.flag("use_dora") != (magnitude is not None):
            raise CheckpointError(
                f"{self.folder}: use_dora is {self.config.flag('use_dora')} in {CONFIG}, but '{stem}' has "
                f"{'a' if magnitude else 'no'} lora_magnitude_vector; save the adapter again"
            )
        if magnitude is None:
            return pair
        found = self.weights.spec(magnitude).shape
        if torch.Size(found).numel() != left[0]:
            raise CheckpointError(
                f"{self.folder}: '{magnitude}' has shape {list(found)}, expected {left[0]} numbers as '{other}' tells"
            )
        return Decomposed(pair, magnitude)

    def _check_pair(self, name: str, other: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of B and A, checked to be multipliable."""
        if not self.weights.has(other):
            raise CheckpointError(f"{self.folder}: the adapter has '{name}' and no '{other}'; save it again")
        right, left = self.weights.spec(name).shape, self.weights.spec(other).shape
        if len(left) != len(right) or len(left) < 2 or left[1] != right[0] or any(size != 1 for size in left[2:]):
            raise CheckpointError(
                f"{self.folder}: '{name}' {list(right)} and '{other}' {list(left)} are not the factors of one "
                "matrix; is it a grouped convolution? Merge the adapter into its base model with PEFT first"
            )
        if right[0] == 0:
            raise CheckpointError(
                f"{self.folder}: '{name}' {list(right)} is a factor of rank 0; train the adapter again"
            )
        return left, right

    def _scale(self, module: str, factor: str) -> float:
        return self.config.scale(module, rank=self.weights.spec(factor).shape[0])

    def _find_indices(self, name: str, module: str) -> tuple[int, ...]:
        indices = self.config.token_indices(module)
        if len(indices) != self.weights.spec(name).shape[0]:
            raise CheckpointError(
                f"{self.folder / CONFIG}: lists {len(indices)} trainable tokens for '{module}', and the adapter has "
                f"{self.weights.spec(name).shape[0]}; save it again"
            )
        return indices
