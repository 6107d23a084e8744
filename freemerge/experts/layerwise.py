"""Run a model with other weights, of which one layer's exist at a time.

A low-rank or masked expert changes every entry of its tensors. Writing them all would take a second copy of the model to
come back from; here each layer gets its changed tensors when it begins and drops them when it ends. Its own tensors are
never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def substituted(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """For the duration of a block, `module` computes with other tensors.

    Args:
        module: the module.
        names: which of its parameters and buffers, as in its state dict.
        make: (name, the module's own tensor) → the tensor to compute with.

    Raises:
        RuntimeError: at the end of the block, if the layer of a tensor did not run, though the module did: where a
            parent computes with its child's tensors, as `nn.MultiheadAttention` does with its output projection.
    """
    by_owner: dict[str, list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        by_owner.setdefault(owner, []).append(leaf)
    ran: set[str] = set()
    handles = []
    for owner, leaves in by_owner.items():
        layer = module.get_submodule(owner)
        store = _Store(layer, owner, leaves, make, ran)
        handles.append(layer.register_forward_pre_hook(store.begin))
        handles.append(layer.register_forward_hook(store.end, always_call=True))
    handles.append(module.register_forward_hook(lambda *_: ran.add(_WHOLE)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if _WHOLE in ran and (idle := [owner for owner in by_owner if owner not in ran]):
        raise RuntimeError(
            f"the layer {idle[0]!r} never ran by itself, so its changed weights were not used: another module computes "
            "with them; use `attached`, which writes them in place"
        )


_WHOLE = "<the whole module>"


class _Store:
    """The tensors of one layer, exchanged while it runs."""

    def __init__(
        self,
        layer: nn.Module,
        owner: str,
        leaves: list[str],
        make: Callable[[str, Tensor], Tensor],
        ran: set[str],
    ) -> None:
        self.layer, self.owner, self.leaves, self.make, self.ran = layer, owner, leaves, make, ran
        self.own: dict[str, Tensor] = {}

    def begin(self, *_) -> None:
        self.ran.add(self.owner)
        for leaf in self.leaves:
            home = self.layer._parameters if leaf in self.layer._parameters else self.layer._buffers
            self.own[leaf] = home[leaf]
            home[leaf] = self.make(f"{self.owner}.{leaf}" if self.owner else leaf, home[leaf])

    def end(self, *_) -> None:
        for leaf, tensor in self.own.items():
            home = self.layer._parameters if leaf in self.layer._parameters else self.layer._buffers
            home[leaf] = tensor
        self.own = {}
