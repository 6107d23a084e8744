"""A checkpoint: named tensors whose shapes are known at once and whose values are read when asked for.

- One class for every source: a format is a table of specs and a function that reads one tensor.
- Also a `Mapping[str, Tensor]`, so whatever takes a state dict takes a checkpoint and streams it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from freemerge.checkpoints.errors import CheckpointError


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(Mapping[str, Tensor]):
    """Named tensors, read one at a time.

    Args:
        label: how messages call this model, for example its file name.
        specs: shape and dtype of every tensor, in storage order.
        read: returns the tensor of a given name or, given a run (start, stop) as well, these values of it in row-major
            order; must be safe to call from several threads.
        tied: for each name that shares its storage with an earlier one, that earlier name. Tied names that a file
            leaves out (safetensors stores a shared tensor once) need not appear in `specs`.
        outside: names of the source that lie outside its prefix (heads, criteria) and are therefore not part of it.
        deltas: names of tensors that are differences to a base, not weights (an adapter's).
        partial: whether tensors of the base that are not named here are unchanged, and not missing.
        source: the tensors as stored, where these here are computed from them.
    """

    def __init__(
        self,
        label: str,
        specs: Mapping[str, TensorSpec],
        read: Callable[[str, tuple[int, int] | None], Tensor],
        *,
        tied: Mapping[str, str] | None = None,
        outside: Iterable[str] = (),
        deltas: Iterable[str] = (),
        partial: bool = False,
        source: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.label = label
        self.tied = dict(tied or {})
        self.outside = tuple(outside)
        self.deltas = frozenset(deltas)
        self.partial = partial
        self.source: Mapping[str, Tensor] = self if source is None else source
        self._specs = dict(specs)
        self._read = read

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in storage order."""
        return tuple(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._specs[self._stored(name)]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, detached, in its stored dtype.

        It is for reading only: with an in-memory source it shares memory with the caller's own tensor.

        Raises:
            CheckpointError: there is no such tensor, or its bytes cannot be read.
        """
        return self._read(self._stored(name), None)

    def run(self, name: str, start: int, stop: int) -> Tensor:
        """Read the values `start` to `stop` of a tensor in row-major order, as (stop − start,), without the others.

        Raises:
            CheckpointError: see `tensor`.
        """
        return self._read(self._stored(name), (start, stop))

    def _stored(self, name: str) -> str:
        stored = name if name in self._specs else self.tied.get(name, name)
        if stored not in self._specs:
            raise CheckpointError(f"{self.label}: there is no tensor '{name}' among its {len(self._specs)}")
        return stored

    def with_label(self, label: str) -> Checkpoint:
        """The same tensors under another label."""
        return Checkpoint(
            label,
            self._specs,
            self._read,
            tied=self.tied,
            outside=self.outside,
            deltas=self.deltas,
            partial=self.partial,
            source=None if self.source is self else self.source,
        )

    def with_prefix(self, prefix: str) -> Checkpoint:
        """The tensors whose names start with `prefix`, without it; all others are listed in `outside`.

        Raises:
            CheckpointError: no tensor's name starts with `prefix`.
        """
        if not prefix:
            return self
        specs = {name[len(prefix) :]: spec for name, spec in self._specs.items() if name.startswith(prefix)}
        if not specs:
            first = next(iter(self._specs), None)
            raise CheckpointError(
                f"{self.label}: no tensor's name starts with the prefix '{prefix}'; its first name is '{first}'"
            )
        tied = {
            name[len(prefix) :]: first[len(prefix) :]
            for name, first in self.tied.items()
            if name.startswith(prefix) and first.startswith(prefix)
        }
        outside = [name for name in self._specs if not name.startswith(prefix)]
        return Checkpoint(
            self.label,
            specs,
            lambda name, run: self._read(prefix + name, run),
            tied=tied,
            outside=(*self.outside, *outside),
            deltas=[name[len(prefix) :] for name in self.deltas if name.startswith(prefix)],
            partial=self.partial,
            source=None if self.source is self else self.source,
        )

    def relative_to(self, reference: Iterable[str]) -> Checkpoint:
        """Strip the prefix under which this checkpoint holds the tensors of a reference model.

        A Lightning checkpoint calls `backbone.model.layer.weight` what its base calls `layer.weight`. The prefix that
        brings the most names into agreement is taken; the shortest of several equals; none if none agrees better.

        Args:
            reference: the tensor names of the base.
        """
        wanted = set(reference)
        candidates = {""}
        for name in self._specs:
            # Every cut of the name at a dot is a candidate, so the search is linear in the names.
            position = name.find(".")
            while position >= 0:
                if name[position + 1 :] in wanted:
                    candidates.add(name[: position + 1])
                position = name.find(".", position + 1)
        counts = {
            prefix: sum(name.startswith(prefix) and name[len(prefix) :] in wanted for name in self._specs)
            for prefix in sorted(candidates, key=lambda prefix: (len(prefix), prefix))
        }
        return self.with_prefix(max(counts, key=lambda prefix: counts[prefix]))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._specs:
            raise KeyError(name)
        return self._read(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {len(self)} tensors)"
