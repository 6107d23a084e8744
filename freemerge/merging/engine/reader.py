"""Reads the tensors of a plan to the compute device: the base's values and the models' differences."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.memory import flat_range
from freemerge.errors import MergeError
from freemerge.merging.engine.plan import Plan
from freemerge.merging.task_vectors import Vectors
from freemerge.runtime.device_copies import Transfer
from freemerge.runtime.pages import fresh
from freemerge.runtime.processes import Processes
from freemerge.runtime.threads import each, scratch
from freemerge.tensors.chunks import CHUNK, Chunk, at_a_time
from freemerge.tensors.differences import subtract, widened

_COLUMNS = 1 << 17  # values of a whole tensor read at a time, so that temporaries are never whole


class Operands(NamedTuple):
    """The data of a tensor, or of a chunk of one (n values), for a merge."""

    base: Tensor  # (*shape) or (n,), as stored
    deltas: Tensor  # (K, *shape) or (K, n) float32, in new memory
    single: Tensor | None  # the model's own values as stored, if there is one model
    start: int | None  # position of a chunk's first value


class Reader:
    """Reads the tensors of a plan from its checkpoints, without caching.

    Args:
        plan: the merge.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def home(self) -> torch.device:
        """The device of the base's tensors."""
        return self.plan.base.read_range(self.plan.merged[0], 0, 0).device

    @cached_property
    def place(self) -> torch.device:
        """The device of the computation."""
        return self.home if self.plan.device is None else self.plan.device

    @property
    def resident(self) -> bool:
        """Whether the base is on the computing GPU, so that the CPU and copies have no work."""
        return self.place.type == "cuda" and self.transfer is None

    @cached_property
    def transfer(self) -> Transfer | None:
        """Copies to a GPU and back, if the base's tensors are not there already."""
        apart = self.place.type == "cuda" and self.home.type == "cpu"
        return Transfer(self.place) if apart else None

    @property
    def chunk(self) -> int | None:
        """Values of all models together in one chunk; None for the default, which suits a CPU's cache."""
        return None if self.place.type == "cpu" else at_a_time(CHUNK, self.place)

    def vectors(self, processes: Processes | None = None) -> Vectors:
        """The models' task vectors, read on demand.

        Args:
            processes: the processes that share the passes.
        """
        return Vectors(
            [model.label for model in self.plan.models],
            self.plan.shapes,
            lambda name: self.read(name).deltas,
            lambda chunk: self.read_again(chunk).deltas,
            processes,
            self.chunk,
            self.read_base,
        )

    def read_base(self, what: str | Chunk) -> Tensor:
        """The base's values of a tensor, or of a chunk of one, as stored."""
        return self._placed(_read(self.plan.base, what))

    def read(self, what: str | Chunk, memory: Tensor | None = None) -> Operands:
        """Read the base's values of a tensor, or of a chunk of one, and the models' differences to them.

        Args:
            what: name of the tensor, or the chunk.
            memory: (K·n or more,) float32, for the differences; new memory if None or on another device.

        Raises:
            MergeError: a value is NaN or infinite.
        """
        name = what.name if isinstance(what, Chunk) else what
        base = self.read_base(what)
        shape = torch.Size((len(self.plan.models), *base.shape))
        if memory is None or memory.device != base.device:
            deltas = fresh(shape, torch.float32, base.device)
        else:
            deltas = memory[: shape.numel()].view(shape)
        whole = not isinstance(what, Chunk)
        by_runs = whole and name not in self.plan.rows and len(self.plan.models) > 1 and base.device.type == "cpu"
        reference = base if by_runs else widened(base)  # converted once for all models

        def read_delta(index: int) -> Tensor | None:
            """Write a model's difference, and return its own values, if it stores any."""
            model, row = self.plan.models[index], deltas[index]
            if not model.has(name):  # an adapter that does not change this tensor
                row.zero_()
                return None
            if name in self.plan.rows:
                return _read_rows(model, what, self.plan.rows[name][index], reference, row)
            if by_runs and name not in model.deltas:
                _read_runs(model, name, reference, row)
                return None
            values = self._placed(_read(model, what))
            if name in model.deltas:
                row.copy_(values)
                return None
            subtract(reference, values, row)
            return values if len(self.plan.models) == 1 else None

        indices = range(len(self.plan.models))
        own = each(read_delta, indices) if whole else [read_delta(index) for index in indices]
        # One sum detects any NaN or infinity; only if it does (or overflows) the values are checked one by one.
        if not math.isfinite(float(deltas.sum())):  # torch.isfinite would run four operations on one number
            for checkpoint in (self.plan.base, *self.plan.models):
                if name in checkpoint:
                    _require_finite(checkpoint.label, name, checkpoint.tensor(name))
        single = own[0] if len(own) == 1 else None
        return Operands(base, deltas, single, what.start if isinstance(what, Chunk) else None)

    def read_again(self, chunk: Chunk) -> Operands:
        """Like `read`, into memory that the next call in the same worker thread reuses."""
        size = len(self.plan.models) * (chunk.stop - chunk.start)
        return self.read(chunk, scratch("differences", (size,), torch.float32, torch.device("cpu")))

    def _placed(self, values: Tensor) -> Tensor:
        """Move values to the compute device."""
        if values.device == self.place:
            return values
        if self.transfer is None or values.device.type != "cpu":
            return values.to(self.place)
        return self.transfer.inward(values)

    def returned(self, values: Tensor) -> Tensor:
        """Move values of the result to the base's device."""
        if values.device == self.home:
            return values
        return values.to(self.home) if self.transfer is None else self.transfer.outward(values)


class KeptReader(Reader):
    """Reads the tensors to merge once and caches them, for repeated merges.

    Args:
        plan: the merge.

    Raises:
        MergeError: a value is NaN or infinite.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._kept: dict[str, Operands] = {}
        self._kept = {name: self.read(name) for name in plan.merged}

    def read_base(self, what: str | Chunk) -> Tensor:
        kept = self._kept.get(what.name if isinstance(what, Chunk) else what)
        if kept is None:
            return super().read_base(what)
        return kept.base if isinstance(what, str) else flat_range(kept.base, what.start, what.stop)

    def read(self, what: str | Chunk, memory: Tensor | None = None) -> Operands:
        name = what if isinstance(what, str) else what.name
        if name not in self._kept:
            return super().read(what, memory)
        base, deltas, single, start = self._kept[name]
        rows, own = list(deltas), single
        if isinstance(what, Chunk):
            start, stop = what.start, what.stop
            base, rows = flat_range(base, start, stop), [flat_range(row, start, stop) for row in rows]
            own = None if own is None else flat_range(own, start, stop)
        # A copy, because methods may overwrite their arguments.
        shape = torch.Size((len(rows), *rows[0].shape))
        if memory is None or memory.device != deltas.device:
            copied = fresh(shape, torch.float32, deltas.device)
        else:
            copied = memory[: shape.numel()].view(shape)
        for target, row in zip(copied, rows, strict=True):
            target.copy_(row)
        return Operands(base, copied, own, start)


def _read(checkpoint: Checkpoint, what: str | Chunk) -> Tensor:
    return checkpoint.read_range(*what) if isinstance(what, Chunk) else checkpoint.tensor(what)


def _read_runs(model: Checkpoint, name: str, base: Tensor, delta: Tensor) -> None:
    """Read a model's difference to the base in chunks: its own values are never whole in memory.

    Args:
        model: the fine-tuned model.
        name: name of the tensor.
        base: the base's tensor, (*shape) as stored.
        delta: output for the difference, (*shape) float32.
    """
    base, delta = base.reshape(-1), delta.view(-1)
    for start in range(0, len(base), _COLUMNS):
        run = slice(start, start + _COLUMNS)
        values = model.read_range(name, start, min(start + _COLUMNS, len(base)))
        subtract(widened(base[run]), values.to(base.device), delta[run])


def _read_rows(model: Checkpoint, what: str | Chunk, rows: int, reference: Tensor, delta: Tensor) -> Tensor | None:
    """Read the rows that take part from a model whose vocabulary differs from the base's.

    Args:
        model: the fine-tuned model.
        what: the tensor, or the chunk of one.
        rows: how many of the model's rows take part.
        reference: the base's values.
        delta: where the difference to them is written, zero for the other rows.

    Returns:
        The model's own values, and in the other rows the base's; None for an adapter.
    """
    name, start, stop = what if isinstance(what, Chunk) else (what, 0, reference.numel())
    count = max(0, min(stop, rows * torch.Size(model.spec(name).shape[1:]).numel()) - start)
    delta.zero_()
    if name in model.deltas:
        delta.view(-1)[:count] = model.read_range(name, start, start + count)
        return None
    values = reference.clone(memory_format=torch.contiguous_format)
    values.view(-1)[:count] = model.read_range(name, start, start + count)
    subtract(reference, values, delta)
    return values


def _require_finite(label: str, name: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor.float() if tensor.dtype.itemsize < 2 else tensor)
    if not bool(finite.all()):
        wrong = tensor[~finite]
        raise MergeError(
            f"{label}: the tensor '{name}' has {wrong.numel():,} values that are NaN or infinite (the first is "
            f"{float(wrong[0])}); repair the model, or exclude the tensor"
        )
