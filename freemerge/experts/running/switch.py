"""Switching experts in and out of a model's weights without drift.

Adding an expert and subtracting it again would leave rounding errors behind, in bf16 visibly so. `ExpertSwitch` keeps a
copy of what it overwrites instead (of a sparse expert's entries, of other experts' tensors), and puts it back bit for
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
        """
        check_fits(expert, self._weights)
        self.detach()
        sparse = isinstance(expert, SparseExpert)
        for name in dict.fromkeys(names_of_changes(self._weights, expert.shapes).values()):
            weight = self._weights[name]
            index = expert.indices[name].to(weight.device) if sparse else None
            changed = expert.added(name, weight)
            self._saved[name] = (index, weight.reshape(-1)[index] if sparse else weight.clone())
            weight.copy_(changed)
        forget_casts()

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
        forget_casts()


def forget_casts() -> None:
    """To be called after weights were written to: under autocast torch keeps narrower copies of them."""
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


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
