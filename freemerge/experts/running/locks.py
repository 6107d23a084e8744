"""Locks that separate threads that change a module in place from threads that compute with it.

A forward pass changes nothing: any number of threads can compute with a module at a time, each in its own replica
(`replicas`). A thread that writes to the module's tensors or layers (`attached`, `load_state_dict`, `to`) has exclusive
access. The lock is not an attribute of the module, so modules are copied and pickled as usual. The standard library has
no lock for many readers or one writer, which is why this one is our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock, get_ident
from weakref import WeakKeyDictionary

from torch import nn


class ModuleLock:
    """A lock for many readers or one writer: `with lock:` for the writer, `with lock.shared():` for readers.

    A thread that holds the lock may take it again in either way. Waiting writers go before new readers.

    Raises:
        RuntimeError: if two readers both wait to become the writer, which neither ever could.
    """

    def __init__(self) -> None:
        self._changed = Condition(Lock())
        self._readers: dict[int, int] = {}  # thread → how often it holds the lock for reading
        self._writer: int | None = None
        self._depth = 0  # how often the writer holds it
        self._waiting: list[int] = []  # threads that wait to write

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock as a reader: no thread changes the module while the block runs."""
        me = get_ident()
        with self._changed:
            if self._writer != me and me not in self._readers:
                self._changed.wait_for(lambda: self._writer is None and not self._waiting)
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._changed.notify_all()

    def __enter__(self) -> None:
        me = get_ident()
        with self._changed:
            if self._writer != me:
                if me in self._readers and any(other in self._readers for other in self._waiting):
                    raise RuntimeError(
                        "two threads that compute with a module both wait to change it; change it outside of the passes"
                    )
                self._waiting.append(me)
                try:
                    self._changed.wait_for(lambda: self._writer is None and not self._readers.keys() - {me})
                finally:
                    self._waiting.remove(me)
                    self._changed.notify_all()
                self._writer = me
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._writer = None
                self._changed.notify_all()


_locks: WeakKeyDictionary[nn.Module, ModuleLock] = WeakKeyDictionary()
_registering = Lock()


def exclusive(module: nn.Module) -> ModuleLock:
    """The lock of a module: `with exclusive(module): …` has exclusive access to the module.

    A module shares its lock with its submodules, and therefore with every other module that contains one of these.

    Args:
        module: the module.

    Returns:
        The lock; `exclusive(module).shared()` locks out writers only.
    """
    lock = _locks.get(module)
    if lock is not None:
        return lock
    with _registering:
        parts = list(module.modules())
        lock = next((_locks[part] for part in parts if part in _locks), None) or ModuleLock()
        for part in parts:
            _locks.setdefault(part, lock)
        return _locks[module]
