"""Switching experts in and out of a model's weights without drift.

Adding an expert and subtracting it again would leave rounding errors behind, in bf16 visibly so. `ExpertSwitch` keeps a
copy of what it overwrites instead (of a sparse expert's entries, of other experts' tensors), and puts it back bit for
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from freemerge.experts.base import Expert, check_fits
from freemerge.experts.kinds.sparse import SparseExpert
from freemerge.experts.running.locks import exclusive
from freemerge.experts.tied import names_of_changes


class ExpertSwitch:
    """Attaches one expert at a time to a set of weights, in place.

    Args:
        weights: tensor name → the live tensor to write to (a module's state dict, say); contiguous. Tied weights, the
            same memory under several names, change once.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {name: tensor.detach() for name, tensor in weights.items()}
        self._saved: dict[str, tuple[Tensor | None, Tensor]] = {}  # name → (indices or all, the merged entries there)

    @property
    def attached(self) -> bool:
        """Whether an expert is switched in."""
        return bool(self._saved)

    @torch.no_grad()
    def attach(self, expert: Expert) -> None:
        """Switch `expert` in, instead of the one that is attached, if any.

        The sum is formed in float32 and rounded to the weights' dtype once.

        Raises:
            ValueError: if the expert names a tensor that is missing here or has another shape; nothing is changed then.
            OverflowError: if a changed weight is too large for the weights' dtype; no expert is attached then.
        """
        check_fits(expert, self._weights)
        self.detach()
        try:
            for name in dict.fromkeys(names_of_changes(self._weights, expert.shapes).values()):
                weight = self._weights[name]
                index = expert.indices[name].to(weight.device) if isinstance(expert, SparseExpert) else None
                changed = expert.added(name, weight)
                check_finite(expert, name, weight, changed)
                self._saved[name] = (index, weight.clone() if index is None else weight.reshape(-1)[index])
                weight.copy_(changed)
        except OverflowError:
            self.detach()
            raise
        clear_cast_cache()

    @torch.no_grad()
    def detach(self) -> None:
        """Restore the merged weights bit for bit; a no-op if nothing is attached."""
        for name, (index, saved) in self._saved.items():
            weight = self._weights[name]
            if index is None:
                weight.copy_(saved)
            else:
                weight.view(-1)[index] = saved
        self._saved = {}
        clear_cast_cache()


def clear_cast_cache() -> None:
    """To be called after weights were written to: under autocast torch keeps narrower copies of them."""
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


@torch.no_grad()
def write_into(weights: Mapping[str, Tensor], expert: Expert) -> None:
    """Add an expert to weights for good, in place.

    Raises:
        OverflowError: if a changed weight is too large for the weights' dtype.
    """
    for name in dict.fromkeys(names_of_changes(weights, expert.shapes).values()):
        changed = expert.added(name, weights[name])
        check_finite(expert, name, weights[name], changed)
        weights[name].copy_(changed)


def check_finite(expert: Expert, name: str, weight: Tensor, changed: Tensor) -> None:
    """Raise an OverflowError if a float16 weight has become infinite."""
    if weight.dtype == torch.float16 and bool((changed.isinf() & weight.isfinite()).any()):
        raise overflow_error(expert, name)


class Overflows:
    """Which float16 weights experts have made infinite; found out on the device, so that a GPU is waited for once."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, str, Tensor]] = []

    def watch(self, expert: Any, name: str, weight: Tensor, changed: Tensor) -> Tensor:
        """Returns the changed tensor."""
        if weight.dtype == torch.float16:
            self._found.append((expert, name, (changed.isinf() & weight.isfinite()).any()))
        return changed

    def check(self) -> None:
        """Raise an OverflowError for the first."""
        found = torch.stack([flag for _, _, flag in self._found]).tolist() if self._found else []
        if any(found):
            raise overflow_error(*self._found[found.index(True)][:2])


def overflow_error(expert: Any, name: str) -> OverflowError:
    """The error for an expert that makes a tensor infinite."""
    return OverflowError(
        f"the expert of task {expert.metadata.get('task', '?')!r} makes tensor {name!r} larger than float16 can hold; "
        "run the model in bfloat16 or float32"
    )


@contextmanager
def attached(module: nn.Module, expert: Expert) -> Iterator[nn.Module]:
    """Run a block with `expert` switched into `module`'s weights; they are restored afterwards, whatever happens.

    Other threads wait with what exchanges weights or layers of this module until the block ends.
    """
    with exclusive(module):
        switch = ExpertSwitch(module.state_dict())
        try:
            switch.attach(expert)
            yield module
        finally:
            switch.detach()
