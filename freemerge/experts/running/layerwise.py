"""Run a model with other weights, which exist for one layer at a time.

A low-rank or masked expert changes every entry of its tensors. Writing them all would take a second copy of the model
to come back from; here each layer gets its changed tensors when it begins and drops them when it ends. Its own tensors
are never written to. For the backward pass a layer's changed tensors are made again instead of kept, so that training
an expert takes no second copy either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freemerge.experts.running.locks import exclusive
from freemerge.experts.tied import layers_that_change


class UnusedLayers(RuntimeError):
    """Layers with changed tensors did not run by themselves, though the module around them did.

    Args:
        layers: their names.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = tuple(layers)
        super().__init__(
            f"the layer {self.layers[0]!r} never ran by itself, so its changed weights were not used: its parent "
            "computes with them; use `attached`, which writes them in place"
        )


@contextmanager
def substituted(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """For the duration of a block, `module` computes with other tensors; gradients flow into what they are made of.

    Args:
        module: the module.
        names: which of its parameters and buffers, as in its state dict; of tied ones, any of their names.
        make: (name, the module's own tensor) → the tensor to compute with, the same every time.

    Raises:
        ValueError: if there is no such parameter or buffer.
        UnusedLayers: at the end of the block, if the layer of a tensor did not run though its parent did: the parent
            computes with its tensors. Of layers that share a tensor, one must have run.
    """
    with exclusive(module), substituted_unlocked(module, names, make):
        yield


@contextmanager
def substituted_unlocked(
    module: nn.Module,
    names: Collection[str],
    make: Callable[[str, Tensor], Tensor],
    by_parents: Collection[str] = (),
    plans: dict[Any, Any] | None = None,
) -> Iterator[None]:
    """`substituted` in a module that is the caller's alone.

    Args:
        module: the module.
        names: likewise.
        make: likewise.
        by_parents: layers whose tensors are exchanged while the module around them runs, as this computes with them.
        plans: of a twin, whose layers stay as they are: what this keeps for the next time.
    """
    key = ("layers", tuple(names), frozenset(by_parents))
    plan = None if plans is None else plans.get(key)
    if plan is None:
        plan = _plan(module, names, by_parents)
        if plans is not None:
            plans[key] = plan
    layers = [_Layer(place, make) for place in plan]
    made: dict[int, tuple[str, Tensor]] = {}
    ran: set[nn.Module] = set()
    handles = []
    for parent in {place.parent for place in plan if place.parent is not None}:
        handles.append(parent.register_forward_pre_hook(lambda one, _: ran.add(one)))
    for layer in layers:
        # In a twin before all other hooks, as some make a weight from others; else last, as some bring the weights.
        first, body = plans is not None, layer.place.module
        handles.append(body.register_forward_pre_hook(lambda *_, layer=layer: layer.begin(made), prepend=first))
        handles.append(body.register_forward_hook(lambda *_, layer=layer: layer.end(made), always_call=True))
    try:
        if torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(_remember(made), _recall(make)):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:  # where a pass was broken off, by Ctrl-C for instance
            layer.end(made)
    used = {tensor.name for layer in layers if layer.ran for tensor in layer.place.tensors}
    idle = [
        tensor.layer
        for layer in layers
        if layer.place.parent in ran and not layer.ran
        for tensor in layer.place.tensors
        if tensor.name not in used
    ]
    if idle:
        raise UnusedLayers(dict.fromkeys(idle))


class _Place(NamedTuple):
    """A layer, and which tensors are exchanged while it runs."""

    module: nn.Module
    parent: nn.Module | None  # the nearest module around it that runs
    tensors: list[_Tensor]


class _Tensor(NamedTuple):
    name: str  # what `make` calls it
    owner: nn.Module  # the module that has it
    leaf: str  # what the owner calls it
    layer: str  # the owner's own name


def _plan(module: nn.Module, names: Collection[str], by_parents: Collection[str]) -> list[_Place]:
    places: dict[str, _Place] = {}
    for name, own in layers_that_change(module, names).items():
        layer, _, leaf = name.rpartition(".")
        runs = _runs_with(module, layer, by_parents)
        if runs not in places:
            parent = module.get_submodule(_parent(module, runs)) if runs else None
            places[runs] = _Place(module.get_submodule(runs), parent, [])
        places[runs].tensors.append(_Tensor(own, module.get_submodule(layer), leaf, layer))
    return list(places.values())


def _runs_with(module: nn.Module, owner: str, by_parents: Collection[str]) -> str:
    """The module whose run computes with the tensors of a layer: nearly always itself."""
    if _is_attention_output(module, owner):
        owner = owner.rpartition(".")[0]
    while owner and (owner in by_parents or isinstance(module.get_submodule(owner), _NEVER_RUN)):
        owner = owner.rpartition(".")[0]
    return owner


def _parent(module: nn.Module, name: str) -> str:
    """The nearest module around one that runs by itself."""
    name = name.rpartition(".")[0]
    while name and isinstance(module.get_submodule(name), _NEVER_RUN):
        name = name.rpartition(".")[0]
    return name


_NEVER_RUN = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def exchange(owner: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
    """Put a tensor in the place of a module's own, wherever it has that; returns its own."""
    home: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    own = home[leaf]
    home[leaf] = tensor
    if type(owner) not in _SIMPLE:
        for key, value in vars(owner).items():
            if value is own:
                vars(owner)[key] = tensor
            elif type(value) in (list, tuple) and any(item is own for item in value):  # as recurrent layers have
                vars(owner)[key] = type(value)(tensor if item is own else item for item in value)
    return own


_SIMPLE = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.RMSNorm)


class _Layer:
    """The tensors of one layer, exchanged while it runs.

    Args:
        place: which these are.
        make: makes the others.
    """

    def __init__(self, place: _Place, make: Callable[[str, Tensor], Tensor]) -> None:
        self.place, self.make, self.ran = place, make, False
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def begin(self, made: dict[int, tuple[str, Tensor]]) -> None:
        self.ran = True
        for name, owner, leaf, _ in self.place.tensors:
            home: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            own = home[leaf]
            changed = self.make(name, own)
            self._kept.append((owner, leaf, own, changed))
            made[changed.untyped_storage().data_ptr()] = (name, own)
            exchange(owner, leaf, changed)

    def end(self, made: dict[int, tuple[str, Tensor]]) -> None:
        for owner, leaf, own, changed in reversed(self._kept):
            made.pop(changed.untyped_storage().data_ptr(), None)  # its memory may hold something else from now on
            exchange(owner, leaf, own)
        self._kept = []


def _remember(made: dict[int, tuple[str, Tensor]]) -> Callable[[Tensor], object]:
    """What autograd keeps of a tensor: of a changed weight, or a view of it, only which one it is."""

    def pack(tensor: Tensor) -> object:
        found = made.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        return (*found, tensor.size(), tensor.stride(), tensor.storage_offset())

    return pack


def _recall(make: Callable[[str, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, own, size, stride, offset = kept
        with torch.no_grad():
            return make(name, own).as_strided(size, stride, offset)

    return unpack


def _is_attention_output(module: nn.Module, owner: str) -> bool:
    """`nn.MultiheadAttention` computes with its output projection's tensors itself."""
    parent, _, leaf = owner.rpartition(".")
    return leaf == "out_proj" and isinstance(module.get_submodule(parent), nn.MultiheadAttention)
