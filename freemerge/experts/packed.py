"""Experts in memory as their files have them: a byte or two per value and position, nothing lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

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
        ends = accumulate(self.sizes.values())
        self._ends = dict(zip(self.sizes, enumerate(ends), strict=True))  # name → which part it is, and where it ends
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
    def num_bytes(self) -> int:
        """Bytes in memory, without what masked experts share."""
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
