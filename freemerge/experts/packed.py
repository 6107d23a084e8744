"""Experts in memory in the compact form of their files: one or two bytes per value and position, without loss."""

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
    """An expert in few bytes: its values in the smallest encoding that represents them exactly.

    Args:
        expert: the expert.

    Attributes:
        kind: the expert's class.
        shapes: tensor name → shape of each tensor that the expert changes.
        metadata: strings stored with the expert.
        codes: (n,), the encoded values of all parts, concatenated.
        scales: (P,) float32, one per part.
        arrays: name → uint8 vector that the expert has in addition to its values.
        sizes: part name → number of values.
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
            self.metadata["values"] = encoding  # so that its file is exact too
        self._plain, arrays = expert.structure()
        self.arrays = {name: array.to(self.codes.device) for name, array in arrays.items()}
        self._shared: Mapping[str, Tensor] | None = expert.shared if expert.SHARES else None

    def _set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Set the number of values of each part."""
        self.sizes = dict(sizes)
        ends = accumulate(self.sizes.values())
        self._ends = dict(zip(self.sizes, enumerate(ends), strict=True))  # name → index, end in the codes

    # -- as tensors and plain data ------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The expert's tensors by name, not copied, without those that several tasks share."""
        return {"codes": self.codes, "scales": self.scales, **self.arrays}

    @property
    def shared(self) -> Mapping[str, Tensor] | None:
        """Tensor name → tensor that the experts of several tasks share; None for kinds without `SHARES`."""
        return self._shared

    def layout(self) -> dict[str, Any]:
        """JSON-serialisable data from which, with the tensors, `from_layout` rebuilds the expert."""
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
        """Rebuild an expert: the inverse of `layout` and `tensors`.

        Args:
            layout: the result of `layout`.
            tensors: the result of `tensors`.
            shared: the tensors that several tasks share.

        Raises:
            ValueError: if the arguments do not match each other, or no class of this kind has been imported.
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
        packed.unpacked()  # raises if positions do not match
        return packed

    # -- use ----------------------------------------------------------------------------------------------------------

    def to(self, device: torch.device) -> PackedExpert:
        """Move the expert's tensors to a device, in place; returns the expert."""
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        self.arrays = {name: array.to(device) for name, array in self.arrays.items()}
        if self._shared is not None:
            self._shared = {name: tensor.to(device) for name, tensor in self._shared.items()}
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, without the tensors that several tasks share."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scales, *self.arrays.values()))

    def part(self, name: str) -> Tensor:
        """The values of one part.

        Args:
            name: name of the part.

        Returns:
            (n,) float32, the values of the unpacked expert.
        """
        index, end = self._ends[name]
        return self.codes[end - self.sizes[name] : end].float() * self.scales[index]

    def unpacked(self) -> Expert:
        """The original expert, with float32 values."""
        values = decode_values(self.codes, self.scales, list(self.sizes.values()))
        parts = dict(zip(self.sizes, values, strict=True))
        expert = self.kind.restored(self._plain, self.arrays, parts, self.metadata)
        return expert if self._shared is None else replace(expert, shared=self._shared)
