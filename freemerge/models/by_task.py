"""A module for each task, whatever the task is called."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Generic, TypeVar, cast

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


class TaskModules(nn.Module, Generic[_Module]):
    """Task name → module, in order: a mapping, as `nn.ModuleDict` is, without its reserved names.

    `nn.ModuleDict` refuses a dot and the names of its own methods, such as `type` and `keys`. In a state dict these are
    written otherwise (`v1%2E0`, `%type`), and all other names as they are.

    Args:
        modules: task name → module; one object may stand for several tasks.
    """

    def __init__(self, modules: Mapping[str, _Module] | None = None) -> None:
        super().__init__()
        self._written: dict[str, str] = {}  # task → name in `_modules`
        for task, module in (modules or {}).items():
            self[task] = module

    def __setitem__(self, task: str, module: _Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"the module of task {task!r} is a {type(module).__name__}, not an nn.Module")
        written = task.replace("%", "%25").replace(".", "%2E")
        if hasattr(type(self), written) or written in self.__dict__:
            written = f"%{written}"
        self._written[task] = written
        self._modules[written] = module

    def __getitem__(self, task: str) -> _Module:
        return cast(_Module, self._modules[self._written[task]])  # torch's table has modules of any class, and None

    def __contains__(self, task: object) -> bool:
        return task in self._written

    def __iter__(self) -> Iterator[str]:
        return iter(self._written)

    def __len__(self) -> int:
        return len(self._written)

    def keys(self) -> KeysView[str]:
        """The task names."""
        return self._written.keys()

    def values(self) -> ValuesView[_Module]:
        """The modules."""
        return dict(self.items()).values()

    def items(self) -> ItemsView[str, _Module]:
        """Task names and modules."""
        return {task: self[task] for task in self}.items()
