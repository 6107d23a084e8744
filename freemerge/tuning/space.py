"""Where to search: ranges of a method's parameters, and the way from a point of the space to a method and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

from freemerge.merging import MergeMethod, get_field, replace_fields


@dataclass(frozen=True)
class Range:
    """Where to search for one parameter of a method.

    Args:
        low: the smallest value.
        high: the largest value.
        log: search evenly over the logarithm; for what may be 0.001 or 1.
        per_task: one value for each task instead of one for all, where the method takes a list.
    """

    low: float
    high: float
    log: bool = False
    per_task: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"tune.space: low must be less than high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"tune.space: a range with log must begin above 0, got {self.low}")


class Parameter(NamedTuple):
    """One searched number."""

    name: str  # `ratio`, or `scale/digits` where each task has its own
    path: str  # of the method's field
    bounds: Range
    integer: bool


class Space:
    """The numbers of a method that are searched for.

    Args:
        method: the method, with values where the search begins and for all parameters that it leaves alone.
        tasks: the names of the K tasks, in the order of the models.
        ranges: parameter → where to search; `scale`, or by dotted path `filter.cutoff`.

    Raises:
        ValueError: no ranges, a parameter that the method does not have or that is no number, or a value per task where
            the method takes one.
    """

    def __init__(self, method: MergeMethod, tasks: Sequence[str], ranges: Mapping[str, Range]) -> None:
        self.method = method
        self.tasks = tuple(tasks)
        self.ranges = dict(ranges)
        self.parameters: list[Parameter] = []
        if not ranges:
            raise ValueError("tune.space: names no parameter to search for")
        for path, bounds in ranges.items():
            hint = _hint(method, path)
            kind = type(method).__name__
            if bounds.per_task and not _takes_list(hint):
                raise ValueError(f"tune.space: {path} of {kind} is not a list of numbers, so it cannot be per_task")
            if not bounds.per_task and not {int, float} & {hint, *get_args(hint)}:
                raise ValueError(f"tune.space: {path} of {kind} is not a number")
            names = [f"{path}/{task}" for task in self.tasks] if bounds.per_task else [path]
            self.parameters += [Parameter(name, path, bounds, hint is int) for name in names]
        self.apply(self.start())

    def start(self) -> dict[str, float]:
        """The method's own values by parameter, those outside of their range moved to its edge."""
        point = {}
        for path, bounds in self.ranges.items():
            own = [each for each in self.parameters if each.path == path]
            value = get_field(self.method, path)
            values = value if isinstance(value, (list, tuple)) else [value] * len(own)
            if not all(isinstance(number, (int, float)) for number in values):  # FR's coefficients may be a word
                values = [1.0] * len(own)
            if len(values) != len(own):  # one number for all takes the place of one per task
                values = [sum(values) / len(values)] * len(own)
            for parameter, number in zip(own, values, strict=True):
                point[parameter.name] = min(max(number, bounds.low), bounds.high)
        return point

    def apply(self, point: Mapping[str, float]) -> MergeMethod:
        """The method at a point of the space.

        Args:
            point: parameter → value.

        Raises:
            ValueError: the method refuses a value.
        """
        values: dict[str, Any] = {}
        for path, bounds in self.ranges.items():
            own = [point[each.name] for each in self.parameters if each.path == path]
            values[path] = own if bounds.per_task else own[0]
        return replace_fields(self.method, values)


def default_ranges(method: MergeMethod) -> dict[str, Range]:
    """λ between 0 and twice the method's own, at least 1: of each task where the method allows it.

    Raises:
        ValueError: the method has no `scale`.
    """
    if not hasattr(method, "scale"):
        raise ValueError(f"tune: {type(method).__name__} has no scale to search for; say what to search in tune.space")
    own = method.scale if isinstance(method.scale, (list, tuple)) else [method.scale]
    high = max(1.0, *(2.0 * number for number in own))
    return {"scale": Range(0.0, high, per_task=_takes_list(_hint(method, "scale")))}


def _hint(method: object, path: str) -> Any:
    """What a parameter is annotated with."""
    parent, _, name = path.rpartition(".")
    get_field(method, path)  # a misspelt path is an error that names what would have been right
    return get_type_hints(type(get_field(method, parent) if parent else method))[name]


def _takes_list(hint: Any) -> bool:
    return any(option == list[float] for option in get_args(hint))
