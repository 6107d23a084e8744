"""A checkpoint: named tensors whose shapes are known when it is opened and whose values are read on demand.

- One class for every source: a format is a table of specs and a function that reads one tensor.
- Also a `Mapping[str, Tensor]`, so whatever takes a state dict takes a checkpoint and streams it.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freemerge.errors import CheckpointError


class TensorSpec(NamedTuple):
    """A tensor's shape and dtype, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(Mapping[str, Tensor]):
    """Named tensors, read one at a time.

    Args:
        label: the model's name in messages, for example its file name.
        specs: shape and dtype of every tensor, in storage order.
        read: returns the tensor of a given name or, if a chunk (start, stop) is given, only these values in row-major
            order; must be safe to call from several threads.
        tied: for each name that shares its storage with an earlier one, that earlier name. Tied names that a file omits
            (safetensors stores a shared tensor once) need not appear in `specs`.
        outside: names of the source that lie outside its prefix (heads, criteria) and are therefore not part of it.
        deltas: names of tensors that are differences to a base, not weights (an adapter's).
        partial: whether tensors of the base that are not named here are unchanged rather than missing.
        source: the stored tensors, if these are computed from them.
        bind: for a model that depends on its base (an adapter whose differences are computed from the base's values):
            returns the model's tensors, given the base. See `on`.
        folder: the folder of the files that describe this model (configuration, tokenizer), if there is one.
        metadata: the file's own metadata, for formats that have it.
        buffers: names of tensors that are buffers of a module, not its parameters.
        alone: names of an adapter's tensors that change only one module and no other that shares its weight.
        layers: for a stack of other models' layers, the number that each layer had; see `stacking`.
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
        bind: Callable[[Checkpoint], Checkpoint] | None = None,
        folder: Path | None = None,
        metadata: Mapping[str, str] | None = None,
        buffers: Iterable[str] = (),
        alone: Iterable[str] = (),
        layers: Iterable[int] | None = None,
    ) -> None:
        self.label = label
        self.tied = dict(tied or {})
        self.outside = tuple(outside)
        self.deltas = frozenset(deltas)
        self.partial = partial
        self.source: Mapping[str, Tensor] = self if source is None else source
        self.folder = folder
        self.metadata = dict(metadata or {})
        self.buffers = frozenset(buffers)
        self.alone = frozenset(alone)
        self.layers = None if layers is None else tuple(layers)
        self._specs = dict(specs)
        self._read = read
        self._bind = bind

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in storage order."""
        return tuple(self._specs)

    @property
    def bound(self) -> bool:
        """Whether all tensors are known; some adapters must be bound to their base with `on` first."""
        return self._bind is None

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name, listed or tied and omitted from the file."""
        return name in self._specs or name in self.tied

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._specs[self._stored(name)]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, detached, in its stored dtype.

        Treat it as read-only: with an in-memory source it shares memory with the caller's tensor.

        Raises:
            CheckpointError: there is no such tensor, or its bytes cannot be read.
        """
        return self._read(self._stored(name), None)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Read only the values `start` to `stop` of a tensor in row-major order, as (stop − start,).

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
        return self._changed(label=label)

    def with_folder(self, folder: Path) -> Checkpoint:
        """The same tensors, with their descriptive files in another folder."""
        return self._changed(folder=folder)

    def without_metadata(self) -> Checkpoint:
        """The same tensors without the file's metadata."""
        return self._changed(metadata={})

    def with_tied_names(self) -> Checkpoint:
        """The same tensors under all their names, including tied names that the file omits."""
        names = dict.fromkeys((*self._specs, *self.tied))
        return self._changed(
            _specs={name: self.spec(name) for name in names},
            _read=lambda name, run: self._read(self._stored(name), run),
        )

    def tying(self, tied: Mapping[str, str]) -> Checkpoint:
        """The same tensors, with more of them tied.

        Args:
            tied: name → the name of the tensor that it is tied to; see `tied` above.
        """
        return self._changed(tied={**self.tied, **tied}, source=self.source)

    def after(self, check: Callable[[str], None]) -> Checkpoint:
        """The same tensors; `check` is called with a tensor's name before its values are read, from any thread."""

        def read(name: str, run: tuple[int, int] | None) -> Tensor:
            check(name)
            return self._read(name, run)

        return self._changed(_read=read)

    def apart(self, names: Iterable[str]) -> Checkpoint:
        """The same tensors with some names untied: each of these is listed as a separate tensor."""
        first = {name: self._stored(name) for name in names if name in self.tied}

        def read(name: str, run: tuple[int, int] | None) -> Tensor:
            return self._read(first.get(name, name), run)

        return self._changed(
            _specs={**self._specs, **{name: self._specs[stored] for name, stored in first.items()}},
            _read=read,
            tied={name: other for name, other in self.tied.items() if name not in first},
            deltas=self.deltas | {name for name, stored in first.items() if stored in self.deltas},
            source=self.source,
        )

    def as_deltas(self, names: Mapping[str, str], deltas: Iterable[str]) -> Checkpoint:
        """The same tensors under other names, some of them differences to a base that is otherwise unchanged.

        Args:
            names: old → new, for all names.
            deltas: old names of the differences.
        """
        return self.renamed(names)._changed(deltas=frozenset(names[name] for name in deltas), partial=True)

    def with_prefix(self, prefix: str) -> Checkpoint:
        """The tensors whose names start with `prefix`, without it; all others are listed in `outside`.

        Raises:
            CheckpointError: no tensor's name starts with `prefix`.
        """
        if not prefix:
            return self
        inside = {name: name[len(prefix) :] for name in (*self._specs, *self.tied) if name.startswith(prefix)}
        if not inside:
            first = next(iter(self._specs), None)
            raise CheckpointError(
                f"{self.label}: no tensor's name starts with the prefix '{prefix}'; its first name is '{first}'"
            )
        found = self.renamed(inside)
        found.outside = (*self.outside, *(name for name in self._specs if name not in inside))
        if self._bind is not None:
            found._bind = lambda base: self.on(base.under(prefix)).with_prefix(prefix)
        return found

    def under(self, prefix: str) -> Checkpoint:
        """The same tensors with a prefix before their names."""
        found = self.renamed({name: prefix + name for name in (*self._specs, *self.tied)})
        if self._bind is not None:
            found._bind = lambda base: self.on(base.with_prefix(prefix)).under(prefix)
        return found

    def on(self, base: Checkpoint) -> Checkpoint:
        """This model bound to its base; only adapters change by it.

        Args:
            base: the model that this one was fine-tuned from, under this model's names (see `relative_to`).

        Raises:
            CheckpointError: an adapter does not fit the base.
        """
        return self if self._bind is None else self._bind(base)._changed(label=self.label, folder=self.folder)

    def joined(self, other: Checkpoint) -> Checkpoint:
        """These tensors together with those of another part of the model, which has different names."""
        found = self._changed(
            _specs={**self._specs, **other._specs},
            _read=lambda name, run: (other if name in other._specs else self)._read(name, run),
            tied={**self.tied, **other.tied},
            deltas=self.deltas | other.deltas,
            buffers=self.buffers | other.buffers,
            alone=self.alone | other.alone,
        )
        if self.source is not self:
            # A ChainMap writes only to its first mapping, and this one is only read.
            found.source = ChainMap({}, other.source, self.source)  # type: ignore[arg-type]
        return found

    def derived(self, origin: Checkpoint, bind: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
        """These tensors as another view of an opened model, with the same stored tensors and binding to a base.

        Args:
            origin: the model.
            bind: returns this view of the bound `origin`, given the base under the names of this view.
        """
        return self._changed(source=origin.source, _bind=None if origin._bind is None else bind)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """A selection of the tensors under other names.

        Args:
            names: old → new.
        """
        old = {new: self._stored(name) for name, new in names.items()}
        tied = {names[name]: names[first] for name, first in self.tied.items() if name in names and first in names}
        # A tied name that the file omits is listed if the tensor it is tied to is not selected.
        specs = {new: self._specs[old[new]] for name, new in names.items() if name in self._specs or new not in tied}
        return self._changed(
            _specs=specs,
            _read=lambda name, run: self._read(old[name], run),
            tied=tied,
            deltas=frozenset(names[name] for name in self.deltas if name in names),
            buffers=frozenset(names[name] for name in self.buffers if name in names),
            alone=frozenset(names[name] for name in self.alone if name in names),
        )

    def _changed(self, **attributes: Any) -> Checkpoint:
        changed = copy.copy(self)
        changed.__dict__.update(attributes)
        if self.source is self and "source" not in attributes:
            changed.source = changed
        return changed

    def relative_to(self, reference: Iterable[str]) -> Checkpoint:
        """Strip the prefix under which this checkpoint holds a reference model's tensors.

        A Lightning checkpoint has `backbone.model.layer.weight` for the base's `layer.weight`. The prefix under which
        the most names agree is stripped; none if no prefix improves the agreement.

        Args:
            reference: the tensor names of the base.

        Raises:
            CheckpointError: several prefixes agree equally well (a model and its moving average, say).
        """
        wanted = set(reference)
        candidates = {""}
        for name in self._specs:
            # Every dot of a name gives a candidate prefix, so the search is linear in the names.
            position = name.find(".")
            while position >= 0:
                if name[position + 1 :] in wanted:
                    candidates.add(name[: position + 1])
                position = name.find(".", position + 1)
        counts = {
            prefix: sum(name.startswith(prefix) and name[len(prefix) :] in wanted for name in self._specs)
            for prefix in sorted(candidates, key=lambda prefix: (len(prefix), prefix))
        }
        most = max(counts.values())
        best = [prefix for prefix, count in counts.items() if count == most]
        if len(best) > 1 and best[0]:
            raise CheckpointError(
                f"{self.label}: holds the base's tensors under '{best[0]}' and under '{best[1]}'; say which to take "
                f"with open_checkpoint(..., prefix='{best[0]}')"
            )
        return self.with_prefix(best[0])

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
