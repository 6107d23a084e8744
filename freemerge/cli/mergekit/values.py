"""Values of mergekit's parameters: numbers, gradients over the layers, and filters by tensor names.

A parameter is found at the first level that sets it: the model in its slice, the slice, the whole file. Within a level,
the first filter that is part of the tensor's name applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

Value = float | bool | list[float]
"""A number or a switch for all tensors, or the numbers of a gradient from the first layer to the last."""

_MOST_FILTERS = 6  # in lists that differ, where each set of filters is a case of its own


class Condition(NamedTuple):
    """A value for the tensors whose names contain `filter`; for all if that is None."""

    filter: str | None
    value: Value


class Misfit(ValueError):
    """Something of a configuration that freemerge does not have; the message begins with its key."""


def conditions(levels: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> list[Condition]:
    """The values of a parameter, in the order in which they are tried; empty if no level sets it.

    Args:
        levels: key in the file → the parameters there, the first to be tried first.
        name: the parameter's name.

    Raises:
        Misfit: a value that is neither a number, a switch, nor a list of numbers.
    """
    found: list[Condition] = []
    for key, table in levels:
        for each in _parse(f"{key}.{name}", table[name]) if name in table else ():
            found.append(each)
            if each.filter is None:
                return found
    return found


def _parse(key: str, setting: Any) -> Iterator[Condition]:
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list) and any(isinstance(each, Mapping) for each in setting):
        for each in setting:
            if not isinstance(each, Mapping) or not {"value"} <= each.keys() <= {"value", "filter"}:
                raise Misfit(f"{key}: expected `filter` and `value` in each entry, got {each!r}")
            text = each.get("filter")
            if not (text is None or isinstance(text, str)):
                raise Misfit(f"{key}: a filter is a part of a tensor's name, got {text!r}")
            yield Condition(None if text in (None, "*", "") else text, _value(key, each["value"]))
    else:
        yield Condition(None, _value(key, setting))


def _value(key: str, value: Any) -> Value:
    if isinstance(value, bool):
        return value
    numbers = [_number(each) for each in (value if isinstance(value, list) else [value])]
    found = [number for number in numbers if number is not None]
    if not found or len(found) < len(numbers):
        raise Misfit(f"{key}: expected a number, true, false, or a list of numbers, got {value!r}")
    return found if len(found) > 1 else found[0]


def _number(value: Any) -> float | None:
    """A finite number, also one that YAML reads as text: 1e-3."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def find(tried: Sequence[Condition], contained: frozenset[str]) -> Value | None:
    """The value for tensors whose names contain these filters and no others; None if there is none."""
    return next((each.value for each in tried if each.filter is None or each.filter in contained), None)


def patterns(lists: Sequence[Sequence[Condition]]) -> list[tuple[str, frozenset[str]]]:
    """The cases that filters distinguish: a pattern for each, with the filters that its tensors contain.

    The first pattern that matches applies; tensors that match none contain no filter.

    Args:
        lists: the values of each parameter.

    Raises:
        Misfit: too many filters in different orders.
    """
    orders = {order: None for each in lists if (order := tuple(one.filter for one in each if one.filter is not None))}
    if len(orders) <= 1:
        return [(_pattern([name]), frozenset([name])) for only in orders for name in dict.fromkeys(only)]
    names = tuple(dict.fromkeys(name for each in orders for name in each))
    if len(names) > _MOST_FILTERS:
        raise Misfit(f"parameters: more than {_MOST_FILTERS} filters in lists that differ: {', '.join(names)}")
    sets = [group for size in range(len(names), 0, -1) for group in combinations(names, size)]
    return [(_pattern(group), frozenset(group)) for group in sets]


def _pattern(names: Sequence[str]) -> str:
    """A pattern of the tensors whose names contain all of these texts."""
    if len(names) == 1 and not set(names[0]) & set("*?["):
        return f"*{names[0]}*"
    return "re:" + "".join(f"(?=.*{_escaped(name)})" for name in names) + ".*"


def _escaped(text: str) -> str:
    return "".join(f"\\{each}" if each in r".^$*+?{}[]\|()" else each for each in text)


def combined(key: str, function: Callable[..., float], *values: Value | None) -> Any:
    """A function of values, some of which may be gradients.

    Args:
        key: the key in the file, for messages.
        function: of as many numbers.
        values: numbers and gradients.

    Raises:
        Misfit: the result is not linear between the gradients' values.
    """
    lengths = [len(value) - 1 for value in values if isinstance(value, list)]
    if not lengths:
        return function(*values)
    count = math.lcm(*lengths)
    # Twice as many, to see that the result is linear in between
    points = [function(*(_at(value, index / (2 * count)) for value in values)) for index in range(2 * count + 1)]
    for before, middle, after in zip(points[:-1:2], points[1::2], points[2::2], strict=True):
        if not math.isclose(middle, (before + after) / 2, rel_tol=1e-9, abs_tol=1e-12):
            raise Misfit(f"{key}: the gradients combine to values that are not linear over the layers")
    found = points[::2]
    return found[0] if all(each == found[0] for each in found) else found


def _at(value: Any, depth: float) -> Any:
    if not isinstance(value, list):
        return value
    place = depth * (len(value) - 1)
    index = min(int(place), len(value) - 2)
    return (1 - (place - index)) * value[index] + (place - index) * value[index + 1]
