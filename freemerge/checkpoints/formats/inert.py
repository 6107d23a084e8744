"""Unpickle tensors beside objects of any class: only tensors become real, all other objects become inert placeholders.

A Lightning checkpoint holds hyperparameters beside its weights: a path, a configuration node, a module. Reading the
weights must not require these classes, and must not run their code. So the names in a pickle are looked up in a fixed
table; every other name becomes a class that does nothing. torch's own `weights_only` loader refuses such files as a
whole, so this loader stays our own.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch


class Inert:
    """A placeholder for an object of an unknown class: accepts every pickle operation and stores nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> Inert:
        return self

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """Accepts the items that a pickle appends to a list subclass."""

    extend = add = append


_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_CALLED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("torch._utils", name): vars(torch._utils)[name] for name in _REBUILD},
}
# Names that are only referenced. torch's own loader knows the typed storages. Dtypes are not looked up with
# `getattr(torch, name)`, which could import submodules.
_NAMED: dict[tuple[str, str], Any] = {
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
_REAL = _CALLED | _NAMED


class Unpickler(pickle._Unpickler):  # pure Python: a number in the file cannot make its memo huge
    """Unpickles with a fixed table of names; see the module's docstring."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # set by the base class in `load`
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> Any:
        """The few functions and classes that build a tensor; `Inert` for every other name. Nothing is imported."""
        return _REAL.get((module, name), Inert)

    def _made(self, made_by: Any, arguments: tuple) -> Any:
        return made_by(*arguments) if any(made_by is each for each in _CALLED.values()) else Inert()

    def load_reduce(self) -> None:
        """Call an allowed function."""
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_newobj_ex(self) -> None:
        """The same with keyword arguments."""
        self.stack.pop()
        self.load_reduce()

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def _instantiate(self, kind: Any, arguments: list) -> None:
        self.append(self._made(kind, tuple(arguments)))


Error = pickle.UnpicklingError
"""torch asks a pickle module for it."""


def load(file: Any, **_: Any) -> Any:
    """Only archives of torch ≥ 1.6 are supported; for the older format, torch would open tar files."""
    raise Error("files older than torch 1.6 with unknown objects cannot be read")
