"""Open the folder of an adapter: what its configuration says, and what each of its tensors does to the base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints.adapters.changes import Change, Rows, Run, Scaled, ScaledVector
from freemerge.checkpoints.adapters.layers import is_turned
from freemerge.checkpoints.adapters.lora import Decomposed, LowRank, find_scale
from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.errors import CheckpointError

PREFIX = "base_model.model."  # PEFT's two wrappers around the model
CONFIG = "adapter_config.json"

_KINDS = {"LORA": "LoRA", "IA3": "(IA)³"}
# Ways to begin a LoRA that take its beginning out of the base's weight: its factors differ from another base.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
# Settings called like variants of LoRA that do not change what the factors mean.
_HARMLESS = {
    "use_rslora", "use_dora", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config",
}  # fmt: skip
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_TUNED = re.compile(r"(.+?)\.(lora_.+|ia3_l|(?:token_adapter\.)?trainable_tokens_delta)")


def open_adapter(folder: Path, label: str, weights: Checkpoint) -> Checkpoint:
    """A checkpoint over a LoRA, DoRA or (IA)³ adapter: `deltas` names the tensors that are differences to the base.

    Tensors that the adapter holds whole (modules_to_save, biases) are given as they are; tensors of the base that it
    does not name are unchanged. Differences that depend on the base's values can be read after `Checkpoint.on`.

    Args:
        folder: holds `adapter_config.json`.
        label: how messages call this model.
        weights: the opened `adapter_model.safetensors` or `.bin` of this folder.

    Raises:
        CheckpointError: the configuration is broken, or the adapter does something that is not known here.
    """
    parser = _Parser(folder, _read_config(folder), weights)
    changes: dict[str, Change] = {}
    whole: dict[str, str] = {}
    for name, module, kind in _split(dict.fromkeys((*weights.names, *weights.tied))):
        if kind is None:
            # Of a layer inside its wrapper the bias may be trained, but the weight is the base's own; and with
            # bias="all" PEFT saves the biases of a module to save three times, the untrained ones as well.
            if ".original_module." not in name and (".base_layer." not in name or module.endswith(".bias")):
                whole[module.replace(".modules_to_save.", ".")] = name
            continue
        if ".base_layer." in name:
            raise CheckpointError(
                f"{folder}: '{name}' is of torch's MultiheadAttention, to whose out_proj PEFT may add its difference "
                "twice; merge the adapter into its base model with the PEFT that trained it first"
            )
        for target, change in parser.changes(name, module, kind).items():
            if target in changes:
                raise CheckpointError(f"{folder}: the adapter changes the tensor '{target}' in two ways")
            changes[target] = change
    if not changes:
        raise CheckpointError(f"{folder}: holds no LoRA factors and no (IA)³ vectors; is it a whole model?")
    if both := sorted(changes.keys() & whole.keys()):
        raise CheckpointError(f"{folder}: the adapter holds the tensor '{both[0]}' and changes it as well")
    return _Adapter(folder, label, weights, changes, whole).checkpoint(None)


@dataclass(frozen=True)
class _Adapter:
    """What an adapter does, by the names of the base's tensors."""

    folder: Path
    label: str
    weights: Checkpoint
    changes: Mapping[str, Change]
    whole: Mapping[str, str]  # name → name in the file

    def checkpoint(self, base: Checkpoint | None) -> Checkpoint:
        """The adapter alone, or as a change of its base."""
        shapes: dict[str, tuple[int, ...]] = {}
        changes = self.changes
        if base is not None:
            shapes = {name: base.spec(name).shape for name in changes if base.has(name)}
            changes = self._oriented(changes, shapes, base)
        changes = {name: change for name, change in changes.items() if name in shapes or not change.optional}
        specs = {name: TensorSpec(change.shape(shapes.get(name)), torch.float32) for name, change in changes.items()}
        specs |= {name: self.weights.spec(stored) for name, stored in self.whole.items()}

        def read(name: str, run: Run) -> Tensor:
            if name in self.whole:
                return _read(self.weights, self.whole[name], run)
            if changes[name].needs_base and name not in shapes:
                raise CheckpointError(
                    f"{self.label}: how the adapter changes '{name}' depends on its base; merge it with its base, or "
                    "open it as open_checkpoint(adapter).on(open_checkpoint(base))"
                )
            return changes[name].read(specs[name].shape, run, lambda part: _read(base, name, part).float())

        return Checkpoint(
            self.label,
            specs,
            read,
            deltas=changes,
            partial=True,
            source=self.weights,
            bind=self.checkpoint if base is None else None,
        )

    def _oriented(
        self, changes: Mapping[str, Change], shapes: Mapping[str, tuple[int, ...]], base: Checkpoint
    ) -> dict[str, Change]:
        """The changes, each in the orientation in which the base holds its weight.

        PEFT saves one `fan_in_fan_out` for all modules, and in models that have layers of both orientations (GPT-2 and
        its head) it is that of the last one. Shapes tell, but for square weights.
        """
        fits = {name: changes[name].orientations(shape) for name, shape in shapes.items()}
        contradicted = next((name for name, fit in fits.items() if fit and changes[name].turned not in fit), None)
        turned = {name: change.turned for name, change in changes.items()}
        for name, fit in fits.items():
            if len(fit) == 1:
                turned[name] = fit[0]
            elif not fit and changes[name].needs_base:  # whoever compares shapes will see the others
                shape = list(changes[name].shape(shapes[name]))
                raise CheckpointError(
                    f"{self.label}: its change of the tensor '{name}' has shape {shape}, expected "
                    f"{list(shapes[name])} as in the base; is this the base that the adapter was trained on?"
                )
            elif fit and contradicted:
                told = is_turned(base, name)
                if told is None:
                    raise CheckpointError(
                        f"{self.folder / CONFIG}: fan_in_fan_out does not hold for '{contradicted}', so it cannot be "
                        f"told whether '{name}', which is square, is transposed; merge the adapter into its base model "
                        "with PEFT first"
                    )
                turned[name] = told
        return {name: change.turn(turned[name]) for name, change in changes.items()}


def _read(checkpoint: Checkpoint, name: str, run: Run) -> Tensor:
    return checkpoint.tensor(name) if run is None else checkpoint.run(name, *run)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an adapter's configuration ({error}); save it again") from None
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.match(start):
        raise CheckpointError(
            f"{path}: init_lora_weights is '{start}', so its factors do not differ from the base as published; save it "
            "again with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    unknown = [key for key, value in config.items() if value and _is_variant(key)]
    if kind not in _KINDS or unknown:
        what = f"a LoRA adapter with {unknown[0]}" if kind in _KINDS else f"a {kind} adapter"
        raise CheckpointError(
            f"{folder}: is {what}, only LoRA, DoRA and (IA)³ are read; merge it into its base model with PEFT first"
        )
    return config


def _is_variant(key: str) -> bool:
    """Whether a setting makes of LoRA something else, today's variants and those to come."""
    if key in ("target_parameters", "layer_replication", "alora_invocation_tokens"):
        return True
    return key.startswith("use_") or key.endswith("_config") if key not in _HARMLESS else False


def _split(names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each stored name, its module and what of it it is: `base_model.model.layer.q.lora_A.weight` → `layer.q`,
    `lora_A.weight`. Of whole tensors their name in the base, and None.
    """
    for name in names:
        inner = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        found = _TUNED.fullmatch(inner)
        yield (name, found[1], found[2]) if found else (name, inner, None)


@dataclass(frozen=True)
class _Parser:
    """Understands the tensors of an adapter's file, one by one."""

    folder: Path
    config: Mapping[str, Any]
    weights: Checkpoint
    recent: dict[str, Tensor] = field(default_factory=dict)

    def changes(self, name: str, module: str, kind: str) -> dict[str, Change]:
        """What one stored tensor does to which tensors of the base; two factors are found by the first, A."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        if kind == "ia3_l":
            scaled = Scaled(self.weights, name, self._is_feedforward(module), bool(self.config.get("fan_in_fan_out")))
            if scaled.inputs:
                return {weight: scaled}
            return {weight: scaled, bias: replace(scaled, turned=False, optional=True)}
        if kind.endswith("trainable_tokens_delta"):
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
                f"{self.folder}: holds '{name}', which belongs to no LoRA known here; merge the adapter into its base "
                "model with PEFT first"
            )
        return {}

    def _pair(self, name: str, stem: str, module: str, embedding: bool) -> Change:
        other = stem + ("lora_embedding_B" if embedding else "lora_B.weight")
        if not self.weights.has(other):
            raise CheckpointError(f"{self.folder}: the adapter has '{name}' and no '{other}'; save it again")
        right, left = self.weights.spec(name).shape, self.weights.spec(other).shape
        if len(left) != len(right) or len(left) < 2 or left[1] != right[0] or any(size != 1 for size in left[2:]):
            raise CheckpointError(
                f"{self.folder}: '{name}' {list(right)} and '{other}' {list(left)} are no two factors of a matrix; is "
                "it of a convolution in groups? Merge the adapter into its base model with PEFT first"
            )
        turned = embedding or (len(left) == 2 and bool(self.config.get("fan_in_fan_out")))
        pair = LowRank(self.weights, other, name, self._scale(module, name), self.recent, turned, fixed=embedding)
        magnitude = next((stem + kind for kind in _MAGNITUDES if self.weights.has(stem + kind)), None)
        if bool(self.config.get("use_dora")) != (magnitude is not None):
            raise CheckpointError(
                f"{self.folder}: use_dora is {bool(self.config.get('use_dora'))} in {CONFIG}, but '{stem}' has "
                f"{'a' if magnitude else 'no'} lora_magnitude_vector; save the adapter again"
            )
        return Decomposed(pair, magnitude) if magnitude else pair

    def _scale(self, module: str, factor: str) -> float:
        return find_scale(self.config, module, rank=self.weights.spec(factor).shape[0])

    def _is_feedforward(self, module: str) -> bool:
        patterns = self.config.get("feedforward_modules") or ()
        if isinstance(patterns, str):
            return re.fullmatch(patterns, module) is not None
        return any(module.endswith(pattern) for pattern in patterns)

    def _find_indices(self, name: str, module: str) -> tuple[int, ...]:
        indices = self.config.get("trainable_token_indices") or self.config.get("token_indices") or ()
        if isinstance(indices, dict):
            indices = next((own for key, own in indices.items() if f".{module}".endswith(f".{key}")), ())
        if len(indices) != self.weights.spec(name).shape[0]:
            raise CheckpointError(
                f"{self.folder / CONFIG}: lists {len(indices)} trainable tokens for '{module}', and the adapter has "
                f"{self.weights.spec(name).shape[0]}; save it again"
            )
        return tuple(int(index) for index in indices)
