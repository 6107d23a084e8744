"""A module's weights in one buffer, into which sparse experts are switched with a handful of operations.

The module's own tensors become views of the buffer, so an expert is one gather and one scatter, however many tensors it
changes. Attaching saves the entries it overwrites, and detaching puts them back bit for bit: nothing drifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from freemerge.checkpoints import find_tied
from freemerge.experts.base import check_fits
from freemerge.experts.codec import decode_positions
from freemerge.experts.packed import PackedExpert
from freemerge.experts.running.switch import forget_casts
from freemerge.experts.tied import names_of_changes
from freemerge.tensors.differences import working_dtype


class _Target(NamedTuple):
    """Where an expert of P tensors has its values in the buffers."""

    sizes: Tensor  # (P,) values of each tensor
    shifts: Tensor  # (P,) from its own tensors laid end to end to the buffer
    dtype: torch.dtype | None  # of all its tensors; None if they differ or two are one memory, and then:
    wanted: dict[torch.dtype, Tensor]  # (P,) bool, which tensors are in that dtype's buffer


class FlatWeights:
    """A module's floating-point tensors in one buffer per dtype; the module's own become views of it.

    Args:
        module: the module; its parameters stay the same objects.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)
        self._live = _floating(module)
        self._tied = find_tied(self._live)
        self._place: dict[str, tuple[torch.dtype, int]] = {}
        lengths: dict[torch.dtype, int] = {}
        for name, tensor in self._own():
            start = lengths.get(tensor.dtype, 0)
            self._place[name] = (tensor.dtype, start)
            lengths[tensor.dtype] = start + tensor.numel()
        device = next((tensor.device for tensor in self._live.values()), None)
        if device is not None and device.type != "cpu":  # or there would be two of each weight for a moment
            for _, tensor in self._own():
                tensor.data = tensor.data.cpu()
        self.buffers = {dtype: torch.empty(length, dtype=dtype, device=device) for dtype, length in lengths.items()}
        for name, tensor in self._own():
            dtype, start = self._place[name]
            view = self.buffers[dtype][start : start + tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            for alias in [name, *(other for other, first in self._tied.items() if first == name)]:
                self._live[alias].data = view
        self._targets: WeakKeyDictionary[PackedExpert, _Target] = WeakKeyDictionary()
        self._pointers = {name: tensor.data_ptr() for name, tensor in self._live.items()}

    @staticmethod
    def of(module: nn.Module) -> FlatWeights:
        """The module's, laid out anew only if there is none yet or it is not current."""
        if (flat := _laid_out.get(module)) is None or not flat.current:
            _laid_out.pop(module, None)  # or there would be two of each weight for a moment
            flat = _laid_out[module] = FlatWeights(module)
        return flat

    @staticmethod
    def forget(module: nn.Module) -> None:
        """To be called before the module's tensors move, so that the memory where they lay is given back."""
        _laid_out.pop(module, None)

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self._live.items() if name not in self._tied)

    @property
    def current(self) -> bool:
        """Whether the module's tensors are still these views: not after `.to(…)`, for instance."""
        live = _floating(self._module())
        return {name: tensor.data_ptr() for name, tensor in live.items()} == self._pointers and all(
            tensor.dtype == self._live[name].dtype for name, tensor in live.items()
        )

    @contextmanager
    def attached(self, expert: PackedExpert) -> Iterator[None]:
        """Switch a sparse expert in for the duration of a block; the weights come back bit for bit, whatever happens.

        Sums are formed in float32 and rounded to the weights' dtype once.
        """
        saved = self._attach(expert)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, positions, entries in saved:
                    buffer[positions] = entries
                forget_casts()

    @torch.no_grad()
    def _attach(self, expert: PackedExpert) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns what was overwritten: buffers, positions (n,) in them, and the entries (n,) found there."""
        if expert not in self._targets:
            self._targets[expert] = self._target(expert)
        target = self._targets[expert]
        positions = decode_positions(expert.arrays["gaps"])  # (n,) in the expert's own tensors laid end to end

        def spread(each: Tensor) -> Tensor:  # one of each tensor's to one of each value's
            return each.repeat_interleave(target.sizes, output_size=len(positions))  # its size: not to wait for a GPU

        values = expert.codes.float() * spread(expert.scales)
        positions += spread(target.shifts)
        saved = []
        for dtype, buffer in self.buffers.items():
            if target.dtype == dtype:  # nearly always: one dtype, nothing tied
                chosen, added = positions, values
            else:
                mask = spread(target.wanted[dtype])
                chosen, added = positions[mask], values[mask]
            entries = buffer[chosen]
            buffer[chosen] = (entries.to(working_dtype(dtype)) + added).to(dtype)
            saved.append((buffer, chosen, entries))
        forget_casts()
        return saved

    def _target(self, expert: PackedExpert) -> _Target:
        """Raises a ValueError if an expert does not fit."""
        check_fits(expert, self._live)
        changed = set(names_of_changes(self._live, expert.shapes).values())
        shifts, wanted, end = [], [], 0
        for name, shape in expert.shapes.items():
            dtype, start = self._place[self._tied.get(name, name)]
            shifts.append(start - end)
            end += math.prod(shape)
            wanted.append(dtype if name in changed else None)  # of several names for one memory, one
        device = expert.codes.device
        return _Target(
            torch.tensor(list(expert.sizes.values()), device=device),
            torch.tensor(shifts, device=device),
            wanted[0] if len(set(wanted)) == 1 else None,
            {dtype: torch.tensor([found == dtype for found in wanted], device=device) for dtype in self.buffers},
        )


_laid_out: WeakKeyDictionary[nn.Module, FlatWeights] = WeakKeyDictionary()


def _floating(module: nn.Module) -> dict[str, Tensor]:
    """The live floating-point parameters and buffers of the state dict, by name, tied ones under each name."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
