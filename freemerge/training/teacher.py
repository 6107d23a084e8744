"""The teacher of an expert: the task's fine-tuned model, as a function from inputs to features.

It has the student's architecture, so its weights are all it needs. They stay outside every module tree: in no
checkpoint, no parameter count, wrapped by no strategy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from freemerge.experts import exclusive
from freemerge.inputs import Inputs, batch_size, named, select
from freemerge.models import Backbone


class Teacher:
    """Runs a backbone with the fine-tuned weights, and caches the features if asked to.

    Args:
        weights: of the fine-tuned backbone, named as in `backbone.weights()`; any float dtype. Narrower ones than the
            backbone's are widened for a pass.
        cache: keep the features of every input seen. Inputs are known by a fingerprint of their content, so that
            shuffled data are found again; for data that are augmented it would only grow.
    """

    def __init__(self, weights: Mapping[str, Tensor], cache: bool = False) -> None:
        self.weights = {name: tensor.detach() for name, tensor in weights.items()}
        self.cache = cache
        self._seen: dict[tuple[int, int], Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move the weights, in place."""
        self.weights = {name: tensor.to(device) for name, tensor in self.weights.items()}

    def seen(self) -> dict[str, Tensor]:
        """The features that are kept: `keys` (N, 2) int64, `features` (N, F)."""
        if not self._seen:
            return {}
        features = torch.stack(list(self._seen.values()))
        return {"keys": torch.tensor(list(self._seen)), "features": features}

    def load_seen(self, seen: Mapping[str, Tensor], device: torch.device) -> None:
        """Cache the features of `seen`; batches of other samples would differ in the last bits."""
        if seen:
            keys = map(tuple, seen["keys"].tolist())
            self._seen = dict(zip(keys, seen["features"].to(device), strict=True))

    @torch.no_grad()
    def __call__(self, backbone: Backbone, inputs: Inputs) -> Tensor:
        """Features (B, F) of a batch."""
        if not self.cache:
            return self._run(backbone, inputs)
        keys = list(map(tuple, fingerprints(inputs).tolist()))
        new = [index for index, key in enumerate(keys) if key not in self._seen]
        if new:
            part = inputs if len(new) == batch_size(inputs) else select(inputs, torch.tensor(new))
            for index, features in zip(new, self._run(backbone, part), strict=True):
                self._seen[keys[index]] = features.clone()
        return torch.stack([self._seen[key] for key in keys])

    def _run(self, backbone: Backbone, inputs: Inputs) -> Tensor:
        own = backbone.model.state_dict()
        weights = {f"model.{name}": tensor.to(own[name].dtype) for name, tensor in self.weights.items()}
        with exclusive(backbone.model):
            return functional_call(backbone, weights, (inputs,))


def fingerprints(inputs: Inputs) -> Tensor:
    """128 bits for the content of each sample: (B, 2) int64.

    Sums of the elements' bits times pseudo-random odd numbers, which wrap around exactly, so that order, device and
    neighbours in the batch make no difference; nor do zeros that tokens are padded with on the right.
    """
    tensors = {"": inputs} if isinstance(inputs, Tensor) else named(inputs)
    total: Tensor | None = None
    for salt, name in enumerate(sorted(tensors)):
        flat = tensors[name].detach().flatten(1).contiguous()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        numbers = (flat.view(bits) if flat.dtype != torch.bool else flat).long()
        position = torch.arange(numbers.shape[1], device=flat.device) + (salt << 40)
        part = torch.stack([(numbers * _scrambled(position, seed)).sum(dim=1) for seed in (1, 2)], dim=1)
        total = part if total is None else total + part
    assert total is not None  # a batch has at least one tensor
    return total


def _scrambled(position: Tensor, seed: int) -> Tensor:
    """Odd pseudo-random int64 for each position (splitmix64)."""
    z = position * -7046029254386353131 + seed * 7809847782465536322
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)) | 1
