"""Unpickle tensors past objects of any class: only what makes a tensor is real, all else is an inert stand-in.

A Lightning checkpoint holds hyperparameters beside its weights: a path, a configuration node, a module. Nobody has to
be able to import these to read the weights, and none of their code must run. So the names that a pickle gives are
looked up in a fixed table; every other one is a class that does nothing, whatever it is called with.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch


class Inert:
    """Stands for an object of an unknown class; takes everything that a pickle does to it, and keeps nothing."""

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
        """What a pickle appends to a list of its own class."""

    extend = add = append


_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_CALLED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("torch._utils", name): vars(torch._utils)[name] for name in _REBUILD},
}
# What is only named. torch's own loader knows the typed storages. Dtypes are not asked of `torch` by their names: it
# imports the modules that it is asked for.
_NAMED: dict[tuple[str, str], Any] = {
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
_REAL = _CALLED | _NAMED


class Unpickler(pickle._Unpickler):  # of pure Python: its memo is not as large as a number in the file asks for
    """Follows a pickle; see the head of this module."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # these two are made by the base when it begins to load
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> Any:
        """The few functions and classes that make a tensor; `Inert` for every other name. Nothing is imported."""
        return _REAL.get((module, name), Inert)

    def _made(self, made_by: Any, arguments: tuple) -> Any:
        return made_by(*arguments) if any(made_by is each for each in _CALLED.values()) else Inert()

    def load_reduce(self) -> None:
        """Call what is allowed to be called."""
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_newobj_ex(self) -> None:
        """The same, with arguments by name."""
        self.stack.pop()
        self.load_reduce()

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def _instantiate(self, kind: Any, arguments: list) -> None:
        self.append(self._made(kind, tuple(arguments)))


Error = pickle.UnpicklingError
"""torch asks a pickle module for it."""


def load(file: Any, **_: Any) -> Any:
    """Only archives of torch ≥ 1.6 are read so; the older format would have torch look into tar files."""
    raise Error("files of before torch 1.6 are not read past unknown objects")
