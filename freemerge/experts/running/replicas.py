"""Twins: modules of the same structure that share every tensor, and in which layers and tensors may be exchanged.

Computing with other weights means that layers find other tensors. Exchanging them in the module itself would change
what other threads compute and what `state_dict` shows. A twin has module objects of its own, whose parameters, buffers
and hooks are those of the originals; what happens to its objects stays in the twin. Twins are kept for the next pass.
One is used again only as long as every attribute of the originals is what it was, and it starts as it was made.

Some modules cannot have one: what is compiled or scripted runs code that knows the original objects, as does a
function with one of them in its closure. Such a module is used itself, by one thread at a time.
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
_KNOW_THEMSELVES = (
    "OptimizedModule",
    "ScriptModule",
    "FSDPModule",
    "FullyShardedDataParallel",
    "DistributedDataParallel",
)


class Workspace:
    """A module that the caller may exchange layers and tensors in: a twin, or the module itself.

    Args:
        module: the original.
        twins: each of its modules and that one's twin; None if it is the module itself.
        may_be_kept: whether the twin can be kept for the next pass without keeping the original alive.
    """

    def __init__(
        self, module: nn.Module, twins: list[tuple[nn.Module, nn.Module]] | None, may_be_kept: bool = False
    ) -> None:
        self.may_be_kept = may_be_kept
        self._of = None if twins is None else {id(part): twin for part, twin in twins}
        self.plans: dict[Any, Any] = {}
        """What has been found out about the twin, by whoever computes with it."""
        if twins is not None:
            self._originals = [_Snapshot(part) for part, _ in twins if part is not module]
            self._root = _Snapshot(module, weak=True)
            # torch's own modules keep nothing of a pass
            own = (twin for _, twin in twins if not type(twin).__module__.startswith("torch.nn.modules."))
            self._twins = [_Snapshot(twin) for twin in own]

    @property
    def is_replica(self) -> bool:
        """Whether the original stays as it is, whatever happens to this one."""
        return self._of is not None

    def __getitem__(self, part: nn.Module) -> nn.Module:
        """The counterpart of the original or one of its modules."""
        return part if self._of is None else self._of[id(part)]

    @property
    def is_current(self) -> bool:
        """Whether the originals are what they were when the twin was made."""
        return self._root.holds and all(original.holds for original in self._originals)

    def renew(self) -> None:
        """Make the twin what it was at first, whatever its modules have kept of a pass."""
        for twin in self._twins:
            if not twin.holds:
                twin.restore()


class _Snapshot:
    """The attributes of a module at some time.

    Args:
        module: the module.
        weak: not to keep the module alive.
    """

    def __init__(self, module: nn.Module, weak: bool = False) -> None:
        self._module = ref(module) if weak else lambda: module
        has = vars(module)
        self._values = list(has.values())
        self._keys = list(has)
        inner = [(key, value) for key, value in has.items() if type(value) in (dict, OrderedDict, list)]
        self._empty = [value for key, value in inner if key in _OWN and not value]
        # Others by what they hold, where it is a tensor, a module or a hook.
        self._filled = [
            (value, list(_items(value)), dict(value) if key in _OWN else None)
            for key, value in inner
            if value and (key in _OWN or any(isinstance(item, (Tensor, nn.Module)) for item in _items(value)))
        ]

    @property
    def holds(self) -> bool:
        """Whether all is as it was: the very same objects."""
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
        """Make it so again."""
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
    return container.values() if isinstance(container, dict) else container


@contextmanager
def workspace(module: nn.Module) -> Iterator[Workspace]:
    """For the duration of a block, a module to exchange layers and tensors in.

    The original's tensors are not written to meanwhile. If the module can have a twin, other threads compute with it at
    the same time; otherwise they wait.
    """
    lock = exclusive(module)
    with lock.shared():
        twin = _spare_replica(module) or make_replica(module)
        if twin is not None:
            yield twin
            if twin.may_be_kept:  # not reached after an error: such a twin is not used again
                twin.renew()
                _spare.setdefault(module, []).append(twin)
            return
    with lock:
        yield Workspace(module, None)


_spare: WeakKeyDictionary[nn.Module, list[Workspace]] = WeakKeyDictionary()
"""Module → its twins that no thread uses now; they do not keep it alive."""


def _spare_replica(module: nn.Module) -> Workspace | None:
    twins = _spare.get(module)
    while twins:
        try:
            twin = twins.pop()
        except IndexError:  # another thread was faster
            return None
        if twin.is_current:
            return twin
    return None


def drop_replicas(module: nn.Module) -> None:
    """To be called when a module's tensors are exchanged, so that the memory of the old ones is given back."""
    _spare.pop(module, None)


def make_replica(module: nn.Module) -> Workspace | None:
    """The twin of a module; None if some part of it knows the original objects."""
    originals = {id(part): part for part in module.modules()}
    if any(_knows_itself(part) for part in originals.values()):
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
    except _KnowsOriginals:
        return None
    return Workspace(module, [(part, parts[own]) for own, part in originals.items()], not mapping.met_root)


_DEPTH = 4  # how far containers and objects in a module's attributes are followed

_OWN = frozenset(
    ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_hooks_with_kwargs",
     "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
)  # fmt: skip
"""What a twin's modules have as dictionaries of their own in any case, so that entries can be exchanged and added."""


def _knows_itself(part: nn.Module) -> bool:
    if getattr(part, "_compiled_call_impl", None) is not None:
        return True
    return any(kind.__name__ in _KNOW_THEMSELVES for kind in type(part).__mro__)


class _KnowsOriginals(Exception):
    """Something refers to the original modules in a way that cannot be followed."""


class _Mapping:
    """From what originals hold to what their twins do.

    Args:
        parts: id of an original module → its twin.
        root: the original that consists of all others.
    """

    def __init__(self, parts: dict[int, nn.Module], root: nn.Module) -> None:
        self._parts, self._root = parts, root
        self.met_root = False  # whether something in the originals refers to it
        self._known: dict[int, tuple[Any, Any]] = {}  # id → what has it, and what that becomes; itself while in work
        self._depth = 0

    def mapped(self, value: Any, fresh: bool = False) -> Any:
        """The same with twins instead of originals; the very same object if it holds none, unless it has to be fresh.

        Raises:
            _KnowsOriginals: if it holds one in a place that cannot be exchanged.
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
        self.met_root |= module is self._root
        if (twin := self._parts.get(id(module))) is not None:
            return twin
        if any(id(part) in self._parts for part in module.modules()):  # something around the original
            raise _KnowsOriginals
        return module

    def _container(self, value: Any, fresh: bool) -> Any:
        if isinstance(value, dict):
            items = {key: self.mapped(item) for key, item in value.items()}
            if not fresh and all(items[key] is item for key, item in value.items()):
                return value
            twin = copy.copy(value)
            twin.update(items)
            return twin
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
            return value if (of := value()) is None or (twin := self.mapped(of)) is of else ref(twin)
        held = self._names_of(value) if isinstance(value, FunctionType) else getattr(value, "__dict__", {}).values()
        for item in list(held):
            if self.mapped(item) is not item:
                raise _KnowsOriginals
        return value

    @staticmethod
    def _names_of(function: FunctionType) -> Iterator[Any]:
        """What a function refers to: in its closure, its defaults, and modules among its globals."""
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # still empty
                continue
        yield from function.__defaults__ or ()
        for name in function.__code__.co_names:
            if isinstance(found := function.__globals__.get(name), nn.Module):
                yield found
