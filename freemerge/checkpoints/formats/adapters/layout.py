"""The model that an adapter changes, under the names that PEFT uses: those of its modules, not of its files.

If the base's folder describes a transformers model, its modules are looked up; otherwise the tensors' names are taken
as module names, and names and shapes give the kind of each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from freemerge.checkpoints.architecture import Architecture, Place, read_architecture
from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.adapters.layers import Layer, find_layer

# In models with stacked experts, PEFT takes modules with these names for the experts of older files.
_EXPERTS_ONCE = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
# Modules of these models that PEFT refuses to adapt.
_REFUSED_IN = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_REFUSED = {"out_proj", "conv1d"}
# Tasks whose heads PEFT saves whole: suffixes of architecture names, with the suffixes of the heads' names.
_HEADS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


@dataclass(frozen=True)
class Target:
    """A tensor of the model.

    Args:
        name: its name in the model.
        shape: its shape.
        layer: how an adapter can change it by factors; None if it can only store it whole.
        parts: the stored tensors that it consists of, and their places in it.
    """

    name: str
    shape: tuple[int, ...]
    layer: Layer | None
    parts: tuple[tuple[str, Place], ...]

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.rpartition(".")[0]

    @property
    def is_plain(self) -> bool:
        """Whether it is exactly one stored tensor."""
        return len(self.parts) == 1 and self.parts[0][1] == _whole(self.name, self.shape)

    def assemble(self, values: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Assemble the model's tensor from stored ones; missing ones are zero.

        Args:
            values: name in the files → tensor.
            dtype: dtype of the result.
            device: device of the result.
        """
        if self.is_plain and self.parts[0][0] in values:
            return values[self.parts[0][0]].to(device, dtype)
        whole = torch.zeros(self.shape, dtype=dtype, device=device)
        for name, place in self.parts:
            if name in values:
                place.of(whole).copy_(values[name])
        return whole


@dataclass(frozen=True)
class Layout:
    """The tensors and modules of a model.

    Args:
        targets: name in the model → tensor, for everything that the files hold.
        modules: the names of all modules, including those without tensors; None if unknown.
        kept: modules that an adapter stores whole as soon as one of their tensors changes.
        task: PEFT's name of the model's task, if it has one.
        model_class: the Python module and the name of the model's class, if known.
        needs: modules that PEFT saves whole for this task.
    """

    targets: Mapping[str, Target]
    modules: Sequence[str]
    kept: frozenset[str] = frozenset()
    task: str | None = None
    model_class: tuple[str, str] | None = None
    needs: tuple[str, ...] = ()

    @cached_property
    def by_part(self) -> dict[str, Target]:
        """The model's tensors by the names of the stored tensors."""
        return {name: target for target in self.targets.values() for name, _ in target.parts}

    def inside(self, module: str) -> list[Target]:
        """All tensors of a module and its submodules."""
        return [target for name, target in self.targets.items() if name.startswith(f"{module}.")]

    def keeper(self, target: Target) -> str:
        """The module that an adapter stores whole if it stores this tensor whole."""
        path = target.name.split(".")[:-1]
        outer = (".".join(path[:length]) for length in range(1, len(path) + 1))
        return next((module for module in outer if module in self.kept), target.module)


def read_layout(base: Checkpoint) -> Layout:
    """Read the layout of a base from its `config.json` if transformers knows the model, otherwise from tensor names.

    Raises:
        CheckpointError: the configuration is damaged.
    """
    architecture = read_architecture(base.folder)
    if architecture is not None:
        places = {
            name: place
            for name, place in architecture.locate(dict.fromkeys((*base.names, *base.tied))).items()
            if place.shape == tuple(base.spec(name).shape)
        }
        if any(name in places for name in base.names):
            return _of_architecture(architecture, places)
    targets = {}
    for name in base.names:
        shape = tuple(base.spec(name).shape)
        targets[name] = Target(name, shape, find_layer(base, name), ((name, _whole(name, shape)),))
    modules = {name.rpartition(".")[0] for name in targets}
    modules |= {
        ".".join(module.split(".")[:length]) for module in modules for length in range(1, module.count(".") + 1)
    }
    return Layout(targets, sorted(modules - {""}))


def _of_architecture(architecture: Architecture, places: Mapping[str, Place]) -> Layout:
    model = architecture.model
    parts: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        parts.setdefault(place.tensor, []).append((name, place))
    modules = dict(model.named_modules())
    targets = {}
    for name, own in parts.items():
        owner = modules[name.rpartition(".")[0]]
        shape = tuple(architecture.tensors[name].shape)
        targets[name] = Target(name, shape, _find_kind(owner, name), tuple(own))
    if any(len(target.shape) == 3 and target.layer and target.layer.is_parameter for target in targets.values()):
        for name, target in targets.items():
            if target.layer is Layer.LINEAR and target.module.rpartition(".")[2] in _EXPERTS_ONCE:
                targets[name] = replace(target, layer=Layer.PARAMETER)
    if getattr(model.config, "model_type", None) in _REFUSED_IN:
        for name, target in targets.items():
            if target.module.rpartition(".")[2] in _REFUSED:
                targets[name] = replace(target, layer=None)
    # PEFT wraps the parameters of a module in the model's own order.
    ordered = {name: targets[name] for name in architecture.tensors if name in targets}
    names = [name for name in modules if name]
    task, heads = _find_task(architecture)
    needs = tuple(name for name in names if heads and name.endswith(heads))
    kept = {*needs, *_mixed_modules(modules)}
    kind = type(model)
    return Layout(ordered, names, frozenset(kept), task, (kind.__module__, kind.__name__), needs)


def _find_kind(owner: nn.Module, name: str) -> Layer | None:
    """The kind of layer as which PEFT can adapt a tensor of a module."""
    from transformers.pytorch_utils import Conv1D

    last = name.rpartition(".")[2]
    tensor = getattr(owner, last, None)
    if not isinstance(tensor, nn.Parameter) or "." not in name or tensor.dim() < 2:
        return None
    if last == "weight":
        if isinstance(owner, nn.Linear):
            return Layer.LINEAR
        if isinstance(owner, Conv1D):
            return Layer.TRANSPOSED
        if isinstance(owner, nn.Embedding):
            # Subclasses may look rows up differently than PEFT would, such as shifted positions.
            plain = type(owner).forward is nn.Embedding.forward or hasattr(owner, "embed_scale")
            return Layer.EMBEDDING if plain else None
        if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return Layer.CONVOLUTION if owner.groups == 1 else None
    if tensor.dim() > 3 or isinstance(owner, nn.MultiheadAttention) or next(_inner(owner), None) is not None:
        return None
    transposed = tensor.dim() == 3 and bool(getattr(owner, "is_transposed", False))
    if transposed and tensor.shape[0] == 1:
        return None  # PEFT treats a single expert as a plain matrix
    return Layer.PARAMETER_TRANSPOSED if transposed else Layer.PARAMETER


def _inner(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for child in module.children() for parameter in child.parameters())


def _mixed_modules(modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules with direct parameters beside submodules, such as the embeddings of a vision model: PEFT can only store
    them whole. Modules that contain linear layers are excluded, because those layers are better changed by factors.
    """
    found = []
    for name, module in modules.items():
        own = any(True for _ in module.parameters(recurse=False))
        if not name or not own or next(_inner(module), None) is None:
            continue
        inside = [inner for inner in modules if inner.startswith(f"{name}.")]
        # PEFT matches the ends of names, so no submodule's name may end with it.
        if not any(isinstance(modules[inner], nn.Linear | nn.ModuleList) or inner.endswith(name) for inner in inside):
            found.append(name)
    return found


def _find_task(architecture: Architecture) -> tuple[str | None, tuple[str, ...]]:
    """PEFT's name of a model's task, and the suffixes of the head names that PEFT saves for it."""
    name = type(architecture.model).__name__
    for ending, (task, heads) in _HEADS.items():
        if name.endswith(ending):
            return task, heads
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM", ()
    if name.endswith("ForConditionalGeneration") and getattr(architecture.model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM", ()
    return None, ()


def _whole(name: str, shape: tuple[int, ...]) -> Place:
    return Place(name, shape, torch.empty(shape, device="meta").stride(), 0)
