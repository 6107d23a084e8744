"""Find the faults of options: unknown names, and values that do not match the type of their option.

Names are compared with the parser's options and with the parameters of the configured classes. Each value is passed to
jsonargparse on its own; if it is refused, its items, fields or arguments are checked in turn. jsonargparse has no such
report: its errors are text for people.
"""

from __future__ import annotations

import collections.abc
import inspect
import re
import types as builtin_types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

from jsonargparse import ArgumentParser

from freemerge.cli.names import closest, combination
from freemerge.cli.options import CLASS_KEYS, options, required, types


def faults_of_options(parser: ArgumentParser, values: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """Yield the faults of options, in their order.

    Args:
        parser: the parser of the options.
        values: the options' values, as nested mappings.
        group: the key of the group that `values` belong to, with a dot at its end.

    Yields:
        A message for each fault, with a suggestion if a known name is close.
    """
    known = types(parser)
    for name, value in values.items():
        key = f"{group}{name}"
        if key in known:
            yield from _faults_of_value(key, value, known[key])
        elif not any(each.startswith(f"{key}.") for each in known):
            yield f"there is no key '{key}'{closest(key, options(parser))}"
        elif isinstance(value, dict):
            yield from faults_of_options(parser, value, f"{key}.")


def _faults_of_value(key: str, value: Any, hint: Any) -> Iterator[str]:
    """Yield the faults inside one value or, if there are none, the fault of the value itself.

    Args:
        key: the option.
        value: its value.
        hint: its type annotation.
    """
    if hint is None or _accepts(hint, value):
        return
    found = False
    for fault in _inner_faults(key, value, hint):
        found = True
        yield fault
    if not found and "${" not in str(value):  # interpolations are resolved only in the whole configuration
        yield _wrong_value(key, value, hint)


def _accepts(hint: Any, value: Any) -> bool:
    """Whether jsonargparse accepts a value for a type annotation."""
    parser = ArgumentParser(exit_on_error=False)
    # As a union, because jsonargparse accepts any value for a dataclass alone.
    parser.add_argument("--value", type=hint if value is None else hint | None)
    try:
        parser.parse_args([f"--value={value}"]) if isinstance(value, str) else parser.parse_object({"value": value})
    except Exception:  # user-defined types and classes may raise anything
        return False
    return True


def _inner_faults(key: str, value: Any, hint: Any) -> Iterator[str]:
    """Yield the faults inside a list, a mapping or the description of a class."""
    for kind in _alternatives(hint):
        inner = get_args(kind)
        if is_typeddict(kind) and isinstance(value, dict):
            yield from _faults_of_fields(key, value, kind)
        elif get_origin(kind) is list and inner and isinstance(value, list):
            for index, item in enumerate(value):
                yield from _faults_of_value(f"{key}[{index}]", item, inner[0])
        elif get_origin(kind) is dict and inner and isinstance(value, dict):
            for name, item in value.items():
                yield from _faults_of_value(f"{key}.{name}", item, inner[1])
    bases = [base for kind in _alternatives(hint) for base in _bases(kind)]
    if bases and isinstance(value, (str, dict)) and not closest(str(value), _choices(hint)):
        skipped = max((_positionals(kind) for kind in _alternatives(hint)), default=0)
        yield from _faults_of_class(key, value, bases, skipped)


def _faults_of_fields(key: str, value: Mapping[str, Any], fields: type) -> Iterator[str]:
    hints = inspect.get_annotations(fields)
    for name, item in value.items():
        if name in hints:
            yield from _faults_of_value(f"{key}.{name}", item, hints[name])
        else:
            yield f"there is no key '{key}.{name}'{closest(f'{key}.{name}', [f'{key}.{each}' for each in hints])}"


def _faults_of_class(key: str, value: str | Mapping[str, Any], bases: Sequence[type], skipped: int) -> Iterator[str]:
    """Yield the faults of the description of a class.

    Args:
        key: the option.
        value: the class's name, or `class_path` and `init_args`.
        bases: the classes that it may derive from.
        skipped: number of its first parameters that cannot be configured, because the caller passes them.
    """
    given: Mapping[str, Any] = {"class_path": value} if isinstance(value, str) else value
    if is_dataclass(bases[0]) and not set(given) & set(CLASS_KEYS):  # given by its fields
        given = {"init_args": given}
    if wrong := next((name for name in given if name not in CLASS_KEYS), None):
        yield f"{key}: a class is given by class_path and init_args, not by '{wrong}'{closest(wrong, CLASS_KEYS)}"
        return
    path = str(given.get("class_path", bases[0].__name__))
    try:
        kind = _class_of(key, path, bases)
    except ValueError as error:
        yield str(error)
        return
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={skipped} if skipped else None, fail_untyped=False)
    known, arguments = types(parser), given.get("init_args") or {}
    for name, item in arguments.items():
        if name in known:
            yield from _faults_of_value(f"{key}.{name}", item, known[name])
        else:
            hint = closest(name, known) or (f"; it has {', '.join(known)}" if known else "")
            yield f"{key}: {kind.__name__} has no parameter '{name}'{hint}"
    if missing := [name for name in required(parser) if name not in arguments]:
        yield f"{key}: {kind.__name__} needs {', '.join(missing)}"


def _class_of(key: str, path: str, bases: Sequence[type]) -> type:
    """Find the class of an import path or a short name.

    Raises:
        ValueError: there is no such module or class, or it derives from none of the bases.
    """
    module, _, name = path.rpartition(".")
    if not module:
        known = {each.__name__: each for base in bases for each in _subclasses(base) if not inspect.isabstract(each)}
        if name in known:
            return known[name]
        hint = combination(name, sorted(known), key) or closest(name, sorted(known))
        raise ValueError(f"{key}: there is no class '{name}'{hint or '; known: ' + ', '.join(sorted(known))}")
    try:
        home = import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: there is no module '{error.name}'; is it misspelt, or not in the working directory?"
        ) from error
    if not hasattr(home, name):
        names = [each for each in dir(home) if not each.startswith("_")]
        raise ValueError(f"{key}: the module {module} has no '{name}'{closest(name, names)}")
    kind = getattr(home, name)
    if not (isinstance(kind, type) and issubclass(kind, tuple(bases))):
        raise ValueError(f"{key}: {path} is not a {' or '.join(base.__name__ for base in bases)}")
    return kind


def _wrong_value(key: str, value: Any, hint: Any) -> str:
    """The message for a value that does not match the type of its option."""
    choices = _choices(hint)
    others = [_name_of(kind) for kind in _alternatives(hint) if get_origin(kind) is not Literal]
    others.sort(key=lambda name: name == "null")
    expected = [f"one of {', '.join(choices)}"] if choices else []
    text = " ".join(str(value).split())
    shortened = text if len(text) <= 60 else f"{text[:59]}…"
    return f"{key}: expected {' or '.join(expected + others)}, got '{shortened}'{closest(text, choices)}"


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union; for other annotations, the annotation alone."""
    if get_origin(hint) in (Union, builtin_types.UnionType):
        return [each for member in get_args(hint) for each in _alternatives(member)]
    return [hint]


def _choices(hint: Any) -> list[str]:
    """The values that an annotation lists as `Literal`."""
    literals = [kind for kind in _alternatives(hint) if get_origin(kind) is Literal]
    return list(dict.fromkeys(str(each) for kind in literals for each in get_args(kind)))


def _bases(hint: Any) -> list[type]:
    """The base classes of the values of an annotation: a class, `type[…]`, or the class that a callable returns."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is type or origin is collections.abc.Callable:
        return [base for kind in _alternatives(inner[-1]) for base in _bases(kind)] if inner else []
    plain = isinstance(hint, type) and origin is None and not is_typeddict(hint)
    return [hint] if plain and hint.__module__ not in ("builtins", "collections.abc") else []


def _positionals(hint: Any) -> int:
    """The number of arguments of a `Callable` annotation; 0 for others."""
    if get_origin(hint) is not collections.abc.Callable:
        return 0
    parameters = get_args(hint)[0]
    return len(parameters) if isinstance(parameters, list) else 0


def _subclasses(base: type) -> Iterator[type]:
    yield base
    children: list[type] = base.__subclasses__()
    for child in children:
        yield from _subclasses(child)


def _name_of(hint: Any) -> str:
    if hint is type(None):
        return "null"
    plain = isinstance(hint, type) and not get_args(hint)
    return hint.__name__ if plain else re.sub(r"[\w.]+\.(\w+)", r"\1", str(hint))  # without the names of modules
