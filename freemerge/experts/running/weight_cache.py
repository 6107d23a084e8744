"""Changed weights that are kept for the next pass, as far as a bound allows.

A small model computes faster than Python exchanges its tensors layer by layer. So an expert's changed tensors are kept
together, where they fit, and a pass finds them all in their places. They hold as long as the model's own tensors and
the expert have the values that they were made from. Values are compared once a pass, not versions: what is written
through `.data` or by other libraries leaves no version behind, and comparing is cheaper than making them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freemerge.experts.packed import PackedExpert
from freemerge.experts.running.layerwise import exchange
from freemerge.experts.running.switch import Overflows
from freemerge.experts.tied import layers_that_change

_RECENT = 256  # an expert gives way to others only if it is none of those that the last so many passes were for


class Place(NamedTuple):
    """Where a module has a tensor that an expert changes."""

    name: str  # what the expert calls it
    owner: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        owned = self.owner._parameters if self.leaf in self.owner._parameters else self.owner._buffers
        tensor = owned[self.leaf]
        assert tensor is not None  # an expert changes what is there
        return tensor


def places_of(twin: nn.Module, names: Mapping[str, Any], plans: dict[Any, Any]) -> list[Place]:
    """Where a twin has the tensors of these names; `plans` are the twin's, kept for the next time."""
    key = ("places", tuple(names))
    if key not in plans:
        changes = ((name.rpartition("."), own) for name, own in layers_that_change(twin, names).items())
        plans[key] = [Place(own, twin.get_submodule(layer), leaf) for (layer, _, leaf), own in changes]
    return plans[key]


@contextmanager
def bind(places: Sequence[Place], changed: Mapping[str, Tensor]) -> Iterator[None]:
    """For the duration of a block, a module that is the caller's alone has changed tensors in these places.

    Buffers get copies, as a pass may write to them (batch norm's statistics while training).
    """
    copies: dict[str, Tensor] = {}
    own: list[tuple[Place, Tensor]] = []
    try:
        for place in places:
            name, owner, leaf = place
            tensor = changed[name]
            if leaf not in owner._parameters:
                if name not in copies:
                    copies[name] = tensor.clone()
                tensor = copies[name]
            own.append((place, exchange(owner, leaf, tensor)))
        yield
    finally:
        for (_, owner, leaf), tensor in reversed(own):
            exchange(owner, leaf, tensor)


class _Entry(NamedTuple):
    """What is kept for an expert."""

    changed: dict[str, Tensor]
    versions: list[int]  # of these tensors, which must not be written to
    made_from: list[Tensor]  # copies of the expert's own tensors
    setting: tuple[Any, ...]


class WeightCache:
    """The changed tensors of the experts that a model has computed with, within a bound; threads may share it.

    Copies and pickles of it are empty.

    Args:
        limit: how many bytes are kept at most, with the copies that tell whether they still hold.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = RLock()
        self.clear()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[int]]:
        return WeightCache, (self.limit,)

    def clear(self) -> None:
        """Keep nothing, until the next pass."""
        with self._lock:
            self._entries: WeakKeyDictionary[PackedExpert, _Entry] = WeakKeyDictionary()
            self._last: WeakKeyDictionary[PackedExpert, int] = WeakKeyDictionary()  # which pass each was used in
            self._own: dict[str, Tensor] = {}  # copies of the model's own tensors that these were made from
            self._passes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now."""
        with self._lock:
            entries = [(*entry.changed.values(), *entry.made_from) for entry in self._entries.values()]
            return _bytes_of(self._own.values()) + sum(map(_bytes_of, entries))

    def changed(self, expert: PackedExpert, places: Sequence[Place], compared: set[str]) -> dict[str, Tensor] | None:
        """An expert's changed tensors, made now where they are not kept.

        Args:
            expert: the expert.
            places: where the model has the tensors that it changes.
            compared: names of the model's tensors that this batch has compared already; more are added.

        Returns:
            The expert's name of a tensor → the changed one, not to be written to; None if they are not to be kept:
            because there is no room, or autograd has to know what they are made of.

        Raises:
            OverflowError: if a changed weight is too large for the weights' dtype.
        """
        live = {place.name: place.tensor for place in reversed(places)}
        if not self.limit or torch.is_grad_enabled() or not all(map(_is_plain, live.values())):
            return None
        device = next(iter(live.values())).device if live else torch.device("cpu")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        setting, source = _setting(device), _made_from(expert)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if any(name in self._own and not _same(live[name], self._own[name]) for name in live.keys() - compared):
                self.clear()
                compared.clear()
            compared.update(live)
            self._passes += 1
            entry = self._entries.get(expert)
            if entry is not None and not (
                entry.setting == setting
                and entry.versions == [tensor._version for tensor in entry.changed.values()]
                and all(map(_same, source, entry.made_from))
            ):
                entry = None
                del self._entries[expert]
            if entry is None:
                if not self._make_room(live, source):
                    return None
                entry = self._entries[expert] = _make(expert, live, source, setting)
                self._own |= {name: tensor.detach().clone() for name, tensor in live.items() if name not in self._own}
            self._last[expert] = self._passes
            return entry.changed

    def _make_room(self, live: Mapping[str, Tensor], source: Sequence[Tensor]) -> bool:
        """Forget the experts whose last pass is the longest ago, until there is room for another; whether there is."""
        own = sum(tensor.nbytes for name, tensor in live.items() if name not in self._own)
        needed = _bytes_of(live.values()) + _bytes_of(source) + own
        if needed > self.limit:
            return False
        while self.num_bytes + needed > self.limit:
            if not self._entries:  # tensors of the model that other experts changed take the room
                self.clear()
                return self._make_room(live, source)
            oldest = min(self._entries, key=self._last.__getitem__)
            if self._last[oldest] > self._passes - _RECENT:
                return False
            del self._entries[oldest]
        return True


def _make(expert: PackedExpert, live: Mapping[str, Tensor], source: Sequence[Tensor], setting: tuple) -> _Entry:
    unpacked, overflows, changed = expert.unpacked(), Overflows(), {}
    for name, tensor in live.items():
        changed[name] = overflows.watch(expert, name, tensor, unpacked.added(name, tensor))
    overflows.check()
    versions = [tensor._version for tensor in changed.values()]
    return _Entry(changed, versions, [tensor.detach().clone() for tensor in source], setting)


def _made_from(expert: PackedExpert) -> list[Tensor]:
    return [*expert.tensors().values(), *(expert.shared or {}).values()]


def _setting(device: torch.device) -> tuple[Any, ...]:
    """What else decides what a sum is, and on a GPU, where it is ready: work of other streams would not wait for it."""
    narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return narrow, stream, torch.get_float32_matmul_precision()


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor with values of its own, of torch's own class."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and tensor.layout == torch.strided


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
