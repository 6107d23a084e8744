"""Replicas: modules that share every tensor with an original and in which layers and tensors may be exchanged.

Computing with changed weights requires that layers refer to other tensors. Exchanging these in the module itself would
affect other threads and `state_dict`. A replica has its own module objects, which refer to the original's parameters,
buffers and hooks; changes of its objects do not affect the original. Replicas are reused for later passes as long as
every attribute of the original modules is unchanged, and are reset to their initial state after each pass.

Some modules cannot be replicated: compiled or scripted code refers to the original objects, as does a function with one
of them in its closure. Such a module is used directly, by one thread at a time. `copy.deepcopy` would copy the tensors
as well, and `torch.nn.parallel.replicate` needs GPUs, which is why this module exists.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from freemerge.experts.running.locks import exclusive

_PLAIN = (bool, int, float, complex, str, bytes, NoneType, type, torch.dtype, torch.device, torch.Size, Tensor,
          nn.Parameter, BuiltinFunctionType)  # fmt: skip
# classes whose code refers to the original objects
_NOT_REPLICABLE = (
    "OptimizedModule",
    "ScriptModule",
    "FSDPModule",
    "FullyShardedDataParallel",
    "DistributedDataParallel",
)


class Workspace:
    """A module in which the caller may exchange layers and tensors: a replica, or the module itself.

    Args:
        module: the original.
        replicas: pairs of an original module and its replica; None if the module itself is used.
        is_reusable: whether the replica can be stored for later passes without keeping the original alive.
    """

    def __init__(
        self, module: nn.Module, replicas: list[tuple[nn.Module, nn.Module]] | None, is_reusable: bool = False
    ) -> None:
        self.is_reusable = is_reusable
        self._of = None if replicas is None else {id(part): replica for part, replica in replicas}
        self.plans: dict[Any, Any] = {}
        """Results about the replica's structure that its users cache here."""
        if replicas is not None:
            self._originals = [_Snapshot(part) for part, _ in replicas if part is not module]
            self._root = _Snapshot(module, weak=True)
            # torch's own modules store nothing during a pass
            own = (replica for _, replica in replicas if not type(replica).__module__.startswith("torch.nn.modules."))
            self._replicas = [_Snapshot(replica) for replica in own]

    @property
    def is_replica(self) -> bool:
        """Whether this is a replica, so that changes do not affect the original."""
        return self._of is not None

    def __getitem__(self, part: nn.Module) -> nn.Module:
        """The replica of the original or of one of its submodules; `part` itself if there is no replica."""
        return part if self._of is None else self._of[id(part)]

    @property
    def is_current(self) -> bool:
        """Whether the original modules are unchanged since the replica was made."""
        return self._root.is_current and all(original.is_current for original in self._originals)

    def reset(self) -> None:
        """Restore the replica's initial state, whatever its modules stored during a pass."""
        for replica in self._replicas:
            if not replica.is_current:
                replica.restore()


class _Snapshot:
    """The attributes of a module at one time.

    Args:
        module: the module.
        weak: whether to refer to the module weakly, so that the snapshot does not keep it alive.
    """

    def __init__(self, module: nn.Module, weak: bool = False) -> None:
        self._module = ref(module) if weak else lambda: module
        has = vars(module)
        self._values = list(has.values())
        self._keys = list(has)
        inner = [(key, value) for key, value in has.items() if type(value) in (dict, OrderedDict, list)]
        self._empty = [value for key, value in inner if key in _OWN and not value]
        # containers of tensors, modules or hooks, compared by their items
        self._filled = [
            (value, list(_items(value)), dict(value) if key in _OWN else None)
            for key, value in inner
            if value and (key in _OWN or any(isinstance(item, (Tensor, nn.Module)) for item in _items(value)))
        ]

    @property
    def is_current(self) -> bool:
        """Whether the module's attributes are still the same objects."""
        module = self._module()
        if module is None:
            return False
        has = vars(module)
        if len(has) != len(self._values) or not all(map(is_, has.values(), self._values)) or any(self._empty):
            return False
        for container, items, _ in self._filled:
            if len(container) != len(items) or not all(map(is_, _items(container), items)):
                return False
        return True

    def restore(self) -> None:
        """Set the module's attributes to those of the snapshot."""
        has = vars(self._module())
        has.clear()
        has.update(zip(self._keys, self._values, strict=True))
        for container in self._empty:
            container.clear()
        for container, items, entries in self._filled:
            if isinstance(container, list):
                container[:] = items
            elif entries is not None:
                container.clear()
                container.update(entries)


def _items(container: dict | list) -> Iterable[Any]:
    """The values of a dictionary or the items of a list."""
    return container.values() if isinstance(container, dict) else container


@contextmanager
def workspace(module: nn.Module) -> Iterator[Workspace]:
    """Provide a module in which layers and tensors may be exchanged, for the duration of a block.

    Other threads do not write to the module's tensors meanwhile. If the module can be replicated, they can compute with
    it at the same time; otherwise they wait.

    Args:
        module: the original.

    Yields:
        A replica, or the module itself if it cannot be replicated.
    """
    lock = exclusive(module)
    with lock.shared():
        replica = _spare_replica(module) or make_replica(module)
        if replica is not None:
            yield replica
            if replica.is_reusable:  # not reached after an error: such a replica is not used again
                replica.reset()
                _spare.setdefault(module, []).append(replica)
            return
    with lock:
        yield Workspace(module, None)


_spare: WeakKeyDictionary[nn.Module, list[Workspace]] = WeakKeyDictionary()
"""Module → its replicas that no thread is using; they do not keep the module alive."""


def _spare_replica(module: nn.Module) -> Workspace | None:
    """A replica that no thread is using, if there is one that is still valid."""
    replicas = _spare.get(module)
    while replicas:
        try:
            replica = replicas.pop()
        except IndexError:  # another thread was faster
            return None
        if replica.is_current:
            return replica
    return None


def drop_replicas(module: nn.Module) -> None:
    """Discard a module's replicas; call it when the module gets new tensors, to free the memory of the old ones.

    Args:
        module: the original.
    """
    _spare.pop(module, None)


def make_replica(module: nn.Module) -> Workspace | None:
    """Make a replica of a module.

    Args:
        module: the original.

    Returns:
        The replica; None if a part of the module refers to the original objects in a way that cannot be replicated.
    """
    originals = {id(part): part for part in module.modules()}
    if any(_refers_to_itself(part) for part in originals.values()):
        return None
    parts = {own: object.__new__(type(part)) for own, part in originals.items()}
    mapping = _Mapping(parts, module)
    try:
        for own, part in originals.items():
            vars(parts[own]).update(
                {
                    key: value if type(value) in _PLAIN else mapping.mapped(value, fresh=key in _OWN)
                    for key, value in vars(part).items()
                }
            )
    except _NotReplicable:
        return None
    return Workspace(module, [(part, parts[own]) for own, part in originals.items()], not mapping.found_root)


_DEPTH = 4  # maximum nesting of containers and objects in a module's attributes that are followed

_OWN = frozenset(
    ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_hooks_with_kwargs",
     "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
)  # fmt: skip
"""Attributes whose dictionaries are always copied for a replica, so that entries can be exchanged and added."""


def _refers_to_itself(part: nn.Module) -> bool:
    """Whether a module's code refers to the original objects: compiled, scripted or distributed modules."""
    if getattr(part, "_compiled_call_impl", None) is not None:
        return True
    return any(kind.__name__ in _NOT_REPLICABLE for kind in type(part).__mro__)


class _NotReplicable(Exception):
    """An object refers to the original modules in a way that cannot be replicated."""


class _Mapping:
    """Maps attribute values of the originals to those of their replicas.

    Args:
        parts: id of an original module → its replica.
        root: the original that contains all others.
    """

    def __init__(self, parts: dict[int, nn.Module], root: nn.Module) -> None:
        self._parts, self._root = parts, root
        self.found_root = False  # whether an attribute of the originals refers to the root
        self._known: dict[int, tuple[Any, Any]] = {}  # id → value, its mapped value (itself while in work)
        self._depth = 0

    def mapped(self, value: Any, fresh: bool = False) -> Any:
        """A value with replicas in place of originals.

        Args:
            value: an attribute's value.
            fresh: whether to copy a dictionary even if it refers to no original.

        Returns:
            The same object if it refers to no original and `fresh` is false.

        Raises:
            _NotReplicable: if it refers to an original in a place that cannot be replaced.
        """
        if type(value) in _PLAIN or isinstance(value, (Tensor, type, ModuleType)):
            return value
        if isinstance(value, nn.Module):
            return self._module(value)
        if id(value) in self._known:
            return self._known[id(value)][1]
        self._known[id(value)] = (value, value)
        self._depth += 1
        found = self._container(value, fresh) if self._depth <= _DEPTH else value
        self._depth -= 1
        self._known[id(value)] = (value, found)
        return found

    def _module(self, module: nn.Module) -> nn.Module:
        """The replica of an original; other modules unchanged."""
        self.found_root |= module is self._root
        if (replica := self._parts.get(id(module))) is not None:
            return replica
        if any(id(part) in self._parts for part in module.modules()):  # a module that contains an original
            raise _NotReplicable
        return module

    def _container(self, value: Any, fresh: bool) -> Any:
        """A container, function or other object with replicas in place of originals."""
        if isinstance(value, dict):
            items = {key: self.mapped(item) for key, item in value.items()}
            if not fresh and all(items[key] is item for key, item in value.items()):
                return value
            copied = copy.copy(value)
            copied.update(items)
            return copied
        if isinstance(value, (list, tuple, set, frozenset)):
            parts = [self.mapped(item) for item in value]
            if all(new is item for new, item in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, MethodType):
            owner = self.mapped(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, partial):
            func, args, keywords = (self.mapped(part) for part in (value.func, value.args, value.keywords))
            same = func is value.func and args is value.args and keywords is value.keywords
            return value if same else partial(func, *args, **keywords)
        if isinstance(value, ref):
            return value if (of := value()) is None or (mapped := self.mapped(of)) is of else ref(mapped)
        is_function = isinstance(value, FunctionType)
        references = self._references_of(value) if is_function else getattr(value, "__dict__", {}).values()
        for item in list(references):
            if self.mapped(item) is not item:
                raise _NotReplicable
        return value

    @staticmethod
    def _references_of(function: FunctionType) -> Iterator[Any]:
        """The objects that a function refers to: its closure, its defaults, and modules among its globals."""
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # still empty
                continue
        yield from function.__defaults__ or ()
        for name in function.__code__.co_names:
            if isinstance(found := function.__globals__.get(name), nn.Module):
                yield found
