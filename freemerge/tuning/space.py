"""The search space: ranges of a method's parameters, and the conversion between points and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

from freemerge.merging import MergeMethod, get_field, replace_fields


@dataclass(frozen=True)
class Range:
    """The search range of one parameter of a method.

    Args:
        low: the smallest value.
        high: the largest value.
        log: search uniformly in the logarithm, for ranges over several orders of magnitude.
        per_task: search one value per task instead of one for all, if the parameter can be a list.

    Raises:
        ValueError: if the range is empty, or `log` is set and `low` is not positive.
    """

    low: float
    high: float
    log: bool = False
    per_task: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"tune.space: low must be less than high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"tune.space: a range with log must start above 0, got {self.low}")


class Parameter(NamedTuple):
    """One number to search for."""

    name: str  # `ratio`, or `scale/digits` for a value per task
    path: str  # dotted path of the method's field
    bounds: Range
    integer: bool


class Space:
    """The search space of a method: the parameters to search for, and their ranges.

    Args:
        method: the method, whose values are the first point of the search, and stay fixed for all other parameters.
        tasks: the names of the K tasks, in the order of the models.
        ranges: parameter → range; a parameter is a field such as `scale`, or a dotted path such as `filter.cutoff`.

    Raises:
        ValueError: if there are no ranges, the method has no such parameter, a parameter is not a number, or values per
            task are requested for a parameter that cannot be a list.
    """

    def __init__(self, method: MergeMethod, tasks: Sequence[str], ranges: Mapping[str, Range]) -> None:
        self.method = method
        self.tasks = tuple(tasks)
        self.ranges = dict(ranges)
        self.parameters: list[Parameter] = []
        if not ranges:
            raise ValueError("tune.space: there is no parameter to search for")
        for path, bounds in ranges.items():
            hint = _annotation(method, path)
            kind = type(method).__name__
            if bounds.per_task and not _takes_list(hint):
                raise ValueError(f"tune.space: {path} of {kind} is not a list of numbers, so it cannot be per_task")
            if not bounds.per_task and not {int, float} & {hint, *get_args(hint)}:
                raise ValueError(f"tune.space: {path} of {kind} is not a number")
            names = [f"{path}/{task}" for task in self.tasks] if bounds.per_task else [path]
            self.parameters += [Parameter(name, path, bounds, hint is int) for name in names]
        self.apply(self.start())

    def start(self) -> dict[str, float]:
        """The first point of the search.

        Returns:
            Parameter → the method's own value, clipped to its range.
        """
        point = {}
        for path, bounds in self.ranges.items():
            own = [each for each in self.parameters if each.path == path]
            value = get_field(self.method, path)
            values = value if isinstance(value, (list, tuple)) else [value] * len(own)
            if not all(isinstance(number, (int, float)) for number in values):  # FR's coefficients can be a name
                values = [1.0] * len(own)
            if len(values) != len(own):  # a list of values, but one parameter for all tasks: start from their mean
                values = [sum(values) / len(values)] * len(own)
            for parameter, number in zip(own, values, strict=True):
                point[parameter.name] = min(max(number, bounds.low), bounds.high)
        return point

    def apply(self, point: Mapping[str, float]) -> MergeMethod:
        """Make the method of a point.

        Args:
            point: parameter → value.

        Returns:
            The method with these values.

        Raises:
            ValueError: if the method does not accept a value.
        """
        values: dict[str, Any] = {}
        for path, bounds in self.ranges.items():
            own = [point[each.name] for each in self.parameters if each.path == path]
            values[path] = own if bounds.per_task else own[0]
        return replace_fields(self.method, values)


def default_ranges(method: MergeMethod) -> dict[str, Range]:
    """The default search space: λ from 0 to twice the method's λ, or to 1 if that is larger.

    Args:
        method: the method.

    Returns:
        The range of `scale`; one value per task, if the method allows it.

    Raises:
        ValueError: if the method has no `scale`.
    """
    if not hasattr(method, "scale"):
        raise ValueError(f"tune: {type(method).__name__} has no scale to search for; set the parameters in tune.space")
    own = method.scale if isinstance(method.scale, (list, tuple)) else [method.scale]
    high = max(1.0, *(2.0 * number for number in own))
    return {"scale": Range(0.0, high, per_task=_takes_list(_annotation(method, "scale")))}


def _annotation(method: object, path: str) -> Any:
    """The type annotation of a parameter."""
    parent, _, name = path.rpartition(".")
    get_field(method, path)  # raises an error with a suggestion if the path is misspelt
    return get_type_hints(type(get_field(method, parent) if parent else method))[name]


def _takes_list(hint: Any) -> bool:
    return any(option == list[float] for option in get_args(hint))
