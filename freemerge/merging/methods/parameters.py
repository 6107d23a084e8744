"""Access to the parameters of a method and its parts by dotted path: `scale`, `filter.cutoff`, `scale.0` of a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, TypeVar

from freemerge.errors import MergeError


class _Dataclass(Protocol):
    """A dataclass instance, as `dataclasses.replace` accepts it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


_Part = TypeVar("_Part", bound=_Dataclass)


def get_field(part: object, path: str) -> Any:
    """The value of a parameter.

    Args:
        part: a method, or a part of one such as a filter.
        path: `scale`, `filter.cutoff` for a part's own, or `scale.0` for one value of a list.

    Raises:
        MergeError: there is no such parameter.
    """
    name, _, rest = path.partition(".")
    if isinstance(part, (list, tuple)):
        return part[_index(part, name)]
    _require_field(part, name)
    value = getattr(part, name)
    return get_field(value, rest) if rest else value


def replace_fields(part: _Part, values: Mapping[str, Any]) -> _Part:
    """A copy of a method with other values for some of its parameters.

    Args:
        part: a method, or a part of one such as a filter; it stays as it is.
        values: path → value, see `get_field`.

    Raises:
        MergeError: there is no such parameter.
        ValueError: the method refuses a value.
    """
    own: dict[str, Any] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        _require_field(part, name)
        old = own.get(name, getattr(part, name))
        if rest and isinstance(old, (list, tuple)):
            index = _index(old, rest)
            own[name] = [*old[:index], value, *old[index + 1 :]]
        else:
            own[name] = replace_fields(old, {rest: value}) if rest else value
    return dataclasses.replace(part, **own) if own else part


def _index(values: Sequence[Any], text: str) -> int:
    """The position in a list that a path names."""
    if not text.isdecimal() or int(text) >= len(values):
        raise MergeError(f"there is no value '{text}' in the list {list(values)}; the first is 0")
    return int(text)


def _require_field(part: object, name: str) -> None:
    kind = type(part).__name__
    if not dataclasses.is_dataclass(part):
        raise MergeError(f"{kind} has no parameters, so no '{name}'")
    known = [field.name for field in dataclasses.fields(part)]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known) or 'none'}"
        raise MergeError(f"{kind} has no parameter '{name}'; {hint}")
