"""A checkpoint: named tensors whose shapes are known at once and whose values are read when asked for.

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
        bind: for a model that cannot be told without its base (an adapter whose differences depend on the base's
            values): returns the model's tensors, given the base. See `on`.
        folder: where the files lie that describe this model (configuration, tokenizer), if there is such a folder.
        metadata: what the file says of itself, for files that can.
        buffers: names of tensors that are buffers of a module, not its parameters.
        alone: names of an adapter's tensors that change one module, and no other that shares its weight.
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
        self._specs = dict(specs)
        self._read = read
        self._bind = bind

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in storage order."""
        return tuple(self._specs)

    @property
    def bound(self) -> bool:
        """Whether all is known of the tensors; of some adapters it is not before `on` has been called."""
        return self._bind is None

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, listed or as the name of a tied one that is left out."""
        return name in self._specs or name in self.tied

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

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
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
        return self._changed(label=label)

    def with_folder(self, folder: Path) -> Checkpoint:
        """The same tensors, described by the files of a folder."""
        return self._changed(folder=folder)

    def without_metadata(self) -> Checkpoint:
        """The same tensors, without what the file says of itself."""
        return self._changed(metadata={})

    def with_tied_names(self) -> Checkpoint:
        """The same tensors by all their names: those too that a file leaves out because they are tied to others."""
        names = dict.fromkeys((*self._specs, *self.tied))
        return self._changed(
            _specs={name: self.spec(name) for name in names},
            _read=lambda name, run: self._read(self._stored(name), run),
        )

    def tying(self, tied: Mapping[str, str]) -> Checkpoint:
        """The same tensors, of which more are known to be one.

        Args:
            tied: name → the name of the tensor that it is; see `tied` above.
        """
        return self._changed(tied={**self.tied, **tied}, source=self.source)

    def after(self, check: Callable[[str], None]) -> Checkpoint:
        """The same tensors; `check` is called with a tensor's name before its values are read, from any thread."""

        def read(name: str, run: tuple[int, int] | None) -> Tensor:
            check(name)
            return self._read(name, run)

        return self._changed(_read=read)

    def apart(self, names: Iterable[str]) -> Checkpoint:
        """The same tensors, those of some names no longer tied: each is listed as a tensor of its own."""
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
        """The same tensors by other names, some of them differences to a base in which all else is unchanged.

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
        """This model as a change of its base; it differs from the model alone only for adapters.

        Args:
            base: the model that this one was fine-tuned from, under this model's names (see `relative_to`).

        Raises:
            CheckpointError: an adapter does not fit the base.
        """
        return self if self._bind is None else self._bind(base)._changed(label=self.label, folder=self.folder)

    def joined(self, other: Checkpoint) -> Checkpoint:
        """These tensors and those of another part of the model, whose names are others."""
        found = self._changed(
            _specs={**self._specs, **other._specs},
            _read=lambda name, run: (other if name in other._specs else self)._read(name, run),
            tied={**self.tied, **other.tied},
            deltas=self.deltas | other.deltas,
            buffers=self.buffers | other.buffers,
            alone=self.alone | other.alone,
        )
        if self.source is not self:
            # Only its first mapping is ever written to, and this one is only read.
            found.source = ChainMap({}, other.source, self.source)  # type: ignore[arg-type]
        return found

    def derived(self, origin: Checkpoint, bind: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
        """These tensors as another view of an opened model: stored as that one's are, and bound to a base as that one.

        Args:
            origin: the model.
            bind: returns the view of `origin` that this one is, given the base under the names of this one.
        """
        return self._changed(source=origin.source, _bind=None if origin._bind is None else bind)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Some of the tensors, by other names.

        Args:
            names: old → new.
        """
        old = {new: self._stored(name) for name, new in names.items()}
        tied = {names[name]: names[first] for name, first in self.tied.items() if name in names and first in names}
        # A tied name that a file leaves out comes to be listed when the one it is tied to is not taken.
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
        """Strip the prefix under which this checkpoint holds the tensors of a reference model.

        A Lightning checkpoint calls `backbone.model.layer.weight` what its base calls `layer.weight`. The prefix that
        brings the most names into agreement is taken; none if none agrees better.

        Args:
            reference: the tensor names of the base.

        Raises:
            CheckpointError: several prefixes agree equally well (a model and its moving average, say).
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
