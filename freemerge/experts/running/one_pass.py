"""One pass over a batch whose samples have low-rank experts of their own.

(W + U·V)·x is W·x + U·(V·x). A linear layer runs on the whole batch with its weight as it is, and each group of samples
gets its two thin products on top. Other layers that experts change (norms, embeddings) are small; they run group by
group with changed tensors, as a linear layer does where one expert's many rows make these less work than the products.
No weight is ever written to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freemerge.experts.kinds.low_rank import LowRankExpert, matrix_shape
from freemerge.experts.packed import PackedExpert
from freemerge.experts.running.layerwise import exchange
from freemerge.experts.running.locks import exclusive
from freemerge.experts.running.switch import Overflows
from freemerge.experts.tied import layers_that_change
from freemerge.inputs import Inputs, batch_size, device_of, select

_SMALL = 1 << 18  # values, 1 MiB in float32

Groups = Sequence[tuple[LowRankExpert | PackedExpert | None, int]]
"""An expert, or None for the weights as they are, and how many samples have it; they lie in this order."""


@contextmanager
def in_one_pass(module: nn.Module, groups: Groups) -> Iterator[None]:
    """For the duration of a block, `module` computes with an expert for each group of samples.

    Args:
        module: the module, for which `fits_one_pass`.
        groups: low-rank experts, packed or not, and numbers of samples that add up to the batch.
    """
    with exclusive(module), in_one_pass_unlocked(module, groups):
        yield


@contextmanager
def in_one_pass_unlocked(module: nn.Module, groups: Groups, plans: dict[Any, Any] | None = None) -> Iterator[None]:
    """`in_one_pass` in a module that is the caller's alone; `plans` are a twin's, kept for the next time."""
    with ExitStack() as stack:
        changes = [
            (None if expert is None else _Changes.of(module, _unpacked_if_small(expert), plans), count)
            for expert, count in groups
        ]
        linear, others = _planned_owners(module, [change for change, _ in changes], plans)
        for owner, names in (linear | others).items():
            layer = _Layer(module, owner, names, changes)
            run = layer.run_linear if owner in linear else layer.run_by_groups
            stack.enter_context(_instead_of_forward(layer.body, run))
        yield
    for change, _ in changes:
        if change is not None:
            change.overflows.check()


@torch.no_grad()
def fits_one_pass(module: nn.Module, run: Callable[[Inputs], Any], groups: Groups, inputs: Inputs) -> bool:
    """Whether every layer that the experts change sees samples in its first dimension.

    The module is run with 2 samples and with 3. If an output has 2 rows for 2 samples and 3 for 3, its first dimension
    is the batch; if it has one row both times, all samples share it. The answer is cached.

    Args:
        module: the module.
        run: runs it on a batch.
        groups: the experts.
        inputs: a batch to try with.
    """
    with exclusive(module):
        return fits_one_pass_unlocked(module, run, groups, inputs, _known.setdefault(module, {}))


BatchChecks = dict[tuple[frozenset[str], frozenset[str]], bool]
"""Linear layers and others that experts change → whether these see samples in their first dimension."""


@torch.no_grad()
def fits_one_pass_unlocked(
    module: nn.Module,
    run: Callable[[Inputs], Any],
    groups: Groups,
    inputs: Inputs,
    known: BatchChecks,
    plans: dict[Any, Any] | None = None,
) -> bool:
    """`fits_one_pass` in a module that is the caller's alone.

    `known` has the answers so far; `plans` are a twin's, kept for the next time.
    """
    changes = [None if expert is None else _Changes.of(module, expert, plans) for expert, _ in groups]
    linear, others = _planned_owners(module, changes, plans)
    key = (frozenset(linear), frozenset(others))
    if key not in known:
        owners = linear.keys() | others.keys()
        two, three = (_rows(module, run, owners, inputs, count) for count in (2, 3))
        known[key] = two.keys() == three.keys() == owners and all(
            _follows(two[owner], three[owner], shared=owner in others) for owner in owners
        )
    return known[key]


_known: WeakKeyDictionary[nn.Module, BatchChecks] = WeakKeyDictionary()


def _follows(two: list[int], three: list[int], shared: bool) -> bool:
    """Whether rows are as many as samples, or, if that is allowed, one for all."""
    allowed = {(2, 3), (1, 1)} if shared else {(2, 3)}
    return len(two) == len(three) and allowed.issuperset(zip(two, three, strict=True))


class _Layer:
    """One layer that experts change.

    Args:
        module: the module that it is in.
        owner: its name there.
        names: its tensors, and those of layers in it, that are changed.
        groups: what is changed for how many samples.
    """

    def __init__(
        self, module: nn.Module, owner: str, names: Sequence[str], groups: Sequence[tuple[_Changes | None, int]]
    ) -> None:
        self.module, self.names, self.groups = module, names, groups
        self.body = module.get_submodule(owner)
        self.forward = self.body.forward
        self.weight, self.bias = f"{owner}.weight", f"{owner}.bias"
        self.size = sum(count for _, count in groups)

    def run_by_groups(self, *args, **kwargs) -> Tensor:
        """What the layer makes of each group with changed tensors, (B, …)."""
        outputs, start = [], 0
        for changes, count in self.groups:
            part = slice(start, start + count)
            start += count
            given = [self._cut(value, part) for value in args]
            named = {name: self._cut(value, part) for name, value in kwargs.items()}
            with _changed(self.module, self.names, changes):
                output = self.forward(*given, **named)
            outputs.append(output if len(output) == count else output.expand(count, *output.shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def run_linear(self, inputs: Tensor) -> Tensor:
        """(B, …, I) → (B, …, O), in the way that is less work."""
        assert isinstance(self.body, nn.Linear)  # see `_owners`
        rows = inputs.numel() // inputs.shape[-1]
        if len(self.groups) == 1 and rows * sum(self.body.weight.shape) > self.body.weight.numel():
            return self.run_by_groups(inputs)
        output, start = self.forward(inputs).contiguous(), 0
        for changes, count in self.groups:
            own, part = (x[start : start + count].flatten(0, -2) for x in (inputs, output))  # (n, I), (n, O)
            start += count
            if changes is not None and self.weight in changes.names:
                left, right = (factor.to(output.dtype) for factor in changes.factors(self.weight))
                part.addmm_(own.to(output.dtype) @ right.mT, left.mT)  # in the place of the layer's own
            if changes is not None and self.bias in changes.names:
                part += changes.whole(self.bias)
        return output

    def _cut(self, value: Any, part: slice) -> Any:
        return value[part] if isinstance(value, Tensor) and value.dim() and len(value) == self.size else value


@contextmanager
def _instead_of_forward(body: nn.Module, run: Callable[..., Tensor]) -> Iterator[None]:
    own = vars(body).get("forward")  # of this very object
    body.forward = run
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


@contextmanager
def _changed(module: nn.Module, names: Sequence[str], changes: _Changes | None) -> Iterator[None]:
    kept: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name in names:
            if changes is not None and name in changes.names:
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                home: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                kept.append((owner, leaf, exchange(owner, leaf, changes.added(name, home[leaf]))))
        yield
    finally:
        for owner, leaf, own in kept:
            exchange(owner, leaf, own)


def _planned_owners(
    module: nn.Module, changes: Sequence[_Changes | None], plans: dict[Any, Any] | None
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """`_owners`, looked up where the plans have it."""
    key = ("owners", *(None if change is None else change.signature for change in changes))
    if plans is not None and key in plans:
        return plans[key]
    found = _owners(module, [change for change in changes if change is not None])
    if plans is not None:
        plans[key] = found
    return found


def _owners(module: nn.Module, changes: Sequence[_Changes]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The layers that experts change with the tensors in them that are changed: linear ones, and others.

    What lies within one of the others runs with it, and is not listed by itself.
    """
    owned: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for change in changes for name in change.names):
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    whole = {name for change in changes for name in change.names if change.is_whole(name)}

    def adds_products(owner: str, name: str) -> bool:
        return name == f"{owner}.bias" or (name == f"{owner}.weight" and name not in whole)

    linear = {
        owner
        for owner, names in owned.items()
        if isinstance(module.get_submodule(owner), nn.Linear) and all(adds_products(owner, name) for name in names)
    }
    others = {owner: list(names) for owner, names in owned.items() if owner not in linear}
    outermost = {owner: names for owner, names in others.items() if not _within(owner, others)}
    for owner, names in owned.items():
        if around := _within(owner, outermost):
            outermost[around[0]].extend(names)
    alone = {owner: owned[owner] for owner in owned if owner in linear and not _within(owner, outermost)}
    return alone, outermost


def _within(owner: str, others: dict[str, list[str]]) -> list[str]:
    """Those of the others that a layer lies in."""
    return [other for other in others if other != owner and (not other or owner.startswith(f"{other}."))]


def _unpacked_if_small(expert: LowRankExpert | PackedExpert) -> LowRankExpert | PackedExpert:
    """A small expert as a whole; of a large one, each tensor is unpacked when its layer runs, and forgotten."""
    if isinstance(expert, PackedExpert) and len(expert.codes) <= _SMALL:
        whole = expert.unpacked()
        assert isinstance(whole, LowRankExpert)  # others do not run side by side
        return whole
    return expert


class _Changes:
    """What an expert changes, by the module's names: tied weights under each of theirs.

    Args:
        expert: the expert.
        names: the module's name of a tensor → the expert's.
    """

    def __init__(self, expert: LowRankExpert | PackedExpert, names: Mapping[str, str]) -> None:
        self.expert, self.names, self.overflows = expert, names, Overflows()

    @classmethod
    def of(
        cls, module: nn.Module, expert: LowRankExpert | PackedExpert, plans: dict[Any, Any] | None = None
    ) -> _Changes:
        key = ("names", tuple(expert.shapes))
        names = None if plans is None else plans.get(key)
        if names is None:
            names = layers_that_change(module, expert.shapes)
            if plans is not None:
                plans[key] = names
        return cls(expert, names)

    @property
    def signature(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """Which tensors are changed, and which of them without factors."""
        own = self.expert.sizes if isinstance(self.expert, PackedExpert) else self.expert.whole
        return tuple(self.names), frozenset(own).intersection(self.names.values())

    def is_whole(self, name: str) -> bool:
        """Whether a tensor is changed without factors."""
        own = self.expert.sizes if isinstance(self.expert, PackedExpert) else self.expert.whole
        return self.names[name] in own

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """U (O, r) and V (r, I) of a weight."""
        own, expert = self.names[name], self._one(name)
        return expert.left[own], expert.right[own]

    def whole(self, name: str) -> Tensor:
        """What is added to a tensor that is changed without factors."""
        return self._one(name).whole[self.names[name]]

    def added(self, name: str, weight: Tensor) -> Tensor:
        """A tensor with its change."""
        changed = self._one(name).added(self.names[name], weight)
        return self.overflows.watch(self.expert, self.names[name], weight, changed)

    def _one(self, name: str) -> LowRankExpert:
        """The expert as far as it concerns one tensor, unpacked now."""
        expert, own = self.expert, self.names[name]
        if isinstance(expert, LowRankExpert):
            return expert
        shape = expert.shapes[own]
        if own in expert.sizes:
            return LowRankExpert({}, {}, {own: expert.part(own).view(shape)}, {own: shape})
        rows, columns = matrix_shape(shape)
        left, right = (expert.part(f"{own}:{side}") for side in ("left", "right"))
        return LowRankExpert({own: left.view(rows, -1)}, {own: right.view(-1, columns)}, {}, {own: shape})


def _rows(
    module: nn.Module, run: Callable[[Inputs], Any], owners: Collection[str], inputs: Inputs, count: int
) -> dict[str, list[int]]:
    """The rows of all that goes into layers and comes out when so many samples are run; −1 for what has none."""
    seen: dict[str, list[int]] = {}

    def watch(owner: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            for value in (*args, *kwargs.values(), output):
                if isinstance(value, Tensor) and value.dim():
                    seen.setdefault(owner, []).append(len(value))
                elif not isinstance(value, (Tensor, int, float, str, NoneType)):
                    seen.setdefault(owner, []).append(-1)

        return hook

    index = torch.arange(count, device=device_of(inputs)) % batch_size(inputs)
    hooks = [module.get_submodule(owner).register_forward_hook(watch(owner), with_kwargs=True) for owner in owners]
    try:
        run(select(inputs, index))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
