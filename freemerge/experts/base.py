"""`Expert`, the base class: a few values that turn the merged backbone into one task's model.

Every kind of expert defines which tensors it changes (`shapes`), how it changes one (`added`, differentiable in the
values), which values it has (`parts`, which training optimises), and how a file stores it (`structure`, `restored`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Expert")


class Expert(ABC):
    """What one task adds to the merged backbone; subclasses are frozen dataclasses.

    Defining a class with its own `KIND` registers it: files and state dicts find the class by this name once its module
    is imported, or import the module themselves if the caller of `load_expert` allows it. Test a class of your own with
    `freemerge.testing.check_expert`.
    """

    if TYPE_CHECKING:  # every subclass is a dataclass; this class is not
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    KIND: ClassVar[str]
    """The name of this kind of expert in files."""

    MIXES: ClassVar[bool] = False
    """Whether a weighted sum of experts of this kind is again of this kind; `mixed` computes it."""

    SHARES: ClassVar[bool] = False
    """Whether the experts of several tasks share tensors, which are stored once and held in the field `shared`."""

    shapes: dict[str, tuple[int, ...]]
    """Tensor name → shape of each whole tensor that the expert changes."""

    shared: Mapping[str, Tensor]
    """Tensor name → tensor that the experts of several tasks share; only for kinds with `SHARES`."""

    metadata: dict[str, str]
    """Strings stored with the expert: its task and the hashes of the base and of the merged backbone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (kind := vars(cls).get("KIND")) is None:  # it has the kind of its base class
            return
        other = _KINDS.setdefault(kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{cls.__qualname__}: {other.__qualname__} already has the kind {kind!r}; choose another")
        _KINDS[kind] = cls  # a notebook may define the same class again

    # -- what each kind defines ---------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The expert's values.

        Returns:
            Part name → floating-point tensor of any shape. Quantized files have one scale per part.
        """

    @abstractmethod
    def with_parts(self: Self, parts: Mapping[str, Tensor]) -> Self:
        """The same expert with other values.

        Args:
            parts: the values, with the names and shapes of `parts()`.
        """

    @abstractmethod
    def added(self, name: str, weight: Tensor) -> Tensor:
        """The sum of a weight and what the expert adds to it.

        Args:
            name: name of the tensor, one of `shapes`.
            weight: (*shape), the merged tensor.

        Returns:
            A new tensor with the shape and dtype of `weight`: the sum is formed in float32 and rounded once. It is
            differentiable in the values.
        """

    @abstractmethod
    def structure(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs in addition to the values.

        Returns:
            JSON-serialisable data, and name → uint8 vector.
        """

    @classmethod
    @abstractmethod
    def restored(
        cls: type[Self],
        plain: Mapping[str, Any],
        arrays: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> Self:
        """Rebuild an expert from a file: the inverse of `structure` and `parts`.

        Args:
            plain: the plain data of `structure`.
            arrays: the uint8 vectors of `structure`.
            parts: part name → values as a vector (n,) float32.
            metadata: the expert's `metadata`.

        Raises:
            ValueError: if the arguments do not match each other.
        """

    # -- what a kind may define ---------------------------------------------------------------------------------------

    @classmethod
    def extract(cls: type[Self], residual: Mapping[str, Tensor], **settings: Any) -> Self:
        """Extract the expert of a residual.

        Args:
            residual: tensor name → θ_k − θ_merged, (*shape) floating point.
            **settings: settings of this kind of expert.

        Raises:
            NotImplementedError: if this kind cannot be extracted.
        """
        raise NotImplementedError(
            f"{cls.__qualname__} does not define how it is extracted; give it a class method `extract`"
        )

    @classmethod
    def mixed(cls: type[Self], experts: Sequence[Self], weights: Sequence[float]) -> Self:
        """The exact sum Σ w_k · expert_k, for kinds with `MIXES`. Other kinds are summed while the model runs.

        Args:
            experts: two or more experts of this kind.
            weights: w_k.

        Raises:
            NotImplementedError: if this kind does not define the sum.
        """
        raise NotImplementedError(f"{cls.__qualname__} sets MIXES but has no class method `mixed`")

    # -- what all kinds have ------------------------------------------------------------------------------------------

    @property
    def num_values(self) -> int:
        """Number of values of the expert."""
        return sum(part.numel() for part in self.parts().values())

    def flat_values(self) -> Tensor:
        """All values as one vector (num_values,)."""
        return torch.cat([part.reshape(-1) for part in self.parts().values()])

    def with_values(self: Self, values: Tensor) -> Self:
        """The expert with other values.

        Args:
            values: (num_values,), in the order of `flat_values`.
        """
        own = self.parts()
        chunks = values.split([part.numel() for part in own.values()])
        return self.with_parts({name: chunk.view(own[name].shape) for name, chunk in zip(own, chunks, strict=True)})

    def scaled(self: Self, factor: float) -> Self:
        """Scale the expert.

        Args:
            factor: factor of its effect on the weights.
        """
        return self.with_values(self.flat_values() * factor)

    def to(self: Self, device: torch.device | str) -> Self:
        """Move the expert.

        Args:
            device: the device.

        Returns:
            The expert on the device; the same object if it is already there.
        """
        moved = {name: part.to(device) for name, part in self.parts().items()}
        if all(moved[name] is part for name, part in self.parts().items()):
            return self
        return self.with_parts(moved)

    def tagged(self: Self, **metadata: str) -> Self:
        """The expert with additional metadata, which replace its own where the keys are equal."""
        return replace(self, metadata={**self.metadata, **metadata})

    def dense(self) -> dict[str, Tensor]:
        """What the expert adds, as tensor name → full tensor (*shape) float32."""
        device = next(iter(self.parts().values())).device
        return {name: self.added(name, torch.zeros(shape, device=device)) for name, shape in self.shapes.items()}


_KINDS: dict[str, type[Expert]] = {}


def kind_of(expert: type[Expert]) -> str:
    """The name by which files and state dicts find a class of experts.

    Args:
        expert: the class.

    Raises:
        ValueError: if the class is not registered under a `KIND` of its own.
    """
    kind = getattr(expert, "KIND", None)
    if kind is None or _KINDS.get(kind) is not expert:
        raise ValueError(f"{expert.__qualname__} has no KIND of its own, by which files find the class; define one")
    return kind


def class_path(kind: type[Expert]) -> str | None:
    """`module:qualified.name` of a class, which tells readers of a file what to import; None for freemerge's own."""
    return None if kind.__module__.split(".")[0] == "freemerge" else f"{kind.__module__}:{kind.__qualname__}"


def is_registered(kind: str) -> bool:
    """Whether a class of experts with this `KIND` has been imported."""
    return kind in _KINDS


def expert_class(kind: str, path: str | None = None, trust: bool = False) -> type[Expert]:
    """The class of experts with a given `KIND`.

    Args:
        kind: the result of `kind_of`.
        path: the result of `class_path`.
        trust: whether the module in `path` may be imported, which runs its code.

    Raises:
        ValueError: if no such class has been imported and the module may not or cannot be imported.
    """
    if kind not in _KINDS and path is not None and trust:
        try:
            import_module(path.partition(":")[0])
        except ImportError as error:
            raise ValueError(f"the kind of expert {kind!r}, {path}, cannot be imported ({error})") from error
    if kind not in _KINDS:
        which = "the module that defines it" if path is None else path.partition(":")[0]
        raise ValueError(f"unknown kind of expert {kind!r}; import {which} first. Known: {', '.join(_KINDS)}")
    return _KINDS[kind]


class HasShapes(Protocol):
    """An expert, packed or not: anything with the shapes of the tensors that it changes, and metadata."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name → shape."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Strings stored with the expert."""


def check_fits(expert: HasShapes, weights: Mapping[str, Tensor]) -> None:
    """Check that a model has the tensors that an expert changes.

    Args:
        expert: the expert.
        weights: tensor name → tensor of the model.

    Raises:
        ValueError: if a tensor is missing or has another shape; the message names the first.
    """
    for name, shape in expert.shapes.items():
        if name not in weights:
            raise ValueError(f"expert of task {expert.metadata.get('task', '?')!r}: the model has no tensor {name!r}")
        if tuple(weights[name].shape) != tuple(shape):
            raise ValueError(
                f"expert of task {expert.metadata.get('task', '?')!r}: tensor {name!r} has shape "
                f"{tuple(weights[name].shape)} in the model, the expert was made for {tuple(shape)}"
            )
