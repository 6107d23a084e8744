"""A cache of changed weights for later passes, limited in size.

Small models compute faster than Python exchanges their tensors layer by layer. If an expert's changed tensors fit, they
are therefore cached together and put in place before a pass. An entry is valid as long as the model's own tensors and
the expert have the values that it was computed from. Each pass compares values, not version counters, because writes
through `.data` or by other libraries do not update the counters; comparing is cheaper than recomputing the tensors.
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

_RECENT = 256  # an entry that was used in the last 256 passes is not evicted


class Place(NamedTuple):
    """The module and attribute that hold a tensor that an expert changes."""

    name: str  # the expert's name of the tensor
    owner: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        """The tensor that the module has there now."""
        owned = self.owner._parameters if self.leaf in self.owner._parameters else self.owner._buffers
        tensor = owned[self.leaf]
        assert tensor is not None  # the module has the tensors that an expert changes
        return tensor


def places_of(module: nn.Module, names: Mapping[str, Any], plans: dict[Any, Any]) -> list[Place]:
    """The places of the tensors that an expert changes.

    Args:
        module: a replica.
        names: the expert's tensor names.
        plans: the replica's `plans`, in which the result is stored for later calls.
    """
    key = ("places", tuple(names))
    if key not in plans:
        changes = ((name.rpartition("."), own) for name, own in layers_that_change(module, names).items())
        plans[key] = [Place(own, module.get_submodule(layer), leaf) for (layer, _, leaf), own in changes]
    return plans[key]


@contextmanager
def bind(places: Sequence[Place], changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Put changed tensors into a workspace for the duration of a block.

    Buffers are copied, because a pass may write to them (batch norm's statistics in training).

    Args:
        places: where the workspace has the tensors.
        changed: the expert's name → the tensor to use.
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
    """The cached tensors of one expert, and what they were computed from."""

    changed: dict[str, Tensor]
    versions: list[int]  # the tensors' version counters: a tensor that was written to is no longer valid
    source: list[Tensor]  # copies of the expert's own tensors
    setting: tuple[Any, ...]


class WeightCache:
    """A cache of the changed tensors of experts; threads may share it.

    Copies and pickles of a cache are empty.

    Args:
        limit: maximum size in bytes, including the copies that entries are validated against.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = RLock()
        self.clear()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[int]]:
        return WeightCache, (self.limit,)

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._entries: WeakKeyDictionary[PackedExpert, _Entry] = WeakKeyDictionary()
            self._last: WeakKeyDictionary[PackedExpert, int] = (
                WeakKeyDictionary()
            )  # the last pass that used each expert
            self._own: dict[str, Tensor] = {}  # copies of the model's own tensors that the entries were computed from
            self._passes = 0

    @property
    def num_bytes(self) -> int:
        """Current size in bytes, including the copies that entries are validated against."""
        with self._lock:
            entries = [(*entry.changed.values(), *entry.source) for entry in self._entries.values()]
            return _bytes_of(self._own.values()) + sum(map(_bytes_of, entries))

    def changed(self, expert: PackedExpert, places: Sequence[Place], compared: set[str]) -> dict[str, Tensor] | None:
        """An expert's changed tensors, from the cache or computed now.

        Args:
            expert: the expert.
            places: where the model has the tensors that it changes.
            compared: the expert's names of the model's tensors whose values this batch has already compared; the
                method adds to it.

        Returns:
            The expert's name → changed tensor, which must not be written to. None if the tensors cannot be cached: they
            do not fit, or autograd has to differentiate through them.

        Raises:
            OverflowError: if a changed weight is too large for the weights' dtype.
        """
        live = {place.name: place.tensor for place in reversed(places)}
        if not self.limit or torch.is_grad_enabled() or not all(map(_is_plain, live.values())):
            return None
        device = next(iter(live.values())).device if live else torch.device("cpu")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        setting, source = _setting(device), _source(expert)
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
                and all(map(_same, source, entry.source))
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
        """Evict the least recently used experts until another one fits; returns whether it fits."""
        own = sum(tensor.nbytes for name, tensor in live.items() if name not in self._own)
        needed = _bytes_of(live.values()) + _bytes_of(source) + own
        if needed > self.limit:
            return False
        while self.num_bytes + needed > self.limit:
            if not self._entries:  # copies of tensors that only evicted experts changed take the space
                self.clear()
                return self._make_room(live, source)
            oldest = min(self._entries, key=self._last.__getitem__)
            if self._last[oldest] > self._passes - _RECENT:
                return False
            del self._entries[oldest]
        return True


def _make(expert: PackedExpert, live: Mapping[str, Tensor], source: Sequence[Tensor], setting: tuple) -> _Entry:
    """Compute an expert's changed tensors from the model's tensors `live`."""
    unpacked, overflows, changed = expert.unpacked(), Overflows(), {}
    for name, tensor in live.items():
        changed[name] = overflows.watch(expert, name, tensor, unpacked.added(name, tensor))
    overflows.check()
    versions = [tensor._version for tensor in changed.values()]
    return _Entry(changed, versions, [tensor.detach().clone() for tensor in source], setting)


def _source(expert: PackedExpert) -> list[Tensor]:
    """The expert's own tensors, which its changed tensors depend on."""
    return [*expert.tensors().values(), *(expert.shared or {}).values()]


def _setting(device: torch.device) -> tuple[Any, ...]:
    """The state that changed tensors also depend on, with the CUDA stream, because other streams do not wait for it."""
    narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return narrow, stream, torch.get_float32_matmul_precision()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary dense tensor of torch's own class, with values in memory."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and tensor.layout == torch.strided


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, device and values."""
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def _bytes_of(tensors: Any) -> int:
    """Total size of tensors in bytes."""
    return sum(tensor.nbytes for tensor in tensors)
