"""Switching experts in and out of a model's weights without drift.

Adding an expert and subtracting it again would leave rounding errors behind, in bf16 visibly so. `ExpertSwitch` keeps a
copy of the entries it overwrites instead (as many as the expert has values), and puts them back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from freemerge.experts.sparse import SparseExpert


class ExpertSwitch:
    """Attaches one expert at a time to a set of weights, in place.

    Args:
        weights: tensor name → the live tensor to write to (a module's state dict, say); contiguous.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {name: tensor.detach() for name, tensor in weights.items()}
        self._saved: dict[str, tuple[Tensor, Tensor]] = {}  # name → (indices, the merged entries found there)

    @property
    def attached(self) -> bool:
        """Whether an expert is switched in."""
        return bool(self._saved)

    @torch.no_grad()
    def attach(self, expert: SparseExpert) -> None:
        """Switch `expert` in, instead of the one that is attached, if any.

        The sum is formed in float32 and rounded to the weights' dtype once.

        Raises:
            ValueError: if the expert names a tensor that is missing here or has another shape; nothing is changed then.
        """
        check_fits(expert, self._weights)
        self.detach()
        for name, value in expert.values.items():
            flat = self._weights[name].view(-1)
            index = expert.indices[name].to(flat.device)
            saved = flat[index]
            self._saved[name] = (index, saved)
            flat[index] = (saved.float() + value.to(flat.device)).to(flat.dtype)

    @torch.no_grad()
    def detach(self) -> None:
        """Restore the merged weights bit for bit; a no-op if nothing is attached."""
        for name, (index, saved) in self._saved.items():
            self._weights[name].view(-1)[index] = saved
        self._saved = {}


@contextmanager
def attached(module: nn.Module, expert: SparseExpert) -> Iterator[nn.Module]:
    """Run a block with `expert` switched into `module`'s weights; they are restored afterwards, whatever happens."""
    switch = ExpertSwitch(module.state_dict())
    switch.attach(expert)
    try:
        yield module
    finally:
        switch.detach()


def check_fits(expert: SparseExpert, weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first tensor of `expert` that `weights` lacks or has in another shape."""
    for name, shape in expert.shapes.items():
        if name not in weights:
            raise ValueError(f"expert of task {expert.metadata.get('task', '?')!r}: the model has no tensor {name!r}")
        if tuple(weights[name].shape) != tuple(shape):
            raise ValueError(
                f"expert of task {expert.metadata.get('task', '?')!r}: tensor {name!r} has shape "
                f"{tuple(weights[name].shape)} in the model, the expert was made for {tuple(shape)}"
            )
