"""Experts in memory as their files have them: a byte or two per value and position, nothing lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from freemerge.experts.base import Expert, class_path, expert_class, kind_of
from freemerge.experts.codec import ENCODINGS, decode_values, encode_values


class PackedExpert:
    """An expert in few bytes: int8 or bfloat16 values where these are exact, float32 where they are not.

    Args:
        expert: the expert.
    """

    def __init__(self, expert: Expert) -> None:
        self.kind = type(expert)
        self.shapes = dict(expert.shapes)
        self.metadata = dict(expert.metadata)
        parts = {name: part.detach() for name, part in expert.parts().items()}
        self._set_sizes({name: part.numel() for name, part in parts.items()})
        for encoding in ENCODINGS:
            self.codes, self.scales = encode_values(list(parts.values()), encoding)
            decoded = decode_values(self.codes, self.scales, list(self.sizes.values()))
            if all(
                torch.equal(*pair) for pair in zip(decoded, (p.flatten().float() for p in parts.values()), strict=True)
            ):
                break
        if encoding != "float32":
            self.metadata["values"] = encoding  # so that a file of it loses nothing either
        self._plain, arrays = expert.structure()
        self.arrays = {name: array.to(self.codes.device) for name, array in arrays.items()}
        self._shared: Mapping[str, Tensor] | None = expert.shared if expert.SHARES else None

    def _set_sizes(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        ends = accumulate(self.sizes.values())
        self._ends = dict(zip(self.sizes, enumerate(ends), strict=True))  # name → which part it is, and where it ends

    # -- as tensors and plain data ------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it consists of, as they are, without what experts of several tasks share."""
        return {"codes": self.codes, "scales": self.scales, **self.arrays}

    @property
    def shared(self) -> Mapping[str, Tensor] | None:
        """The task vector that experts of several tasks share; None for others."""
        return self._shared

    def layout(self) -> dict[str, Any]:
        """Plain data that make it again from its tensors."""
        return {
            "kind": kind_of(self.kind),
            "class": class_path(self.kind),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "sizes": self.sizes,
            "plain": self._plain,
            "arrays": list(self.arrays),
            "metadata": self.metadata,
        }

    @classmethod
    def from_layout(
        cls, layout: Mapping[str, Any], tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None
    ) -> PackedExpert:
        """The inverse of `layout` and `tensors`.

        Raises:
            ValueError: if they do not fit each other, or no class of this kind has been imported.
        """
        packed = cls.__new__(cls)
        packed.kind = expert_class(layout["kind"], layout.get("class"))
        packed.shapes = {name: tuple(shape) for name, shape in layout["shapes"].items()}
        packed.metadata = dict(layout["metadata"])
        packed._set_sizes(layout["sizes"])
        packed.codes, packed.scales = tensors["codes"], tensors["scales"]
        packed.arrays = {name: tensors[name] for name in layout["arrays"]}
        packed._plain, packed._shared = layout["plain"], shared
        if len(packed.codes) != sum(packed.sizes.values()) or len(packed.scales) != len(packed.sizes):
            raise ValueError(f"{len(packed.codes)} values, {sum(packed.sizes.values())} expected")
        packed.unpacked()  # raises where positions do not fit
        return packed

    # -- what it is for -----------------------------------------------------------------------------------------------

    def to(self, device: torch.device) -> PackedExpert:
        """Move it, in place."""
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        self.arrays = {name: array.to(device) for name, array in self.arrays.items()}
        if self._shared is not None:
            self._shared = {name: tensor.to(device) for name, tensor in self._shared.items()}
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, without what experts of several tasks share."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scales, *self.arrays.values()))

    def part(self, name: str) -> Tensor:
        """The values of one part, (n,) float32, as the unpacked expert has them."""
        index, end = self._ends[name]
        return self.codes[end - self.sizes[name] : end].float() * self.scales[index]

    def unpacked(self) -> Expert:
        """The expert as it was given."""
        values = decode_values(self.codes, self.scales, list(self.sizes.values()))
        parts = dict(zip(self.sizes, values, strict=True))
        expert = self.kind.restored(self._plain, self.arrays, parts, self.metadata)
        return expert if self._shared is None else replace(expert, shared=self._shared)
