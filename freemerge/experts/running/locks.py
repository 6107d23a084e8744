"""Who may change a module in place, and who only reads it.

Computing changes nothing: any number of threads compute with a module at a time, each through a twin of its own
(`twins`). Whoever writes to the module's own tensors or layers (`attached`, `load_state_dict`, `to`) has it alone. The
lock is no part of the module: modules are copied and pickled as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock, get_ident
from weakref import WeakKeyDictionary

from torch import nn


class ModuleLock:
    """Many readers or one writer; `with lock:` is for the writer, `with lock.shared():` for readers.

    A thread that has the lock may take it again in either way, and a waiting writer goes before new readers.
    """

    def __init__(self) -> None:
        self._changed = Condition(Lock())
        self._readers: dict[int, int] = {}  # thread → how often it has taken the lock for reading
        self._writer: int | None = None
        self._depth = 0  # how often the writer has taken it
        self._waiting: list[int] = []  # threads that want to write

    @contextmanager
    def shared(self) -> Iterator[None]:
        """No thread changes the module while the block runs."""
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
                    raise RuntimeError("two threads want to change a module that both compute with; change it outside")
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
    """The lock of a module: `with exclusive(module): …` has the module alone.

    A module shares it with all modules that it consists of, and so with every other that has one of these.
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
