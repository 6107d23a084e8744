"""Add experts to a model's weights and remove them again without accumulating rounding errors.

Adding an expert and subtracting it again would leave rounding errors, which matter in bfloat16. `ExpertSwitch` instead
stores a copy of the values that it overwrites (a sparse expert's entries, other experts' tensors) and restores them bit
for bit.
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
        weights: tensor name → live, contiguous tensor to write to, such as a module's state dict. Tied weights are
            changed once.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {name: tensor.detach() for name, tensor in weights.items()}
        self._saved: dict[str, tuple[Tensor | None, Tensor]] = {}  # name → (indices or None for all, merged values)

    @property
    def attached(self) -> bool:
        """Whether an expert is attached."""
        return bool(self._saved)

    @torch.no_grad()
    def attach(self, expert: Expert) -> None:
        """Attach an expert and detach the previous one, if any.

        The sum is formed in float32 and rounded to the weights' dtype once.

        Args:
            expert: the expert.

        Raises:
            ValueError: if a tensor of the expert is missing or has another shape; then nothing changes.
            OverflowError: if a changed weight is too large for float16; then no expert is attached.
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
        """Restore the merged weights bit for bit; does nothing if no expert is attached."""
        for name, (index, saved) in self._saved.items():
            weight = self._weights[name]
            if index is None:
                weight.copy_(saved)
            else:
                weight.view(-1)[index] = saved
        self._saved = {}
        clear_cast_cache()


def clear_cast_cache() -> None:
    """Discard torch's autocast copies of weights, which are outdated after the weights were written to."""
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


@torch.no_grad()
def write_into(weights: Mapping[str, Tensor], expert: Expert) -> None:
    """Add an expert to weights permanently, in place.

    Args:
        weights: tensor name → live tensor; tied weights are changed once.
        expert: the expert.

    Raises:
        OverflowError: if a changed weight is too large for float16.
    """
    for name in dict.fromkeys(names_of_changes(weights, expert.shapes).values()):
        changed = expert.added(name, weights[name])
        check_finite(expert, name, weights[name], changed)
        weights[name].copy_(changed)


def check_finite(expert: Expert, name: str, weight: Tensor, changed: Tensor) -> None:
    """Raise an OverflowError if an expert makes a float16 weight infinite.

    Args:
        expert: the expert, for the message.
        name: the tensor's name, for the message.
        weight: the weight.
        changed: the changed weight.

    Raises:
        OverflowError: if a finite entry of the weight has become infinite.
    """
    if weight.dtype == torch.float16 and bool((changed.isinf() & weight.isfinite()).any()):
        raise overflow_error(expert, name)


class Overflows:
    """Collects the float16 weights that experts make infinite; the flags stay on the device until `check`."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, str, Tensor]] = []

    def watch(self, expert: Any, name: str, weight: Tensor, changed: Tensor) -> Tensor:
        """Record whether a changed weight overflows.

        Args:
            expert: the expert, packed or not, for the message.
            name: the tensor's name, for the message.
            weight: the weight.
            changed: the changed weight.

        Returns:
            `changed`.
        """
        if weight.dtype == torch.float16:
            self._found.append((expert, name, (changed.isinf() & weight.isfinite()).any()))
        return changed

    def check(self) -> None:
        """Raise an OverflowError for the first overflow; a GPU is synchronised once.

        Raises:
            OverflowError: if a recorded weight overflowed.
        """
        found = torch.stack([flag for _, _, flag in self._found]).tolist() if self._found else []
        if any(found):
            raise overflow_error(*self._found[found.index(True)][:2])


def overflow_error(expert: Any, name: str) -> OverflowError:
    """The error for an expert that makes a tensor infinite.

    Args:
        expert: the expert, packed or not.
        name: the tensor's name.
    """
    return OverflowError(
        f"the expert of task {expert.metadata.get('task', '?')!r} makes tensor {name!r} larger than float16 can hold; "
        "run the model in bfloat16 or float32"
    )


@contextmanager
def attached(module: nn.Module, expert: Expert) -> Iterator[nn.Module]:
    """Run a block with an expert attached to a module's weights, which are always restored afterwards.

    The block has exclusive access: other threads that use the module's experts wait until it ends.

    Args:
        module: the module.
        expert: the expert.

    Raises:
        ValueError: if the expert does not match the module.
        OverflowError: if a changed weight is too large for float16.
    """
    with exclusive(module):
        switch = ExpertSwitch(module.state_dict())
        try:
            switch.attach(expert)
            yield module
        finally:
            switch.detach()
