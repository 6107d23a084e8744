"""Run a batch whose groups of samples have experts of their own.

Low-rank experts run side by side in one pass, where the module allows it (`one_pass`). Other experts run group by
group, each layer with changed tensors of its own while it computes (`layerwise`); of a small model these are kept for
the next pass (`kept`). All of this happens in a twin of the module (`twins`), so that the module stays as it is and
threads compute at the same time. A module that can have no twin is used itself, by one thread at a time; sparse experts
are then written into its weights and out again (`switch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freemerge.experts.base import Expert
from freemerge.experts.kinds.low_rank import LowRankExpert
from freemerge.experts.kinds.sparse import SparseExpert
from freemerge.experts.packed import PackedExpert
from freemerge.experts.running.layerwise import UnusedLayers, substituted_unlocked
from freemerge.experts.running.mixture import Mixture
from freemerge.experts.running.one_pass import BatchChecks, fits_one_pass_unlocked, in_one_pass_unlocked
from freemerge.experts.running.replicas import Workspace, workspace
from freemerge.experts.running.switch import Overflows, attached
from freemerge.experts.running.weight_cache import WeightCache, bind, places_of
from freemerge.inputs import Inputs, select

AnyExpert = Expert | PackedExpert | Mixture

Group = tuple[AnyExpert | None, int]
"""An expert, or None for the weights as they are, and how many samples have it."""


def run_groups(
    run: nn.Module,
    module: nn.Module,
    inputs: Inputs,
    groups: Sequence[Group],
    one_pass: bool = True,
    kept: WeightCache | None = None,
) -> Tensor:
    """What a module gives for a batch, each group of samples with an expert added to its weights.

    Args:
        run: inputs (B, …) → (B, …).
        module: what the experts' names are relative to: a part of `run`, or itself.
        inputs: B ≥ 1 samples, group by group.
        groups: experts and numbers of samples, which add up to B.
        one_pass: whether low-rank experts may run side by side.
        kept: where packed experts' changed weights are kept for the next pass; they are not if it is left out.

    Returns:
        (B, …).

    Raises:
        ValueError: if the module's weights are sharded.
        OverflowError: if a changed weight is too large for the weights' dtype.
    """
    with workspace(run) as own:
        if not own.is_replica and any(expert is not None for expert, _ in groups):
            _check_whole(module)
        known = _known.setdefault(module, _Known())
        kinds = {kind_in(expert) for expert, _ in groups if expert is not None}
        may = one_pass and kinds == {LowRankExpert}
        thin = [(one, count) for one, count in groups if one is None or isinstance(one, (LowRankExpert, PackedExpert))]
        plans = own.plans if own.is_replica else None
        if may and fits_one_pass_unlocked(own[module], own[run], thin, inputs, known.answers, plans):
            with in_one_pass_unlocked(own[module], thin, plans):
                return own[run](inputs)
        outputs, start = [], 0
        compared: set[str] = set()
        for expert, count in groups:
            part = inputs if len(groups) == 1 else select(inputs, slice(start, start + count))
            start += count
            if kept is not None and own.is_replica and isinstance(expert, PackedExpert):
                places = places_of(own[module], expert.shapes, own.plans)
                if (changed := kept.changed(expert, places, compared)) is not None:
                    with bind(places, changed):
                        outputs.append(own[run](part))
                    continue
            outputs.append(_run_one(own, run, module, part, expert, known))
    return outputs[0] if len(groups) == 1 else torch.cat(outputs)


def kind_in(expert: AnyExpert) -> type:
    """The class of an expert, packed or not."""
    return expert.kind if isinstance(expert, PackedExpert) else type(expert)


def _check_whole(module: nn.Module) -> None:
    """Raise a ValueError if a process has only a shard of the weights, as an expert could not be added to them."""
    for name, part in module.named_modules():
        if any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(part).__mro__):
            where = f"at {name!r}" if name else "as a whole"
            raise ValueError(
                f"the backbone is sharded (FSDP, {where}), and experts are added to whole weights only; compute with a "
                "model that each process has whole, as under DDP"
            )


class _Known:
    """What has been found out about a module."""

    def __init__(self) -> None:
        self.answers: BatchChecks = {}
        self.by_parents: frozenset[str] = frozenset()  # layers whose tensors the modules around them compute with


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _run_one(
    own: Workspace,
    run: nn.Module,
    module: nn.Module,
    inputs: Inputs,
    expert: Expert | PackedExpert | Mixture | None,
    known: _Known,
) -> Tensor:
    """What a module gives with one expert for all."""
    if expert is None:
        return own[run](inputs)
    expert = expert.unpacked() if isinstance(expert, PackedExpert) else expert
    if not own.is_replica and isinstance(expert, SparseExpert):
        with attached(module, expert):
            return run(inputs)
    overflows, plans = Overflows(), own.plans if own.is_replica else None

    def added(name: str, weight: Tensor) -> Tensor:
        return overflows.watch(expert, name, weight, expert.added(name, weight))

    while True:
        held = known.by_parents
        try:
            with substituted_unlocked(own[module], expert.shapes, added, held, plans):
                outputs = own[run](inputs)
            overflows.check()
            return outputs
        except UnusedLayers as found:
            if held.issuperset(found.layers):
                raise
            known.by_parents |= frozenset(found.layers)
