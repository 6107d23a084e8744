"""Classes that a model folder refers to: freemerge's own by name, all others by import path.

Importing a module runs its code, so a class from outside freemerge is imported only if the caller of a loading function
allows it.
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
    """Whether the name of a class in a folder refers to freemerge's own classes.

    Args:
        name: `Class` or `package.module.Class`.
    """
    return "." not in name


def import_class(name: str, where: str, what: str, remedy: str, trust: bool) -> type:
    """Import a class from outside freemerge.

    Args:
        name: `package.module.Class`.
        where: the folder, for messages.
        what: the object whose class it is, such as `the router`, for messages.
        remedy: what the caller can do instead, such as `pass router=…`, for messages.
        trust: whether the caller allows classes to be imported.

    Raises:
        CheckpointError: if the class may not or cannot be imported.
    """
    if not trust:
        raise CheckpointError(
            f"{where}: {what} is a {name}, which is not imported by default, as this runs its code; {remedy}, or pass "
            "trust_remote_code=True to allow the import"
        )
    module, _, attribute = name.rpartition(".")
    try:
        while True:  # the last parts may be nested classes
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
        raise CheckpointError(f"{where}: {what} is a {name}, which cannot be imported ({error}); {remedy}") from error
    if not isinstance(found, type):
        raise CheckpointError(f"{where}: {what} is a {name}, which is not a class; {remedy}")
    return found


def instantiate(kind: type, arguments: Any, where: str, what: str, remedy: str) -> Any:
    """Build an object of a class from outside freemerge.

    Args:
        kind: the class.
        arguments: the arguments that the object's `recipe()` returned when it was saved.
        where: the folder, for messages.
        what: the object, such as `the router`, for messages.
        remedy: what the caller can do instead, such as `pass router=…`, for messages.

    Raises:
        CheckpointError: if there are no arguments, or the class does not accept them.
    """
    if not isinstance(arguments, dict):
        raise CheckpointError(
            f"{where}: {what} is a {class_name(kind)}, without a `recipe()` that returns its arguments; {remedy}"
        )
    try:
        return kind(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: {what} is a {class_name(kind)} that cannot be built ({error}); {remedy}"
        ) from error


_ARGUMENTS = "_freemerge_arguments"
_Made = TypeVar("_Made")


def instantiate_and_record(class_type: type[_Made], *args: Any, **kwargs: Any) -> _Made:
    """Build an object and record its arguments, so that a saved folder can contain them.

    Args:
        class_type: the class.
        *args: positional arguments; with any, nothing is recorded.
        **kwargs: keyword arguments, which are recorded if JSON can represent them.

    Returns:
        The object.
    """
    made = class_type(*args, **kwargs)
    with suppress(TypeError, ValueError, AttributeError):
        json.dumps(kwargs)
        if not args:
            made.__dict__[_ARGUMENTS] = dict(kwargs)
    return made


def class_and_arguments(module: nn.Module, what: str) -> dict[str, Any] | None:
    """A module's class and arguments, from its `recipe()` or from the configuration that built it.

    Args:
        module: the module.
        what: the module, for messages.

    Returns:
        `class` and `arguments`; None if neither source has them.

    Raises:
        ValueError: if JSON cannot represent the result of `recipe()`.
    """
    arguments = recipe_arguments(module, what)
    if arguments is None:
        arguments = module.__dict__.get(_ARGUMENTS)
    return None if arguments is None else {"class": class_name(type(module)), "arguments": arguments}


def recipe_arguments(module: nn.Module, what: str) -> dict[str, Any] | None:
    """The constructor arguments that a module's `recipe()` returns.

    Args:
        module: the module.
        what: the module, for messages.

    Returns:
        The arguments; None if the module has no `recipe()` or it returns None.

    Raises:
        ValueError: if JSON cannot represent them.
    """
    recipe = getattr(module, "recipe", None)
    arguments = recipe() if callable(recipe) else None
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what}: {type(module).__name__}.recipe() must return JSON-serialisable data ({error})"
        ) from error
    return arguments
