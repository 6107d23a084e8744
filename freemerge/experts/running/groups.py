"""Run a batch in which each group of samples has its own expert.

Low-rank experts run in one pass where the module allows it (`one_pass`). Other experts run group by group, and each
layer has its changed tensors only while it computes (`layerwise`); the changed tensors of small models are cached for
the next pass (`weight_cache`). All of this happens in a replica of the module (`replicas`), so the module itself does
not change and several threads can compute at the same time. A module without a replica is used directly, by one thread
at a time; sparse experts are then written into its weights and removed again (`switch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freemerge.experts.base import Expert
from freemerge.experts.kinds.low_rank import LowRankExpert
from freemerge.experts.kinds.sparse import SparseExpert
from freemerge.experts.packed import PackedExpert
from freemerge.experts.running.layerwise import UnusedLayers, substituted_unlocked
from freemerge.experts.running.mixture import Mixture
from freemerge.experts.running.one_pass import BatchChecks, SharedState, fits_one_pass_unlocked, in_one_pass_unlocked
from freemerge.experts.running.replicas import Workspace, workspace
from freemerge.experts.running.switch import Overflows, attached
from freemerge.experts.running.weight_cache import WeightCache, bind, places_of
from freemerge.inputs import Inputs, select

AnyExpert = Expert | PackedExpert | Mixture

Group = tuple[AnyExpert | None, int]
"""An expert, or None for the unchanged weights, and the number of samples that use it."""


def _forward(run: nn.Module, inputs: Inputs) -> Tensor:
    """A forward pass."""
    outputs: Tensor = run(inputs)
    return outputs


def run_groups(
    run: nn.Module,
    module: nn.Module,
    inputs: Inputs,
    groups: Sequence[Group],
    one_pass: bool = True,
    cache: WeightCache | None = None,
    call: Callable[[nn.Module, Inputs], Tensor] = _forward,
    join: Callable[[list[Tensor]], Tensor] = torch.cat,
) -> Tensor:
    """Run a module on a batch, with each group's expert added to the module's weights.

    Args:
        run: the module to run, inputs (B, …) → outputs (B, …).
        module: the module that the experts' tensor names refer to: `run` or a submodule of it.
        inputs: B ≥ 1 samples, ordered by group.
        groups: experts and numbers of samples, which sum to B.
        one_pass: whether low-rank experts may run in one pass.
        cache: the cache of packed experts' changed weights; None disables caching.
        call: how `run`, or its replica, is run on a part of the batch; by default its forward pass. It may pass through
            the module many times, with any number of rows per sample.
        join: how the outputs of the groups are concatenated.

    Returns:
        The outputs (B, …).

    Raises:
        ValueError: if the module's weights are sharded.
        OverflowError: if a changed weight is too large for the weights' dtype.
    """
    with workspace(run) as own:
        if not own.is_replica and any(expert is not None for expert, _ in groups):
            _check_whole(module)
        facts = _facts.setdefault(module, _Facts())
        kinds = {kind_in(expert) for expert, _ in groups if expert is not None}
        may = one_pass and kinds == {LowRankExpert} and not (facts.shares_state and call is not _forward)
        low_rank = [
            (one, count) for one, count in groups if one is None or isinstance(one, (LowRankExpert, PackedExpert))
        ]
        plans = own.plans if own.is_replica else None
        if may and fits_one_pass_unlocked(own[module], own[run], low_rank, inputs, facts.checks, plans):
            try:
                with in_one_pass_unlocked(own[module], low_rank, plans):
                    return call(own[run], inputs)
            except SharedState:  # a recurrent layer's state, say, whose forward pass alone can be split
                facts.shares_state = True
        outputs, start = [], 0
        compared: set[str] = set()
        for expert, count in groups:
            part = inputs if len(groups) == 1 else select(inputs, slice(start, start + count))
            start += count
            if cache is not None and own.is_replica and isinstance(expert, PackedExpert):
                places = places_of(own[module], expert.shapes, own.plans)
                if (changed := cache.changed(expert, places, compared)) is not None:
                    with bind(places, changed):
                        outputs.append(call(own[run], part))
                    continue
            outputs.append(_run_one(own, run, module, part, expert, facts, call))
    return outputs[0] if len(groups) == 1 else join(outputs)


def kind_in(expert: AnyExpert) -> type:
    """The class of an expert, packed or not."""
    return expert.kind if isinstance(expert, PackedExpert) else type(expert)


def _check_whole(module: nn.Module) -> None:
    """Raise a ValueError if a process has only a shard of the weights, to which an expert cannot be added."""
    for name, part in module.named_modules():
        if any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(part).__mro__):
            where = f"at {name!r}" if name else "as a whole"
            raise ValueError(
                f"the backbone is sharded (FSDP, {where}), and experts can only be added to whole weights; use a model "
                "that every process holds completely, as under DDP"
            )


class _Facts:
    """What earlier passes have found out about a module."""

    def __init__(self) -> None:
        self.checks: BatchChecks = {}
        self.by_parents: frozenset[str] = frozenset()  # layers whose tensors are used by their parent modules
        self.shares_state = False  # whether generation passes a state of the whole batch to a layer that experts change


_facts: WeakKeyDictionary[nn.Module, _Facts] = WeakKeyDictionary()


def _run_one(
    own: Workspace,
    run: nn.Module,
    module: nn.Module,
    inputs: Inputs,
    expert: Expert | PackedExpert | Mixture | None,
    facts: _Facts,
    call: Callable[[nn.Module, Inputs], Tensor],
) -> Tensor:
    """Run a module on a batch with one expert for all samples."""
    if expert is None:
        return call(own[run], inputs)
    expert = expert.unpacked() if isinstance(expert, PackedExpert) else expert
    if not own.is_replica and isinstance(expert, SparseExpert):
        with attached(module, expert):
            return call(run, inputs)
    overflows, plans = Overflows(), own.plans if own.is_replica else None

    def added(name: str, weight: Tensor) -> Tensor:
        return overflows.watch(expert, name, weight, expert.added(name, weight))

    while True:
        by_parents = facts.by_parents
        try:
            with substituted_unlocked(own[module], expert.shapes, added, by_parents, plans):
                outputs = call(own[run], inputs)
            overflows.check()
            return outputs
        except UnusedLayers as error:  # try again, with their tensors exchanged while the parents run
            if by_parents.issuperset(error.layers):
                raise
            facts.by_parents |= frozenset(error.layers)
