"""What an expert is: few values that turn the merged backbone into one task's own.

Every kind answers the same questions: which tensors it changes, what a changed tensor is (`added`, differentiable in
the values), what its values are as one vector (what training changes), and how it lies in a file.
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

    A class with a `KIND` of its own is found again by it, in files and in states, once its module is imported; whoever
    loads a file may allow it to be imported. `freemerge.testing.check_expert` tells whether a class does all this.
    """

    if TYPE_CHECKING:  # true of every subclass, and not of this class, which is no dataclass itself
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    KIND: ClassVar[str]
    """What a file calls this kind of expert."""

    MIXES: ClassVar[bool] = False
    """Whether weighted sums of such experts are one of the same kind, which `mixed` makes."""

    SHARES: ClassVar[bool] = False
    """Whether the experts of several tasks share tensors that are kept once; they have them in a field `shared`."""

    shapes: dict[str, tuple[int, ...]]
    """Tensor name → shape of each whole tensor that the expert changes."""

    shared: Mapping[str, Tensor]
    """What experts of several tasks share; of kinds that say `SHARES` alone."""

    metadata: dict[str, str]
    """Strings that travel with the file: task, hashes of the base and of the merged backbone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (kind := vars(cls).get("KIND")) is None:  # of the same kind as its base class
            return
        other = _KINDS.setdefault(kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{cls.__qualname__}: {other.__qualname__} is the kind {kind!r} already; choose another")
        _KINDS[kind] = cls  # the same class defined anew, as notebooks do

    # -- what each kind says ------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The values by name, each a float tensor of any shape; quantized with one scale each."""

    @abstractmethod
    def with_parts(self: Self, parts: Mapping[str, Tensor]) -> Self:
        """The same expert with other values: named and shaped as in `parts`."""

    @abstractmethod
    def added(self, name: str, weight: Tensor) -> Tensor:
        """weight + expert of one tensor.

        Args:
            name: one of `shapes`.
            weight: the merged tensor.

        Returns:
            A new tensor like `weight`: the sum is formed in float32 and rounded to its dtype once. Differentiable in
            the values.
        """

    @abstractmethod
    def structure(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs beside the values: plain data, and named uint8 vectors."""

    @classmethod
    @abstractmethod
    def restored(
        cls: type[Self],
        plain: Mapping[str, Any],
        arrays: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> Self:
        """The inverse of `structure` and `parts`. Raises a ValueError if they do not fit each other."""

    # -- what a kind may say ------------------------------------------------------------------------------------------

    @classmethod
    def extract(cls: type[Self], residual: Mapping[str, Tensor], **settings: Any) -> Self:
        """The expert of a residual, tensor name → θ_k − θ_merged, with settings of its kind."""
        raise NotImplementedError(
            f"{cls.__qualname__} does not say how it is extracted; give it a class method `extract`"
        )

    @classmethod
    def mixed(cls: type[Self], experts: Sequence[Self], weights: Sequence[float]) -> Self:
        """Σ w_k · expert_k of two experts or more, exact; for kinds that say `MIXES`. Others are added as they run."""
        raise NotImplementedError(f"{cls.__qualname__} says in MIXES that it mixes, but has no `mixed`")

    # -- what follows from it -----------------------------------------------------------------------------------------

    @property
    def num_values(self) -> int:
        """How many values the expert holds."""
        return sum(part.numel() for part in self.parts().values())

    def flat_values(self) -> Tensor:
        """All values as one vector (num_values,)."""
        return torch.cat([part.reshape(-1) for part in self.parts().values()])

    def with_values(self: Self, values: Tensor) -> Self:
        """The expert with other values: one vector (num_values,) in the order of `flat_values`."""
        own = self.parts()
        chunks = values.split([part.numel() for part in own.values()])
        return self.with_parts({name: chunk.view(own[name].shape) for name, chunk in zip(own, chunks, strict=True)})

    def scaled(self: Self, factor: float) -> Self:
        """The expert with `factor` times its effect on the weights."""
        return self.with_values(self.flat_values() * factor)

    def to(self: Self, device: torch.device | str) -> Self:
        """The expert on another device; itself if it is there already."""
        moved = {name: part.to(device) for name, part in self.parts().items()}
        if all(moved[name] is part for name, part in self.parts().items()):
            return self
        return self.with_parts(moved)

    def tagged(self: Self, **metadata: str) -> Self:
        """The expert with these metadata beside, or instead of, its own."""
        return replace(self, metadata={**self.metadata, **metadata})

    def dense(self) -> dict[str, Tensor]:
        """The expert as full tensors, (*shape) float32."""
        device = next(iter(self.parts().values())).device
        return {name: self.added(name, torch.zeros(shape, device=device)) for name, shape in self.shapes.items()}


_KINDS: dict[str, type[Expert]] = {}


def kind_of(expert: type[Expert]) -> str:
    """What files and states call a class of experts.

    Raises:
        ValueError: if they could not find this very class by it.
    """
    kind = getattr(expert, "KIND", None)
    if kind is None or _KINDS.get(kind) is not expert:
        raise ValueError(f"{expert.__qualname__} has no KIND of its own, by which its files would find it; give it one")
    return kind


def class_path(kind: type[Expert]) -> str | None:
    """What files and states name a class by from which others learn what to import; None for freemerge's own."""
    return None if kind.__module__.split(".")[0] == "freemerge" else f"{kind.__module__}:{kind.__qualname__}"


def is_registered(kind: str) -> bool:
    """Whether a class of experts of that kind has been imported."""
    return kind in _KINDS


def expert_class(kind: str, path: str | None = None, trust: bool = False) -> type[Expert]:
    """The class of experts of that kind.

    Args:
        kind: as `kind_of` says it.
        path: as `class_path` says it.
        trust: whether the module that the path names may be imported, which runs its code.

    Raises:
        ValueError: if no class of that kind has been imported, and none may or can be.
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
    """What says which tensors it changes: an expert, packed or not."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...


def check_fits(expert: HasShapes, weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first tensor of `expert` that `weights` lacks or has in another shape."""
    for name, shape in expert.shapes.items():
        if name not in weights:
            raise ValueError(f"expert of task {expert.metadata.get('task', '?')!r}: the model has no tensor {name!r}")
        if tuple(weights[name].shape) != tuple(shape):
            raise ValueError(
                f"expert of task {expert.metadata.get('task', '?')!r}: tensor {name!r} has shape "
                f"{tuple(weights[name].shape)} in the model, the expert was made for {tuple(shape)}"
            )
