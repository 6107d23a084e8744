"""Merge the same models by many candidate methods in turn, as a search does.

Task vectors are kept in memory if they fit, and statistics are collected once for all candidates with the same
`statistics_key`: each further merge is one pass of `combine` over tensors in memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints import TensorSpec, open_checkpoint
from freemerge.checkpoints.opening import Source
from freemerge.merging.engine.combiner import Combiner
from freemerge.merging.engine.executor import Executor, Memory
from freemerge.merging.engine.plan import make_plan
from freemerge.merging.engine.reader import KeptReader, Reader
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.scales import is_linear, rescaled
from freemerge.tensors.differences import add
from freemerge.tensors.rounding import IN_MEMORY


class Candidates:
    """Fine-tuned models of one base for repeated merges.

    Args:
        base: the pretrained model: a state dict, a module or a path, as for `merge`.
        finetuned: name → fine-tuned model.
        include: see `merge`.
        exclude: see `merge`.
        memory: bytes that the task vectors may take, 4 · K · D; if they need more, they are read again for each pass.
            None for half of the free memory.

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
        needed = 4 * len(models) * sum(shape.numel() for shape in self._plan.shapes.values())
        allowed = _free_memory() // 2 if memory is None else memory
        self.in_memory = needed <= allowed
        self._reader = KeptReader(self._plan) if self.in_memory else Reader(self._plan)
        self._vectors = self._reader.vectors()
        self._combiners: dict[Hashable, Combiner] = {}
        self.passes = 0  # of statistics, made so far

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the K fine-tuned models."""
        return self._vectors.labels

    def merge(self, method: MergeMethod) -> dict[str, Tensor]:
        """The merged model, as `freemerge.merge` makes it.

        Args:
            method: how to merge.

        Returns:
            All tensors of the base by name, merged in the base's dtypes. Tensors that are not merged are the base's
            own.

        Raises:
            MergeError: the method cannot merge these models, or a value of the result is NaN or infinite, or overflows
                the base's dtype.
        """
        return self._complete(self._run(method, self._plan.merged))

    def over_scales(self, method: MergeMethod, factors: Iterable[float]) -> Iterator[dict[str, Tensor]]:
        """Merge at several scales in turn: methods that are linear in the scale merge once.

        Args:
            method: how to merge; it has a scale.
            factors: the scales to try, see `rescaled`.

        Returns:
            For each scale, the merged model as `merge` returns it for the method at that scale.

        Raises:
            MergeError: see `merge`.
        """
        # A single model's own values are passed through, which scaling a difference cannot reproduce.
        if not is_linear(method) or len(self.labels) == 1:
            for factor in factors:
                yield self.merge(rescaled(method, factor))
            return
        unit = self._run(rescaled(method, 1.0), self._plan.weights, onto_base=False)
        averaged = self._run(method, [name for name in self._plan.merged if name in self._plan.averaged])
        for factor in factors:
            merged = {name: add(name, self._base[name], factor * delta, method) for name, delta in unit.items()}
            yield self._complete({**merged, **averaged})

    def _run(self, method: MergeMethod, names: Sequence[str], onto_base: bool = True) -> dict[str, Tensor]:
        """Merge tensors; name → merged tensor, or merged difference."""
        method.check(self.labels)
        specs = self._plan.specs
        if not onto_base:
            specs = {name: TensorSpec(spec.shape, torch.float32) for name, spec in specs.items()}
        found = Memory(specs)
        executor = Executor(self._reader, self._combiner(method), found, onto_base=onto_base, advice=IN_MEMORY)
        executor.run(names)
        return found

    def _complete(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the base: the merged ones, and the base's own."""
        return {name: merged.get(self._plan.tied.get(name, name), self._base[name]) for name in self._plan.base.names}

    def _combiner(self, method: MergeMethod) -> Combiner:
        key = method.statistics_key
        if key not in self._combiners:
            # A search rarely returns to earlier statistics.
            while len(self._combiners) >= 8:
                del self._combiners[next(iter(self._combiners))]
            self._combiners[key] = Combiner.of(method, self._vectors, self._plan.averaged)
            self.passes += 1
        return self._combiners[key].of_method(method)


def _free_memory() -> int:
    """Bytes of free memory according to the system; unlimited if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 1 << 62
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 1 << 62)
