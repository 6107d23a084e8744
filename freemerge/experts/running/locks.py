"""One thread at a time computes with a module whose weights or layers are exchanged for it.

An expert is switched into weights that all threads see, and hooks run in whichever thread calls the layer. So whoever
exchanges something in a module holds its lock until everything is back. The lock is no part of the module: modules are
copied and pickled as before.
"""

from __future__ import annotations

from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registering = Lock()


def exclusive(module: nn.Module) -> RLock:
    """The lock of a module, to be used as `with exclusive(module): …`; a thread that holds it may take it again.

    A module shares it with all modules that it consists of, and so with every other that has one of these.
    """
    lock = _locks.get(module)
    if lock is not None:
        return lock
    with _registering:
        parts = list(module.modules())
        lock = next((_locks[part] for part in parts if part in _locks), None) or RLock()
        for part in parts:
            _locks.setdefault(part, lock)
        return _locks[module]
