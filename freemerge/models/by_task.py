"""A mapping from task names to modules that allows every task name."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Generic, TypeVar, cast

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


class TaskModules(nn.Module, Generic[_Module]):
    """An ordered mapping from task names to modules, like `nn.ModuleDict` but without reserved names.

    `nn.ModuleDict` refuses names with a dot and the names of its own methods, such as `type` and `keys`. This class
    escapes them in state dicts (`v1%2E0`, `%type`) and leaves all other names unchanged.

    Args:
        modules: task name → module; several tasks may have the same object.

    Raises:
        TypeError: if a value is not an `nn.Module`.
    """

    def __init__(self, modules: Mapping[str, _Module] | None = None) -> None:
        super().__init__()
        self._escaped: dict[str, str] = {}  # task → key in `_modules`
        for task, module in (modules or {}).items():
            self[task] = module

    def __setitem__(self, task: str, module: _Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"the module of task {task!r} is a {type(module).__name__}, not an nn.Module")
        escaped = task.replace("%", "%25").replace(".", "%2E")
        if hasattr(type(self), escaped) or escaped in self.__dict__:
            escaped = f"%{escaped}"
        self._escaped[task] = escaped
        self._modules[escaped] = module

    def __getitem__(self, task: str) -> _Module:
        return cast(_Module, self._modules[self._escaped[task]])  # torch's type allows any module and None

    def __contains__(self, task: object) -> bool:
        return task in self._escaped

    def __iter__(self) -> Iterator[str]:
        return iter(self._escaped)

    def __len__(self) -> int:
        return len(self._escaped)

    def keys(self) -> KeysView[str]:
        """The task names, in order."""
        return self._escaped.keys()

    def values(self) -> ValuesView[_Module]:
        """The modules, in the order of their tasks."""
        return dict(self.items()).values()

    def items(self) -> ItemsView[str, _Module]:
        """Pairs of task name and module, in order."""
        return {task: self[task] for task in self}.items()
