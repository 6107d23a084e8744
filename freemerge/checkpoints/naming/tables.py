"""Conversion of a model's tensors from one naming to another: renamed, split and assembled tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.naming.blocks import Block, assemble
from freemerge.errors import CheckpointError


@dataclass(frozen=True)
class Table:
    """How tensors under one naming, the sources, make up those under another, the targets.

    Args:
        renamed: source → target, for tensors that differ only in their names.
        assembled: target → the location of its values in the sources, for tensors that are split, assembled or
            transposed.
        sources: source → its shape, for the sources in `assembled`.
        targets: target → its shape, for the targets in `assembled`.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    assembled: Mapping[str, tuple[Block, ...]] = field(default_factory=dict)
    sources: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def inverse(self) -> Table:
        """The inverse table."""
        assembled: dict[str, list[Block]] = {source: [] for source in self.sources}
        for target, blocks in self.assembled.items():
            for block in blocks:
                assembled[block.source].append(block.inverted(target))
        back = {target: source for source, target in self.renamed.items()}
        return Table(back, {name: tuple(blocks) for name, blocks in assembled.items()}, self.targets, self.sources)

    @property
    def changes(self) -> bool:
        """Whether any tensor changes."""
        return bool(self.assembled) or any(source != target for source, target in self.renamed.items())

    def parts(self, target: str) -> tuple[str, ...]:
        """The sources of an assembled target."""
        return tuple(dict.fromkeys(block.source for block in self.assembled[target]))

    def translate(self, checkpoint: Checkpoint) -> Checkpoint:
        """Convert a checkpoint of sources to one of targets, lazily.

        Tensors that the table does not list keep their names, and so do the sources of an incomplete target (in an
        adapter, missing sources are unchanged).

        Args:
            checkpoint: a checkpoint with the names of sources.

        Raises:
            CheckpointError: a target would mix differences to the base with weights.
        """
        made = self._assemble(checkpoint)
        used = {source for target in made for source in self.parts(target)}
        taken = {self.renamed[name] for name in (*checkpoint.names, *checkpoint.tied) if name in self.renamed}
        names = {}
        for name in dict.fromkeys((*checkpoint.names, *checkpoint.tied)):
            new = self.renamed.get(name, name)
            if name not in used and (name in self.renamed or (new not in taken and new not in made)):
                names[name] = new
        found = checkpoint.renamed(names)
        if made:
            specs = {target: made[target][0] for target in made}
            deltas = [target for target in made if made[target][1]]
            joined = Checkpoint(
                checkpoint.label, specs, lambda name, run: self._read(checkpoint, name, run), deltas=deltas
            )
            found = found.joined(joined)
        return found.derived(checkpoint, lambda base: self.translate(checkpoint.on(self.inverse.translate(base))))

    def _assemble(self, checkpoint: Checkpoint) -> dict[str, tuple[TensorSpec, bool]]:
        """The targets that can be assembled: the spec of each, and whether it is a difference."""
        made = {}
        for target in self.assembled:
            parts = self.parts(target)
            present = [name for name in parts if checkpoint.has(name)]
            if not present:
                continue
            # The shapes of an adapter's differences are unknown until it is bound to its base.
            if checkpoint.bound and any(checkpoint.spec(name).shape != self.sources[name] for name in present):
                continue
            differences = [name for name in present if name in checkpoint.deltas]
            if not (differences or (len(present) == len(parts) and self._is_full(target))):
                continue  # some weights are missing; missing differences would be zero
            if differences and len(differences) < len(present):
                whole = next(name for name in present if name not in checkpoint.deltas)
                raise CheckpointError(
                    f"{checkpoint.label}: '{target}' is made of '{differences[0]}', a difference to the base, and of "
                    f"'{whole}', which is whole; merge the adapter into its base model with PEFT first"
                )
            dtype = checkpoint.spec(present[0]).dtype
            for name in present[1:]:
                dtype = torch.promote_types(dtype, checkpoint.spec(name).dtype)
            made[target] = TensorSpec(self.targets[target], dtype), bool(differences)
        return made

    def _is_full(self, target: str) -> bool:
        return sum(prod(block.sizes) for block in self.assembled[target]) == prod(self.targets[target])

    def _read(self, checkpoint: Checkpoint, target: str, run: tuple[int, int] | None) -> Tensor:
        shape = torch.Size(self.targets[target])
        start, stop = run or (0, shape.numel())
        blocks = [block for block in self.assembled[target] if checkpoint.has(block.source)]
        if start == stop:
            return checkpoint.read_range(blocks[0].source, 0, 0)
        values = assemble(blocks, start, stop, lambda block: block.read(checkpoint.read_range))
        return values.view(shape) if run is None else values
