"""Experts in memory as their files have them: a byte or two per value and position, nothing lost."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from freemerge.experts.codec import ENCODINGS, decode_values, encode_values
from freemerge.experts.expert import Expert
from freemerge.experts.masked import MaskedExpert


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
        self.sizes = {name: part.numel() for name, part in parts.items()}
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
        self._shared: Mapping[str, Tensor] | None = expert.shared if isinstance(expert, MaskedExpert) else None

    def to(self, device: torch.device) -> PackedExpert:
        """Move it, in place."""
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        self.arrays = {name: array.to(device) for name, array in self.arrays.items()}
        if self._shared is not None:
            self._shared = {name: tensor.to(device) for name, tensor in self._shared.items()}
        return self

    @property
    def layout(self) -> Hashable:
        """All but the values: experts that agree in it can take each other's place in memory."""
        arrays = tuple((name, array.shape) for name, array in self.arrays.items())
        return (
            self.kind,
            tuple(self.shapes.items()),
            tuple(self.sizes.items()),
            self.codes.dtype,
            arrays,
            id(self._shared),
        )

    def twin(self) -> PackedExpert:
        """The same expert in memory of its own; what masked experts share stays shared."""
        twin = copy.copy(self)
        twin.codes, twin.scales = self.codes.clone(), self.scales.clone()
        twin.arrays = {name: array.clone() for name, array in self.arrays.items()}
        return twin

    def copy_(self, other: PackedExpert) -> PackedExpert:
        """Take over the values of an expert of the same layout, in place."""
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)
        for name, array in self.arrays.items():
            array.copy_(other.arrays[name])
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, without what masked experts share."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scales, *self.arrays.values()))

    def unpacked(self) -> Expert:
        """The expert as it was given."""
        values = decode_values(self.codes, self.scales, list(self.sizes.values()))
        parts = dict(zip(self.sizes, values, strict=True))
        expert = self.kind.restored(self._plain, self.arrays, parts, self.metadata)
        return expert if self._shared is None else replace(expert, shared=self._shared)
