"""One pass over a batch in which each group of samples has its own low-rank expert.

(W + U·V)·x = W·x + U·(V·x): a linear layer runs on the whole batch with its unchanged weight, and each group adds its
two small products. Other layers that experts change (norms, embeddings) are small and run group by group with changed
tensors; so does a linear layer if one expert has so many rows that a changed weight is cheaper than the products. No
weight is ever written to. PEFT's mixed batches (`adapter_names`) do the same for LoRA layers, but need every expert
unpacked and the model wrapped, which is why this is our own.
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

_SMALL = 1 << 18  # values: 1 MiB in float32
_SPLIT = (Tensor, int, float, str, NoneType)
"""What a layer's arguments may be if it runs group by group."""

Groups = Sequence[tuple[LowRankExpert | PackedExpert | None, int]]
"""An expert, or None for the unchanged weights, and its number of samples, in the order of the batch."""


@contextmanager
def in_one_pass(module: nn.Module, groups: Groups) -> Iterator[None]:
    """Let a module compute with one expert per group of samples for the duration of a block.

    Args:
        module: the module, for which `fits_one_pass` is true.
        groups: low-rank experts, packed or not, and numbers of samples, which sum to the batch size.

    Raises:
        OverflowError: at the end of the block, if a changed weight is too large for float16.
    """
    with exclusive(module), in_one_pass_unlocked(module, groups):
        yield


@contextmanager
def in_one_pass_unlocked(module: nn.Module, groups: Groups, plans: dict[Any, Any] | None = None) -> Iterator[None]:
    """`in_one_pass` without its lock, for modules to which the caller has exclusive access.

    Args:
        module: the module.
        groups: see `in_one_pass`.
        plans: the replica's `plans`, in which results are stored for later calls; None if the module is no replica.

    Raises:
        OverflowError: see `in_one_pass`.
    """
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
    """Whether the batch is the first dimension in every layer that the experts change.

    The module is run with 2 samples and with 3. If an output has 2 rows for 2 samples and 3 for 3, its first dimension
    is the batch; if it has one row both times, all samples share it. The result is cached.

    Args:
        module: the module.
        run: runs the module on a batch.
        groups: the experts.
        inputs: a batch (B, …) to run on.
    """
    with exclusive(module):
        return fits_one_pass_unlocked(module, run, groups, inputs, _known.setdefault(module, {}))


BatchChecks = dict[tuple[frozenset[str], frozenset[str]], bool]
"""Names of the linear and of the other layers that experts change → whether the batch is their first dimension."""


@torch.no_grad()
def fits_one_pass_unlocked(
    module: nn.Module,
    run: Callable[[Inputs], Any],
    groups: Groups,
    inputs: Inputs,
    known: BatchChecks,
    plans: dict[Any, Any] | None = None,
) -> bool:
    """`fits_one_pass` without its lock, for modules to which the caller has exclusive access.

    Args:
        module: the module.
        run: see `fits_one_pass`.
        groups: see `fits_one_pass`.
        inputs: see `fits_one_pass`.
        known: cached results of the module, to which the result is added.
        plans: the replica's `plans`, in which results are stored for later calls; None if the module is no replica.
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
    """Whether the numbers of rows equal the numbers of samples, or 1 if `shared` rows are allowed."""
    allowed = {(2, 3), (1, 1)} if shared else {(2, 3)}
    return len(two) == len(three) and allowed.issuperset(zip(two, three, strict=True))


class SharedState(RuntimeError):
    """A layer that runs group by group was given an object that cannot be split, such as a cache of earlier tokens."""


class _Layer:
    """Runs one layer that experts change.

    Args:
        module: the module that contains the layer.
        owner: the layer's name.
        names: names of its tensors, and of its inner layers' tensors, that are changed.
        groups: changes and their numbers of samples.
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
        """Run the layer group by group with changed tensors; returns its outputs (B, …)."""
        values = (*args, *kwargs.values())
        if len(self.groups) > 1 and not all(isinstance(value, _SPLIT) for value in values):
            raise SharedState
        outputs, start = [], 0
        times = next((times for value in values if (times := self._times(value))), 1)
        for changes, samples in self.groups:
            count = samples * times
            part = slice(start, start + count)
            start += count
            given = [self._cut(value, part, times) for value in args]
            named = {name: self._cut(value, part, times) for name, value in kwargs.items()}
            with _changed(self.module, self.names, changes):
                output = self.forward(*given, **named)
            outputs.append(output if len(output) == count else output.expand(count, *output.shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def run_linear(self, inputs: Tensor) -> Tensor:
        """Run a linear layer, (B, …, I) → (B, …, O), by whichever method needs fewer operations."""
        assert isinstance(self.body, nn.Linear)  # see `_owners`
        rows = inputs.numel() // inputs.shape[-1]
        if len(self.groups) == 1 and rows * sum(self.body.weight.shape) > self.body.weight.numel():
            return self.run_by_groups(inputs)
        output, start, times = self.forward(inputs).contiguous(), 0, self._times(inputs) or 1
        for changes, samples in self.groups:
            count = samples * times
            own, part = (x[start : start + count].flatten(0, -2) for x in (inputs, output))  # (n, I), (n, O)
            start += count
            if changes is not None and self.weight in changes.names:
                left, right = (factor.to(output.dtype) for factor in changes.factors(self.weight))
                part.addmm_(own.to(output.dtype) @ right.mT, left.mT)  # in place
            if changes is not None and self.bias in changes.names:
                part += changes.whole(self.bias)
        return output

    def _times(self, value: Any) -> int:
        """The rows per sample of an argument: 1, several in a beam search, 0 if its rows are not the samples."""
        rows = len(value) if isinstance(value, Tensor) and value.dim() else 0
        return 0 if rows % self.size else rows // self.size

    def _cut(self, value: Any, part: slice, times: int) -> Any:
        """The rows of one group, of arguments that have `times` rows per sample."""
        return value[part] if self._times(value) == times else value


@contextmanager
def _instead_of_forward(body: nn.Module, run: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's `forward` for the duration of a block."""
    own = vars(body).get("forward")  # the instance's own, if it has one
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
    """Replace the named tensors of a module by changed ones for the duration of a block."""
    originals: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name in names:
            if changes is not None and name in changes.names:
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                home: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                originals.append((owner, leaf, exchange(owner, leaf, changes.added(name, home[leaf]))))
        yield
    finally:
        for owner, leaf, own in originals:
            exchange(owner, leaf, own)


def _planned_owners(
    module: nn.Module, changes: Sequence[_Changes | None], plans: dict[Any, Any] | None
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """`_owners`, cached in the plans."""
    key = ("owners", *(None if change is None else change.signature for change in changes))
    if plans is not None and key in plans:
        return plans[key]
    found = _owners(module, [change for change in changes if change is not None])
    if plans is not None:
        plans[key] = found
    return found


def _owners(module: nn.Module, changes: Sequence[_Changes]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Layer name → names of its changed tensors, for linear layers and for others.

    A layer inside one of the others runs as a part of it and is not listed separately.
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
        if enclosing := _within(owner, outermost):
            outermost[enclosing[0]].extend(names)
    alone = {owner: owned[owner] for owner in owned if owner in linear and not _within(owner, outermost)}
    return alone, outermost


def _within(owner: str, others: dict[str, list[str]]) -> list[str]:
    """Names of the other layers that contain a layer."""
    return [other for other in others if other != owner and (not other or owner.startswith(f"{other}."))]


def _unpacked_if_small(expert: LowRankExpert | PackedExpert) -> LowRankExpert | PackedExpert:
    """Unpack a small expert as a whole; a large one is unpacked tensor by tensor while its layers run."""
    if isinstance(expert, PackedExpert) and len(expert.codes) <= _SMALL:
        whole = expert.unpacked()
        assert isinstance(whole, LowRankExpert)  # other kinds do not run in one pass
        return whole
    return expert


class _Changes:
    """An expert's changes by the module's tensor names; tied weights have several.

    Args:
        expert: the expert.
        names: the module's name of a tensor → the expert's name.
    """

    def __init__(self, expert: LowRankExpert | PackedExpert, names: Mapping[str, str]) -> None:
        self.expert, self.names, self.overflows = expert, names, Overflows()

    @classmethod
    def of(
        cls, module: nn.Module, expert: LowRankExpert | PackedExpert, plans: dict[Any, Any] | None = None
    ) -> _Changes:
        """An expert's changes of a module; names are cached in the plans."""
        key = ("names", tuple(expert.shapes))
        names = None if plans is None else plans.get(key)
        if names is None:
            names = layers_that_change(module, expert.shapes)
            if plans is not None:
                plans[key] = names
        return cls(expert, names)

    @property
    def signature(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """The names of the changed tensors, and of those that are changed without factors."""
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
        """What is added to a tensor that is changed without factors, (*shape) float32."""
        return self._one(name).whole[self.names[name]]

    def added(self, name: str, weight: Tensor) -> Tensor:
        """The changed tensor, (*shape) in the dtype of `weight`."""
        changed = self._one(name).added(self.names[name], weight)
        return self.overflows.watch(self.expert, self.names[name], weight, changed)

    def _one(self, name: str) -> LowRankExpert:
        """An expert with the changes of one tensor at least, unpacked."""
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
    """Layer name → number of rows of each input and output in a pass with `count` samples; −1 for non-tensors."""
    seen: dict[str, list[int]] = {}

    def watch(owner: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            for value in (*args, *kwargs.values(), output):
                if isinstance(value, Tensor) and value.dim():
                    seen.setdefault(owner, []).append(len(value))
                elif not isinstance(value, _SPLIT):
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
