"""Merge the same models by one candidate method after the other, as a search does.

Task vectors are kept in memory where they fit, and a survey is made once for all candidates that agree in what it looks
at: what is left of a merge is one pass of `combine` over tensors that are there already.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints import open_checkpoint
from freemerge.checkpoints.memory import flat_range
from freemerge.checkpoints.opening import Source
from freemerge.merging.engine.plan import make_plan
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.scales import is_linear, rescaled
from freemerge.merging.task_vectors import Vectors, add
from freemerge.runtime.threads import run
from freemerge.tensors.chunks import Chunk


class Candidates:
    """Fine-tuned models of one base, to be merged again and again.

    Args:
        base: the pretrained model: a state dict, a module or a path, as for `merge`.
        finetuned: name → fine-tuned model.
        include: see `merge`.
        exclude: see `merge`.
        memory: bytes that the task vectors may take, 4 · K · D; if they need more, they are read anew for each pass.
            None for half of what is free.

    Raises:
        MergeError: the models do not fit the base, or a value is NaN or infinite.
    """

    def __init__(
        self,
        base: Source,
        finetuned: Mapping[str, Source],
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        memory: int | None = None,
    ) -> None:
        models = [open_checkpoint(source, label=label) for label, source in finetuned.items()]
        self._plan = make_plan(open_checkpoint(base, label="base"), models, include, exclude)
        self._base = {name: self._plan.base.tensor(name) for name in self._plan.base.names}
        self._surveys: dict[Hashable, Any] = {}
        self.surveys = 0  # made so far
        vectors = self._plan.vectors()
        needed = 4 * len(models) * vectors.numel
        allowed = _free_memory() // 2 if memory is None else memory
        self.in_memory = needed <= allowed
        self._vectors = _kept(vectors) if self.in_memory else vectors
        self._averaged = {
            name: add(name, self._base[name], self._plan.read(name).deltas.mean(dim=0)) for name in self._plan.averaged
        }

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the K fine-tuned models."""
        return self._vectors.labels

    def merge(self, method: MergeMethod) -> dict[str, Tensor]:
        """The merged model, as `freemerge.merge` makes it.

        Args:
            method: how to merge.

        Returns:
            All tensors of the base by name, merged in the base's dtypes. Those that are not merged are the base's own.

        Raises:
            MergeError: the method cannot merge these models, or a value of the result is NaN or infinite, or would be
                in the base's dtype.
        """
        return self._complete(self._each(method, lambda name, delta: add(name, self._base[name], delta, method)))

    def over_scales(self, method: MergeMethod, factors: Iterable[float]) -> Iterator[dict[str, Tensor]]:
        """Merge at one scale after the other: methods that are linear in it merge once.

        Args:
            method: how to merge; it has a scale.
            factors: the scales to try, see `rescaled`.

        Returns:
            For each of them the merged model, as `merge` makes it of the method at that scale.

        Raises:
            MergeError: see `merge`.
        """
        unit = self._each(rescaled(method, 1.0), lambda name, delta: delta) if is_linear(method) else None
        for factor in factors:
            if unit is None:
                yield self.merge(rescaled(method, factor))
            else:
                merged = {name: add(name, self._base[name], factor * delta, method) for name, delta in unit.items()}
                yield self._complete(merged)

    def _each(self, method: MergeMethod, use: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """Merge every tensor; name → what is made of its merged task vector."""
        method.check(self.labels)
        statistics = self._survey(method)
        found: dict[str, Tensor] = {}

        def work(names: Iterator[str]) -> None:
            for name in names:
                found[name] = use(name, method.combine(name, self._vectors.read(name), statistics))

        # By the threads that merge, so that the results are the same to the last bit.
        sizes = {name: shape.numel() for name, shape in self._vectors.shapes.items()}
        run(work, sizes, cost=sizes.__getitem__, budget=max(sizes.values(), default=0))
        return found

    def _complete(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the base: those that were merged, the averaged ones, and the base's own."""
        merged = {**self._averaged, **merged}
        return {name: merged.get(self._plan.tied.get(name, name), self._base[name]) for name in self._plan.base.names}

    def _survey(self, method: MergeMethod) -> Any:
        key = method.statistics_key
        if key not in self._surveys:
            # A search moves on: of what it has left behind, little comes back.
            while len(self._surveys) >= 8:
                del self._surveys[next(iter(self._surveys))]
            self._surveys[key] = method.collect_statistics(self._vectors)
            self.surveys += 1
        return self._surveys[key]


def _kept(vectors: Vectors) -> Vectors:
    """The same vectors, read once; methods may overwrite what they are given, so each reading is a copy."""
    deltas = dict(vectors)

    def read_chunk(chunk: Chunk) -> Tensor:
        rows = [flat_range(row, chunk.start, chunk.stop) for row in deltas[chunk.name]]
        return torch.stack(rows)

    return Vectors(vectors.labels, vectors.shapes, lambda name: deltas[name].clone(), read_chunk)


def _free_memory() -> int:
    """Bytes of memory that are free, as the system counts them; without a count, as many as it takes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 1 << 62
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 1 << 62)
