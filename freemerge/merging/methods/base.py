"""The interface of merging methods: `collect_statistics` and `combine`.

- `collect_statistics` makes statistics passes over all task vectors and returns statistics of the whole model.
- `combine` merges one tensor.
- Statistics are passed from one to the other and never stored in the method: methods are plain, immutable values.
- `statistics_key` identifies what the statistics depend on: methods with equal keys share statistics, so that a search
  over `scale` collects them only once.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.task_vectors import Vectors
from freemerge.runtime.pages import fresh

# Parameters that may have one value per model
_PER_MODEL = ("scale", "coefficients", "density", "drop", "epsilon", "bottom", "top")
# A method that still has one of the old names would merge without its statistics, or with too little memory.
_RENAMED = {
    "survey": "collect_statistics",
    "survey_fields": "statistics_fields",
    "combine_run": "combine_chunk",
    "duplicates": "extra_copies",
}


class MergeMethod(ABC):
    """A way to merge task vectors; subclasses are frozen dataclasses whose fields are the method's parameters.

    A new method is one file: fields, their check in `__post_init__`, `combine`, and `collect_statistics` if it needs
    statistics of the whole model.
    """

    if TYPE_CHECKING:  # true for every subclass, but not for this class, which is not a dataclass itself
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    statistics_fields: ClassVar[tuple[str, ...] | None] = None
    """The fields that the statistics depend on; None for all. A method that names them makes searches faster."""

    linear_in_scale: ClassVar[bool] = False
    """Whether the result is proportional to `scale`, or to all scales of a list together. A search then merges once for
    all scales, otherwise once for each. The value applies only to the class that sets it, not to its subclasses."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for old, new in _RENAMED.items():
            if old in vars(cls):
                raise TypeError(f"{cls.__name__}.{old}: this is called {new} now; rename it")

    @property
    def statistics_key(self) -> Hashable:
        """Identifies what the statistics depend on besides the vectors: equal keys, equal statistics."""
        names = self.statistics_fields
        if names is None and not dataclasses.is_dataclass(self):
            return object()  # unknown, so the key is unique
        names = tuple(field.name for field in dataclasses.fields(self)) if names is None else names
        return (type(self), *((name, _key(getattr(self, name))) for name in names))

    @property
    def elementwise(self) -> bool:
        """Whether `combine` processes each entry independently, given the statistics.

        The engine then passes chunks of bounded size, (K, n) → (n,), instead of whole tensors.
        """
        return False

    @property
    def finishes(self) -> bool:
        """Whether an elementwise method's chunks, joined to a whole tensor, still have to be passed to `finish`."""
        return False

    def extra_copies(self, models: int) -> int:
        """The number of float32 copies of a tensor that the method needs besides the K task vectors and the usual five.

        Args:
            models: K.
        """
        return 0

    @property
    def passes(self) -> int:
        """The number of passes over the models, with the merge itself. More if the sampled bounds miss a quantile."""
        return 1

    def check(self, labels: Sequence[str]) -> None:
        """Raise a `MergeError` if the method cannot merge these models; called before any work.

        Args:
            labels: the names of the K models.
        """
        if not labels:
            raise MergeError("there is no fine-tuned model to merge; name at least one")
        for field in _PER_MODEL:
            values = getattr(self, field, None)
            if isinstance(values, (list, tuple)) and len(values) != len(labels):
                raise MergeError(
                    f"{type(self).__name__} has {len(values)} values in `{field}` for {len(labels)} fine-tuned models; "
                    "give one per model, or a single number"
                )

    def collect_statistics(self, vectors: Vectors) -> Any:
        """Collect the statistics of all tensors that `combine` needs; by default none, without a pass.

        Args:
            vectors: iterating yields (name, deltas) with deltas (K, *shape) float32; `vectors.scan` passes chunks (K,
                n) in any order, and divides the work between threads and processes. Each may be repeated, and costs a
                pass over the models.

        Returns:
            Statistics for `combine`, or None.
        """
        return None

    @abstractmethod
    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        """Merge one tensor.

        Args:
            name: the tensor's name.
            deltas: the K models' task vectors, (K, *shape) float32; may be overwritten.
            statistics: what `collect_statistics` returned.

        Returns:
            The merged task vector, (*shape) float32.
        """

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: Any) -> Tensor:
        """Merge a chunk of one tensor's values; only for `elementwise` methods.

        The default is `combine`; a method overrides it if an entry's result depends on the entry's position.

        Args:
            name: the tensor's name.
            start: position of the chunk's first value in the tensor, in row-major order.
            deltas: (K, n) float32; may be overwritten.
            statistics: what `collect_statistics` returned.

        Returns:
            (n,) float32.
        """
        return self.combine(name, deltas, statistics)

    def finish(self, name: str, merged: Tensor) -> Tensor:
        """Finish a whole tensor that was merged in chunks; only for methods with `finishes`.

        Args:
            name: the tensor's name.
            merged: the joined results of `combine_chunk`, (*shape) float32; may be overwritten.

        Returns:
            The merged task vector, (*shape) float32.
        """
        return merged


def _key(value: object) -> Hashable:
    if isinstance(value, MergeMethod):
        return value.statistics_key
    if isinstance(value, Mapping):
        return tuple((key, _key(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_key(inner) for inner in value)
    try:
        hash(value)
    except TypeError:
        return object()
    return value


def weighted_sum(deltas: Tensor, weights: float | Sequence[float] | Tensor) -> Tensor:
    """Σ_k λ_k · v_k, summed in the order of the models.

    Args:
        deltas: (K, *shape) float32.
        weights: one λ for all, or K of them.

    Returns:
        (*shape) float32, in new memory.
    """
    if isinstance(weights, (int, float)):
        weights = [float(weights)] * len(deltas)
    values = weights.tolist() if isinstance(weights, Tensor) else [float(weight) for weight in weights]
    total = torch.mul(deltas[0], values[0], out=fresh(deltas.shape[1:], deltas.dtype, deltas.device))
    for delta, value in zip(deltas[1:], values[1:], strict=True):
        total.add_(delta, alpha=value)
    return total


def require(condition: bool, method: object, message: str) -> None:
    """Raise a ValueError that begins with the method's class unless the condition holds."""
    if not condition:
        raise ValueError(f"{type(method).__name__}: {message}")


def require_number(method: object, name: str, value: object) -> None:
    """Require a finite number, or a list of them."""
    values = value if isinstance(value, (list, tuple)) else [value]
    numbers = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in values)
    finite = numbers and bool(torch.isfinite(torch.tensor(values, dtype=torch.float64)).all())
    require(finite and len(values) > 0, method, f"`{name}` must be a finite number, got {value!r}")


def each_of(value: float | Sequence[float], models: int) -> list[float]:
    """A parameter's value for each model: the given ones, or the single one K times."""
    return [float(number) for number in value] if isinstance(value, (list, tuple)) else [float(value)] * models  # type: ignore[arg-type]


def pairs_of(
    first: float | Sequence[float], second: float | Sequence[float], models: int | None = None
) -> list[tuple[float, float]]:
    """Two parameters' values for each model; without the number of models, for as many as have values of their own."""
    models = models or max(len(each_of(first, 1)), len(each_of(second, 1)))
    return list(zip(each_of(first, models), each_of(second, models), strict=False))


def require_scope(method: object, scope: object) -> None:
    """Require a valid scope for fractions of the entries."""
    require(scope in ("model", "tensor"), method, f'`scope` must be "model" or "tensor", got {scope!r}')
