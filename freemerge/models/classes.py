"""Classes that a folder names: freemerge's own by their names, all others by module path.

A folder never imports anything by itself, as importing runs code: only if its caller says so.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from freemerge.checkpoints import CheckpointError
from freemerge.names import class_name


def is_builtin(name: str) -> bool:
    """Whether a folder's name of a class is one of freemerge's own classes."""
    return "." not in name


def import_class(name: str, where: str, what: str, give: str, trust: bool) -> type:
    """A class from outside freemerge.

    Args:
        name: `package.module.Class`.
        where: the folder, for messages.
        what: what it is the class of, for messages.
        give: what the caller can do instead, such as `pass router=…`.
        trust: whether the caller has said that what the folder names may be imported.

    Raises:
        CheckpointError: if it may not be imported, or cannot.
    """
    if not trust:
        raise CheckpointError(
            f"{where}: {what} is a {name}, and a folder runs no code by itself; {give}, or say "
            "trust_remote_code=True if that class may be imported"
        )
    module, _, attribute = name.rpartition(".")
    try:
        while True:  # a class within a class
            try:
                found: Any = import_module(module)
                break
            except ModuleNotFoundError:
                module, _, outer = module.rpartition(".")
                attribute = f"{outer}.{attribute}"
                if not module:
                    raise
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"{where}: {what} is a {name}, which cannot be imported ({error}); {give}") from error
    if not isinstance(found, type):
        raise CheckpointError(f"{where}: {what} is a {name}, which is no class; {give}")
    return found


def make(kind: type, arguments: Any, where: str, what: str, give: str) -> Any:
    """An object of a class from outside freemerge, from the arguments that its `recipe` wrote.

    Raises:
        CheckpointError: if there are none, or the class does not take them.
    """
    if not isinstance(arguments, dict):
        raise CheckpointError(
            f"{where}: {what} is a {class_name(kind)}, which says in no `recipe()` what it is made of; {give}"
        )
    try:
        return kind(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: {what} is a {class_name(kind)} that cannot be made ({error}); {give}"
        ) from error


_ARGUMENTS = "_freemerge_arguments"
_Made = TypeVar("_Made")


def instantiate_and_record(class_type: type[_Made], *args: Any, **kwargs: Any) -> _Made:
    """`class_type(*args, **kwargs)`, which remembers plain arguments: a configuration's way to build a module."""
    made = class_type(*args, **kwargs)
    with suppress(TypeError, ValueError, AttributeError):
        json.dumps(kwargs)
        if not args:
            made.__dict__[_ARGUMENTS] = dict(kwargs)
    return made


def class_and_arguments(module: nn.Module, what: str) -> dict[str, Any] | None:
    """A module's class and arguments, as its `recipe()` gives or a configuration gave them; None if neither does.

    Raises:
        ValueError: if `recipe()` gives nothing that JSON can hold.
    """
    arguments = recipe_arguments(module, what)
    if arguments is None:
        arguments = module.__dict__.get(_ARGUMENTS)
    return None if arguments is None else {"class": class_name(type(module)), "arguments": arguments}


def recipe_arguments(module: nn.Module, what: str) -> dict[str, Any] | None:
    """What an object's `recipe()` says it is made of; None if it has none.

    Raises:
        ValueError: if that is nothing that JSON can hold.
    """
    recipe = getattr(module, "recipe", None)
    arguments = recipe() if callable(recipe) else None
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {type(module).__name__}.recipe() must give plain data ({error})") from error
    return arguments
