"""What a merge will do with every tensor, decided and checked from names, shapes and dtypes before any value is read.

Each tensor of the base is merged, kept, or tied to another; each tensor of a fine-tuned model takes part, is excluded,
or is an error. None is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, TensorSpec
from freemerge.checkpoints.buffers import is_constant, is_statistic
from freemerge.checkpoints.marks import check_merged, without_marks
from freemerge.errors import MergeError
from freemerge.merging.checks.complex_weights import check_complex
from freemerge.merging.checks.quantized import check_quantized
from freemerge.merging.folders.parts import join_modules
from freemerge.merging.matching.alignment import align
from freemerge.merging.matching.misfits import Misfit, describe, find_misfits
from freemerge.merging.matching.tied_weights import settle_ties
from freemerge.merging.matching.vocabulary import match_rows
from freemerge.merging.task_vectors import COLUMNS, Vectors, subtract, widened
from freemerge.runtime.device_copies import Transfer
from freemerge.runtime.pages import fresh
from freemerge.runtime.processes import Processes
from freemerge.runtime.threads import each, scratch
from freemerge.tensors.chunks import CHUNK, Chunk, at_a_time
from freemerge.tensors.patterns import select, unmatched


class Operands(NamedTuple):
    """What is read of a tensor, or of a chunk of one (n values), to merge it."""

    base: Tensor  # (*shape) or (n,), as stored
    deltas: Tensor  # (K, *shape) or (K, n) float32, in memory of their own
    single: Tensor | None  # the model's own values as stored, if there is one model
    start: int | None  # position of the first value, if it is a chunk


@dataclass(frozen=True)
class Plan:
    """A merge whose inputs fit together.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        merged: names of the tensors to merge.
        kept: names of the tensors that stay as in the base (excluded, not of floating point, or constants).
        tied: name → the name earlier in the base whose memory it shares, in the base and in every model.
        dtype: of the merged model's floating-point tensors; None for the base's own.
        embeddings: what became of vocabularies that differ, see `match_rows`.
        rows: of tensors whose vocabularies differ: how many leading rows of each model take part.
        device: where to compute; None for where the tensors are.
        untied: name → the one that it is tied to in the base and no longer in the result.
        averaged: which of the merged ones are statistics, of which the mean is taken, whatever the method.
    """

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    merged: tuple[str, ...]
    kept: tuple[str, ...]
    tied: Mapping[str, str]
    dtype: torch.dtype | None
    embeddings: str = "error"
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    device: torch.device | None = None
    averaged: frozenset[str] = frozenset()
    untied: Mapping[str, str] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor of the result but the tied ones, in the base's order."""
        return {
            name: TensorSpec(self.base.spec(name).shape, self.output_dtype(name))
            for name in self.base.names
            if name not in self.tied
        }

    def output_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor of the result."""
        dtype = self.base.spec(name).dtype
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the tensors to merge."""
        return {name: torch.Size(self.base.spec(name).shape) for name in self.merged}

    @cached_property
    def home(self) -> torch.device:
        """Where the base's tensors are."""
        return self.base.read_range(self.merged[0], 0, 0).device

    @cached_property
    def place(self) -> torch.device:
        """Where the merge is computed."""
        return self.home if self.device is None else self.device

    @property
    def resident(self) -> bool:
        """Whether the base is on the GPU that computes, so that nothing else has work to do."""
        return self.place.type == "cuda" and self.transfer is None

    @cached_property
    def transfer(self) -> Transfer | None:
        """Copies to a GPU and back, if the base's tensors are not there already."""
        apart = self.place.type == "cuda" and self.home.type == "cpu"
        return Transfer(self.place) if apart else None

    @property
    def chunk(self) -> int | None:
        """Values of all models together in one chunk; None for what suits a processor's cache."""
        return None if self.place.type == "cpu" else at_a_time(CHUNK, self.place)

    def left_out(self, model: Checkpoint) -> list[str]:
        """Tensors of a fine-tuned model that have no part in the merge because the base has no such ones."""
        inside = (name for name in model.names if name not in self.base and model.tied.get(name) not in self.base)
        return [*model.outside, *inside]

    def vectors(self, processes: Processes | None = None, averaged: bool = False) -> Vectors:
        """The models' task vectors, computed from the checkpoints whenever they are asked for.

        Args:
            processes: those that share the passes.
            averaged: whether with the statistics, which methods are not shown.
        """
        return Vectors(
            [model.label for model in self.models],
            {name: shape for name, shape in self.shapes.items() if averaged or name not in self.averaged},
            lambda name: self.read(name).deltas,
            lambda chunk: self.read_again(chunk).deltas,
            processes,
            self.chunk,
        )

    def read_base(self, what: str | Chunk) -> Tensor:
        """The base's values of a tensor, or of a chunk of one, as stored."""
        return self._placed(_read(self.base, what))

    def read(self, what: str | Chunk, memory: Tensor | None = None) -> Operands:
        """Read the base's values of a tensor, or of a chunk of one, and what the models add to them.

        Args:
            what: name of the tensor, or the chunk.
            memory: (K·n or more,) float32, to put the latter in; fresh memory if None, or on another device.

        Raises:
            MergeError: a value is NaN or infinite.
        """
        name = what.name if isinstance(what, Chunk) else what
        base = self.read_base(what)
        shape = torch.Size((len(self.models), *base.shape))
        if memory is None or memory.device != base.device:
            deltas = fresh(shape, torch.float32, base.device)
        else:
            deltas = memory[: shape.numel()].view(shape)
        whole = not isinstance(what, Chunk)
        by_runs = whole and name not in self.rows and len(self.models) > 1 and base.device.type == "cpu"
        reference = base if by_runs else widened(base)  # once, not once per model

        def read_delta(index: int) -> Tensor | None:
            """Write a model's difference, and return its own values, if it has such."""
            model, row = self.models[index], deltas[index]
            if not model.has(name):  # an adapter that leaves this tensor as it is
                row.zero_()
                return None
            if name in self.rows:
                return _read_rows(model, what, self.rows[name][index], reference, row)
            if by_runs and name not in model.deltas:
                _read_runs(model, name, reference, row)
                return None
            values = self._placed(_read(model, what))
            if name in model.deltas:
                row.copy_(values)
                return None
            subtract(reference, values, row)
            return values if len(self.models) == 1 else None

        indices = range(len(self.models))
        own = each(read_delta, indices) if whole else [read_delta(index) for index in indices]
        # One sum finds any NaN or infinity; only when it does (or overflows) is it worth asking where.
        if not bool(torch.isfinite(deltas.sum())):
            for checkpoint in (self.base, *self.models):
                if name in checkpoint:
                    _require_finite(checkpoint.label, name, checkpoint.tensor(name))
        single = own[0] if len(own) == 1 else None
        return Operands(base, deltas, single, None if whole else what.start)

    def read_again(self, chunk: Chunk) -> Operands:
        """`read`, into memory that the next call in the same of our threads uses again."""
        size = len(self.models) * (chunk.stop - chunk.start)
        return self.read(chunk, scratch("differences", (size,), torch.float32, torch.device("cpu")))

    def _placed(self, values: Tensor) -> Tensor:
        """Values where they are computed with."""
        if values.device == self.place:
            return values
        if self.transfer is None or values.device.type != "cpu":
            return values.to(self.place)
        return self.transfer.inward(values)

    def returned(self, values: Tensor) -> Tensor:
        """Values of the result where the base's are."""
        if values.device == self.home:
            return values
        return values.to(self.home) if self.transfer is None else self.transfer.outward(values)


def make_plan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    embeddings: str = "error",
    device: torch.device | None = None,
    modules: Sequence[Sequence[str]] | None = None,
) -> Plan:
    """Check that the models fit the base and decide what becomes of every tensor.

    Fine-tuned models may call their tensors otherwise than the base: see `align`.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        include: patterns of the tensors to merge; None for all. See `patterns.select`.
        exclude: patterns of the tensors to keep as in the base.
        dtype: of the result's floating-point tensors; None for the base's own.
        embeddings: what to do with vocabularies that differ, see `merge`.
        device: where to compute; None for where the tensors are.
        modules: for the base, then for each model: folders in its own that hold parts of it, see `join_modules`.

    Raises:
        MergeError: nothing to merge, a pattern that matches nothing, a tensor that is missing, extra or of another
            shape, a vocabulary that differs.
    """
    if not models:
        raise MergeError("there is no fine-tuned model to merge; name at least one")
    if base.deltas:
        raise MergeError(f"{base.label}: is an adapter; the base must be the model that it was trained on")
    if dtype is not None and not dtype.is_floating_point:
        raise MergeError(f"the dtype of a merged model must be a floating-point one, not {dtype}")
    if repeated := sorted({m.label for m in models if sum(m.label == other.label for other in models) > 1}):
        raise MergeError(f"two fine-tuned models have the same name '{repeated[0]}'; give each its own")
    for checkpoint in (base, *models):
        check_merged(checkpoint, base.names)

    def choose(models: Sequence[Checkpoint]) -> tuple[set[str], dict[str, str], tuple[str, ...]]:
        """What the patterns select, what is tied, and what is merged."""
        names = (name for model in models for name in (*model.names, *model.outside))
        selected = set(select(dict.fromkeys((*base.names, *names)), include, exclude))
        tied = {name: first for name, first in base.tied.items() if name in base}
        tied = {name: first for name, first in tied.items() if _tied_everywhere(name, first, models)}
        floating = (name for name in base.names if base.spec(name).dtype.is_floating_point and name not in tied)
        merged = tuple(name for name in floating if name in selected and not is_constant(name, base.spec(name)))
        return selected, tied, merged

    def find(model: Checkpoint) -> list[Misfit]:
        selected, _, merged = choose([model])
        return find_misfits(base, model, merged, selected)

    aligned = align(base, [without_marks(model, base.names) for model in models], find)
    base, models, untied = settle_ties(base, aligned.models)
    if modules is not None:
        base, models = join_modules(base, models, modules)

    everything = dict.fromkeys((*base.names, *(name for model in models for name in (*model.names, *model.outside))))
    for patterns, argument in ((include, "include"), (exclude, "exclude")):
        if nothing := unmatched(everything, patterns, argument):
            raise MergeError(f"{argument}: the pattern '{nothing[0]}' matches no tensor of any model; is it misspelt?")

    selected, tied, merged = choose(models)
    for checkpoint in (base, *models):
        check_quantized(checkpoint, selected)
    buffers = base.buffers.union(*(model.buffers for model in models))
    averaged = frozenset(name for name in merged if is_statistic(name) or name in buffers)
    taken = {*merged, *tied}
    kept = tuple(name for name in base.names if name not in taken)
    if wrong := [misfit for model in models for misfit in find_misfits(base, model, merged, selected)]:
        raise MergeError(describe(base, wrong, aligned))
    check_complex(base, models, selected)
    rows = match_rows(base, models, merged, embeddings)
    if not merged:
        raise MergeError("include and exclude leave no floating-point tensor of the base to merge")
    return Plan(base, models, merged, kept, tied, dtype, embeddings, rows, device, averaged, untied)


def _read(checkpoint: Checkpoint, what: str | Chunk) -> Tensor:
    return checkpoint.read_range(*what) if isinstance(what, Chunk) else checkpoint.tensor(what)


def _read_runs(model: Checkpoint, name: str, base: Tensor, delta: Tensor) -> None:
    """Read a model's difference to the base in runs: its own values are never whole in memory.

    Args:
        model: the fine-tuned model.
        name: of the tensor.
        base: the base's, (*shape) as stored.
        delta: where the difference is written, (*shape) float32.
    """
    base, delta = base.reshape(-1), delta.view(-1)
    for start in range(0, len(base), COLUMNS):
        run = slice(start, start + COLUMNS)
        values = model.read_range(name, start, min(start + COLUMNS, len(base)))
        subtract(widened(base[run]), values.to(base.device), delta[run])


def _read_rows(model: Checkpoint, what: str | Chunk, rows: int, reference: Tensor, delta: Tensor) -> Tensor | None:
    """Read what takes part of a model whose vocabulary is not the base's.

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


def _tied_everywhere(name: str, first: str, models: Sequence[Checkpoint]) -> bool:
    return all(name not in model or model.tied.get(name) == first for model in models)


def _require_finite(label: str, name: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor.float() if tensor.dtype.itemsize < 2 else tensor)
    if not bool(finite.all()):
        wrong = tensor[~finite]
        raise MergeError(
            f"{label}: the tensor '{name}' has {wrong.numel():,} values that are NaN or infinite (the first is "
            f"{float(wrong[0])}); repair the model, or exclude the tensor"
        )
