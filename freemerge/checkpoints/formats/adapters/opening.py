"""Open the folder of an adapter: its configuration, and the change of the base by each of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.formats.adapters.changes import Change, Modules, Rows, Run
from freemerge.checkpoints.formats.adapters.config import AdapterConfig, read_config
from freemerge.checkpoints.formats.adapters.layers import is_transposed
from freemerge.checkpoints.formats.adapters.parsing import PREFIX, Parser, split_names
from freemerge.checkpoints.formats.adapters.peft_layers import can_compute, find_modules
from freemerge.errors import CheckpointError

_WRAPPERS = re.compile(r"\.(?:modules_to_save|ln_tuning_layers)\.")
_KINDS = {"LORA": "LoRA", "IA3": "(IA)³", "TRAINABLE_TOKENS": "trainable tokens", "LN_TUNING": "layer norms"}


def open_adapter(folder: Path, label: str, weights: Checkpoint) -> Checkpoint:
    """Open an adapter as a checkpoint whose `deltas` names the tensors that are differences to the base.

    LoRA, DoRA, (IA)³ and trained tokens are computed here, other kinds by PEFT.

    Tensors that the adapter stores whole (modules_to_save, biases) are returned unchanged; base tensors that it does
    not name are unchanged. Differences that depend on the base's values can be read after `Checkpoint.on`.

    Args:
        folder: the folder with `adapter_config.json`.
        label: the model's name in messages.
        weights: the opened `adapter_model.safetensors` or `.bin` of this folder.

    Raises:
        CheckpointError: the configuration is invalid, or the adapter has an unsupported kind of change.
    """
    config = read_config(folder)
    names = tuple(dict.fromkeys((*weights.names, *weights.tied)))
    changes, modules, rest = _read_changes(config, weights, names)
    whole = _find_whole(rest)
    changed: set[str] = set()
    for found in (changes, *(module.changes(None) for module in modules)):
        if twice := sorted(changed & found.keys()):
            raise CheckpointError(f"{folder}: the adapter changes the tensor '{twice[0]}' in two ways")
        changed |= found.keys()
    if both := sorted(changed & whole.keys()):
        raise CheckpointError(f"{folder}: the adapter stores the tensor '{both[0]}' and changes it as well")
    if not changed and not (config.kind == "LN_TUNING" and whole):
        raise CheckpointError(f"{folder}: holds no LoRA factors and no (IA)³ vectors; is it a whole model?")
    return _Adapter(config, label, weights, changes, modules, whole).checkpoint(None)


def _read_changes(
    config: AdapterConfig, weights: Checkpoint, names: Sequence[str]
) -> tuple[Mapping[str, Change], Sequence[Modules], Sequence[str]]:
    """The changes of single tensors, those of modules that need the base to be assigned, and the names of the rest."""
    if config.kind in _KINDS and config.variant is None:
        parser = Parser(config.path.parent, config, weights)
        return parser.parse(names)
    if can_compute(config):
        modules = find_modules(config, weights, names, PREFIX)
        return {}, [modules], [name for name in names if name not in modules.stored]
    what = f"a LoRA adapter with {config.variant}" if config.kind in _KINDS else f"a {config.kind} adapter"
    raise CheckpointError(
        f"{config.path.parent}: is {what}, whose difference to the base cannot be computed here; merge it into its "
        "base model "
        "with PEFT, if that can, or train a LoRA"
    )


def _find_whole(names: Iterable[str]) -> dict[str, str]:
    """Tensors that an adapter stores whole: name in the base → name in the file."""
    whole: dict[str, str] = {}
    for name, inner, _ in split_names(names):
        # In a wrapped layer the bias may be trained, but the weight is the base's own. With bias="all", PEFT saves the
        # biases of a module in modules_to_save three times, including the untrained ones.
        if ".original_module." not in name and (".base_layer." not in name or inner.endswith(".bias")):
            whole[_WRAPPERS.sub(".", inner)] = name
    return whole


@dataclass(frozen=True)
class _Adapter:
    """The changes of an adapter by the base's tensor names."""

    config: AdapterConfig
    label: str
    weights: Checkpoint
    changes: Mapping[str, Change]
    modules: Sequence[Modules]
    whole: Mapping[str, str]  # name → name in the file

    def checkpoint(self, base: Checkpoint | None) -> Checkpoint:
        """The adapter alone, or bound to its base."""
        changes = dict(self.changes) if base is None else self._oriented(base)
        for module in self.modules:
            changes |= module.changes(base)
        shapes = {} if base is None else {name: base.spec(name).shape for name in changes if base.has(name)}
        changes = {name: change for name, change in changes.items() if name in shapes or not change.optional}
        specs = {name: TensorSpec(change.shape(shapes.get(name)), torch.float32) for name, change in changes.items()}
        specs |= {name: self.weights.spec(stored) for name, stored in self.whole.items()}

        def read(name: str, run: Run) -> Tensor:
            def of_base(part: Run) -> Tensor:
                assert base is not None  # changes that need the base are refused below
                return _read(base, name, part).float()

            if name in self.whole:
                return _read(self.weights, self.whole[name], run)
            if changes[name].needs_base and name not in shapes:
                raise CheckpointError(
                    f"{self.label}: how the adapter changes '{name}' depends on its base; merge it with its base, or "
                    "open it as open_checkpoint(adapter).on(open_checkpoint(base))"
                )
            return changes[name].read(specs[name].shape, run, of_base)

        return Checkpoint(
            self.label,
            specs,
            read,
            deltas=changes,
            partial=True,
            alone=self._find_alone(changes),
            source=self.weights,
            bind=self.checkpoint if base is None else None,
        )

    def _find_alone(self, changes: Mapping[str, Change]) -> list[str]:
        """The changes that PEFT applies to one module and to no other that shares its weight.

        Trained tokens also apply to tied modules. Whole embeddings are saved as trained modules, or because their rows
        differ from the base's; the latter also apply to the head.
        """
        trained = [name for name in self.whole if self.config.is_saved(name.rpartition(".")[0])]
        return [*trained, *(name for name, change in changes.items() if not isinstance(change, Rows))]

    def _oriented(self, base: Checkpoint) -> dict[str, Change]:
        """The changes of layers, each in the orientation of the base's weight.

        PEFT saves one `fan_in_fan_out` for all modules; in models with layers of both orientations (GPT-2 and its head)
        it is that of the last one. Shapes determine the orientation, except for square weights.
        """
        changes = self.changes
        shapes = {name: base.spec(name).shape for name in changes if base.has(name)}
        fits = {name: changes[name].orientations(shape) for name, shape in shapes.items()}
        contradicted = next((name for name, fit in fits.items() if fit and changes[name].transposed not in fit), None)
        transposed = {name: change.transposed for name, change in changes.items()}
        for name, fit in fits.items():
            if len(fit) == 1:
                transposed[name] = fit[0]
            elif not fit and changes[name].needs_base:  # other misfits are found when shapes are compared
                shape = list(changes[name].shape(shapes[name]))
                raise CheckpointError(
                    f"{self.label}: its change of the tensor '{name}' has shape {shape}, expected "
                    f"{list(shapes[name])} as in the base; is this the base that the adapter was trained on?"
                )
            elif fit and contradicted:
                told = is_transposed(base, name)
                if told is None:
                    raise CheckpointError(
                        f"{self.config.path}: fan_in_fan_out does not hold for '{contradicted}', so it is unknown "
                        f"whether '{name}', which is square, is transposed; merge the adapter into its base model "
                        "with PEFT first"
                    )
                transposed[name] = told
        return {name: change.transposed_to(transposed[name]) for name, change in changes.items()}


def _read(checkpoint: Checkpoint, name: str, run: Run) -> Tensor:
    return checkpoint.tensor(name) if run is None else checkpoint.read_range(name, *run)
