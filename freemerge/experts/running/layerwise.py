"""Run a model with changed weights that exist for one layer at a time.

A low-rank or masked expert changes every entry of its tensors. Writing them into the model would need a second copy of
the model to restore; here, each layer gets its changed tensors when its forward pass begins and drops them when it
ends. The model's own tensors are never written to. For the backward pass, a layer's changed tensors are recomputed
instead of stored, so training an expert needs no second copy either. `torch.func.functional_call` would need all
changed tensors at once, which is why this module exists.
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
    """Layers with changed tensors did not run although their parent module did, so the changes were not used.

    Args:
        layers: names of the layers.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = tuple(layers)
        super().__init__(
            f"the layer {self.layers[0]!r} did not run, so its changed weights were not used: its parent computes with "
            "its tensors directly; use `attached`, which writes them in place"
        )


@contextmanager
def substituted(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute with other tensors for the duration of a block; gradients flow through `make`.

    Args:
        module: the module.
        names: names of the parameters and buffers to replace, as in its state dict; any name of tied ones.
        make: (name, the module's own tensor) → the tensor to use; must return the same values in every call.

    Raises:
        ValueError: if there is no such parameter or buffer.
        UnusedLayers: at the end of the block, if the layer of a tensor did not run although its parent did, because the
            parent computes with the tensor directly. Of several layers with the same tensor, one must have run.
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
    """`substituted` without its lock, for modules to which the caller has exclusive access.

    Args:
        module: the module.
        names: see `substituted`.
        make: see `substituted`.
        by_parents: layers whose tensors are exchanged while their parent module runs, because the parent uses them.
        plans: the replica's `plans`, in which the plan is stored for later calls; None if the module is no replica.

    Raises:
        ValueError: see `substituted`.
        UnusedLayers: see `substituted`.
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
        # In a replica, before all other hooks, which may compute a weight from others; otherwise after all hooks,
        # which may load the weights.
        first, body = plans is not None, layer.place.module
        handles.append(body.register_forward_pre_hook(lambda *_, layer=layer: layer.begin(made), prepend=first))
        handles.append(body.register_forward_hook(lambda *_, layer=layer: layer.end(made), always_call=True))
    try:
        if torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(_pack(made), _unpack(make)):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:  # if the pass was interrupted, for instance by Ctrl-C
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
    """A layer and the tensors that are exchanged while it runs."""

    module: nn.Module
    parent: nn.Module | None  # the nearest enclosing module that runs
    tensors: list[_Tensor]


class _Tensor(NamedTuple):
    """A tensor to exchange."""

    name: str  # the name that `make` takes
    owner: nn.Module  # the module that has the tensor
    leaf: str  # the owner's attribute
    layer: str  # the owner's name


def _plan(module: nn.Module, names: Collection[str], by_parents: Collection[str]) -> list[_Place]:
    """The layers of the tensors with these names, each with its tensors."""
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
    """The name of the module whose forward pass uses the tensors of a layer: nearly always the layer itself."""
    if _is_attention_output(module, owner):
        owner = owner.rpartition(".")[0]
    while owner and (owner in by_parents or isinstance(module.get_submodule(owner), _NEVER_RUN)):
        owner = owner.rpartition(".")[0]
    return owner


def _parent(module: nn.Module, name: str) -> str:
    """The name of the nearest enclosing module that has a forward pass."""
    name = name.rpartition(".")[0]
    while name and isinstance(module.get_submodule(name), _NEVER_RUN):
        name = name.rpartition(".")[0]
    return name


_NEVER_RUN = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def exchange(owner: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
    """Replace a tensor of a module, wherever the module refers to it.

    Args:
        owner: the module.
        leaf: name of its parameter or buffer.
        tensor: the new tensor.

    Returns:
        The module's own tensor.
    """
    home: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    own = home[leaf]
    home[leaf] = tensor
    if type(owner) not in _SIMPLE:
        for key, value in vars(owner).items():
            if value is own:
                vars(owner)[key] = tensor
            elif type(value) in (list, tuple) and any(item is own for item in value):  # as in recurrent layers
                vars(owner)[key] = type(value)(tensor if item is own else item for item in value)
    return own


# layers that refer to a tensor only as a parameter or buffer
_SIMPLE = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.RMSNorm)


class _Layer:
    """Exchanges the tensors of one layer while it runs.

    Args:
        place: the layer and its tensors.
        make: see `substituted`.
    """

    def __init__(self, place: _Place, make: Callable[[str, Tensor], Tensor]) -> None:
        self.place, self.make, self.ran = place, make, False
        self._exchanged: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def begin(self, made: dict[int, tuple[str, Tensor]]) -> None:
        """Put the changed tensors in place; `made` gets their storage address → (name, own tensor)."""
        self.ran = True
        for name, owner, leaf, _ in self.place.tensors:
            home: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            own = home[leaf]
            changed = self.make(name, own)
            self._exchanged.append((owner, leaf, own, changed))
            made[changed.untyped_storage().data_ptr()] = (name, own)
            exchange(owner, leaf, changed)

    def end(self, made: dict[int, tuple[str, Tensor]]) -> None:
        """Put the layer's own tensors back."""
        for owner, leaf, own, changed in reversed(self._exchanged):
            made.pop(changed.untyped_storage().data_ptr(), None)  # another tensor may get the same address
            exchange(owner, leaf, own)
        self._exchanged = []


def _pack(made: dict[int, tuple[str, Tensor]]) -> Callable[[Tensor], object]:
    """A hook for tensors that autograd saves: of a changed weight or a view of it, it stores only which one it is."""

    def pack(tensor: Tensor) -> object:
        found = made.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        return (*found, tensor.size(), tensor.stride(), tensor.storage_offset())

    return pack


def _unpack(make: Callable[[str, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """The inverse hook, which recomputes a changed weight in the backward pass."""

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        name, own, size, stride, offset = saved
        with torch.no_grad():
            return make(name, own).as_strided(size, stride, offset)

    return unpack


def _is_attention_output(module: nn.Module, owner: str) -> bool:
    """Whether a layer is the output projection of `nn.MultiheadAttention`, which uses its tensors directly."""
    parent, _, leaf = owner.rpartition(".")
    return leaf == "out_proj" and isinstance(module.get_submodule(parent), nn.MultiheadAttention)
