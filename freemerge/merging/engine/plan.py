"""The plan of a merge: what happens to every tensor, decided and checked from names, shapes and dtypes alone.

Each tensor of the base is merged, kept, or tied to another; each tensor of a fine-tuned model takes part, is excluded,
or is an error. No tensor is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

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
from freemerge.merging.matching.vocabulary import Embeddings, match_rows
from freemerge.tensors.patterns import select, unmatched


@dataclass(frozen=True)
class Plan:
    """A merge whose inputs fit together.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        merged: names of the tensors to merge.
        kept: names of the tensors that keep the base's values (excluded, not floating-point, or constants).
        tied: name → the name earlier in the base whose memory it shares, in the base and in every model.
        dtype: dtype of the merged model's floating-point tensors; None for the base's own.
        embeddings: the handling of vocabularies that differ, see `match_rows`.
        rows: for tensors whose vocabularies differ: the number of leading rows of each model that take part.
        device: where to compute; None for where the tensors are.
        untied: name → the name that it is tied to in the base but not in the result.
        averaged: names of the merged tensors that are statistics, which every method averages.
    """

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    merged: tuple[str, ...]
    kept: tuple[str, ...]
    tied: Mapping[str, str]
    dtype: torch.dtype | None
    embeddings: Embeddings = "error"
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    device: torch.device | None = None
    averaged: frozenset[str] = frozenset()
    untied: Mapping[str, str] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor of the result except the tied ones, in the base's order."""
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

    @property
    def weights(self) -> tuple[str, ...]:
        """The tensors that methods merge: all merged ones except the averaged statistics."""
        return tuple(name for name in self.merged if name not in self.averaged)

    def left_out(self, model: Checkpoint) -> list[str]:
        """Tensors of a fine-tuned model that are left out of the merge because the base lacks them."""
        inside = (name for name in model.names if name not in self.base and model.tied.get(name) not in self.base)
        return [*model.outside, *inside]


def make_plan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    embeddings: Embeddings = "error",
    device: torch.device | None = None,
    modules: Sequence[Sequence[str]] | None = None,
) -> Plan:
    """Check that the models fit the base, and decide what happens to every tensor.

    Fine-tuned models may name their tensors differently from the base: see `align`.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        include: patterns of the tensors to merge; None for all. See `patterns.select`.
        exclude: patterns of the tensors to keep from the base.
        dtype: dtype of the result's floating-point tensors; None for the base's own.
        embeddings: what to do with vocabularies that differ, see `merge`.
        device: where to compute; None for where the tensors are.
        modules: for the base and then for each model: subfolders that hold parts of it, see `join_modules`.

    Raises:
        MergeError: there is nothing to merge, a pattern matches nothing, a tensor is missing, extra or has another
            shape, or a vocabulary differs.
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
        """The selected, the tied and the merged tensors."""
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


def _tied_everywhere(name: str, first: str, models: Sequence[Checkpoint]) -> bool:
    return all(name not in model or model.tied.get(name) == first for model in models)
