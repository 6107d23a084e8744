"""Run a model with other weights, of which one layer's exist at a time.

A low-rank or masked expert changes every entry of its tensors. Writing them all would take a second copy of the model
to come back from; here each layer gets its changed tensors when it begins and drops them when it ends. Its own tensors
are never written to. For the backward pass a layer's changed tensors are made again instead of kept, so that training
an expert takes no second copy either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freemerge.experts.running.locks import exclusive
from freemerge.experts.tied import layers_that_change


@contextmanager
def substituted(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """For the duration of a block, `module` computes with other tensors; gradients flow into what they are made of.

    Args:
        module: the module.
        names: which of its parameters and buffers, as in its state dict; of tied ones, any of their names.
        make: (name, the module's own tensor) → the tensor to compute with, the same every time.

    Raises:
        ValueError: if there is no such parameter or buffer.
        RuntimeError: at the end of the block, if the layer of a tensor did not run though its parent did: the parent
            computes with its tensors. Of layers that share a tensor, one must have run.
    """
    with exclusive(module):
        yield from _substituted(module, names, make)


def _substituted(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    layers: dict[nn.Module, _Layer] = {}
    for name, own in layers_that_change(module, names).items():
        owner = name.rpartition(".")[0]
        runs = owner.rpartition(".")[0] if _is_attention_output(module, owner) else owner
        layer = layers.setdefault(module.get_submodule(runs), _Layer(runs, make))
        layer.own.append((own, module.get_submodule(owner), name.rpartition(".")[2]))
    ran: set[nn.Module] = set()
    parents = {
        layer: module.get_submodule(layer.name.rpartition(".")[0])
        for layer in layers.values()
        if layer.name and layer.name not in _seen_to_run.get(module, ())
    }
    handles = [
        parent.register_forward_pre_hook(lambda ran_one, *_: ran.add(ran_one)) for parent in set(parents.values())
    ]
    made: dict[int, tuple[str, Tensor]] = {}
    for runs, layer in layers.items():
        handles.append(runs.register_forward_pre_hook(lambda *_, layer=layer: layer.begin(made)))
        handles.append(runs.register_forward_hook(lambda *_, layer=layer: layer.end(made), always_call=True))
    try:
        if torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(_remember(made), _recall(make)):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():  # where a pass was broken off, by Ctrl-C for instance
            layer.end(made)
    _seen_to_run.setdefault(module, set()).update(layer.name for layer in parents if layer.ran)
    used = {name for layer in layers.values() if layer.ran for name, _, _ in layer.own}
    idle = [
        layer.name
        for layer, parent in parents.items()
        if parent in ran and not layer.ran and any(name not in used for name, _, _ in layer.own)
    ]
    if idle:
        raise RuntimeError(
            f"the layer {idle[0]!r} never ran by itself, so its changed weights were not used: its parent computes "
            "with them; use `attached`, which writes them in place"
        )


_seen_to_run: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Module → names of its layers that have run by themselves, and need not be watched again."""


class _Layer:
    """The tensors of one layer, exchanged while it runs."""

    def __init__(self, name: str, make: Callable[[str, Tensor], Tensor]) -> None:
        self.name, self.make, self.ran = name, make, False
        self.own: list[tuple[str, nn.Module, str]] = []  # what `make` calls a tensor, and where it is
        self._kept: list[tuple[dict, str, Tensor]] = []

    def begin(self, made: dict[int, tuple[str, Tensor]]) -> None:
        self.ran = True
        for name, owner, leaf in self.own:
            home = owner._parameters if leaf in owner._parameters else owner._buffers
            own, changed = home[leaf], self.make(name, home[leaf])
            self._kept.append((home, leaf, own))
            made[changed.untyped_storage().data_ptr()] = (name, own)
            home[leaf] = changed

    def end(self, made: dict[int, tuple[str, Tensor]]) -> None:
        for home, leaf, own in reversed(self._kept):
            made.pop(home[leaf].untyped_storage().data_ptr(), None)  # its memory may hold something else from now on
            home[leaf] = own
        self._kept = []


def _remember(made: dict[int, tuple[str, Tensor]]) -> Callable[[Tensor], object]:
    """What autograd keeps of a tensor: of a changed weight, or a view of it, only which one it is."""

    def pack(tensor: Tensor) -> object:
        found = made.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        return (*found, tensor.size(), tensor.stride(), tensor.storage_offset())

    return pack


def _recall(make: Callable[[str, Tensor], Tensor]) -> Callable[[object], Tensor]:
    def unpack(kept: object) -> Tensor:
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
