"""The teacher of an expert: the task's fine-tuned model, as a function from inputs to features.

It has the student's architecture, so it only needs weights. They are kept outside the module tree, so that checkpoints,
parameter counts and Lightning's strategies ignore them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from freemerge.experts import exclusive, names_of_changes
from freemerge.inputs import IGNORED, Inputs, batch_size, named, select
from freemerge.models import Backbone, LanguageBackbone


class Teacher:
    """Runs a backbone with the fine-tuned weights, and optionally caches the features.

    Args:
        weights: weights of the fine-tuned backbone, named as in `backbone.weights()`; any float dtype. They are
            converted to the backbone's dtypes for each pass.
        cache: keep the features of all inputs. Inputs are identified by a fingerprint of their content, so that
            shuffled data are recognised; with augmented data, the cache would grow without a hit.
    """

    def __init__(self, weights: Mapping[str, Tensor], cache: bool = False) -> None:
        self.weights = {name: tensor.detach() for name, tensor in weights.items()}
        self.cache = cache
        self._cached: dict[tuple[int, int], Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move the weights.

        Args:
            device: the new device.
        """
        self.weights = {name: tensor.to(device) for name, tensor in self.weights.items()}

    def cached(self) -> dict[str, Tensor]:
        """The cached features.

        Returns:
            `keys`, int64 (N, 2), and `features`, (N, F); of a language model, the states of all samples' tokens, and
            `lengths`, int64 (N,), their numbers. Empty if nothing is cached.
        """
        if not self._cached:
            return {}
        keys, features = torch.tensor(list(self._cached)), list(self._cached.values())
        if features[0].dim() == 1:
            return {"keys": keys, "features": torch.stack(features)}
        return {"keys": keys, "features": torch.cat(features), "lengths": torch.tensor([len(one) for one in features])}

    def load_cached(self, cached: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore cached features. Features computed again in other batches would differ in their last bits.

        Args:
            cached: the result of `cached`.
            device: the device to keep them on.
        """
        if cached:
            keys, features = map(tuple, cached["keys"].tolist()), cached["features"].to(device)
            each = features.split(cached["lengths"].tolist()) if "lengths" in cached else features
            self._cached = dict(zip(keys, each, strict=True))

    @torch.no_grad()
    def __call__(self, backbone: Backbone, inputs: Inputs, positions: Tensor | None = None) -> Tensor:
        """Compute the features of a batch.

        Args:
            backbone: the backbone whose weights are replaced.
            inputs: a batch.
            positions: for a language model, (B, L) bool, the N tokens whose states are its features.

        Returns:
            (B, F), or (N, D) for a language model.
        """
        if positions is not None:
            return self._states(backbone, inputs, positions)
        if not self.cache:
            return self._run(backbone, inputs)
        keys = list(map(tuple, fingerprints(inputs).tolist()))
        new = [index for index, key in enumerate(keys) if key not in self._cached]
        if new:
            part = inputs if len(new) == batch_size(inputs) else select(inputs, torch.tensor(new))
            for index, features in zip(new, self._run(backbone, part), strict=True):
                self._cached[keys[index]] = features.clone()
        return torch.stack([self._cached[key] for key in keys])

    def _states(self, backbone: Backbone, inputs: Inputs, positions: Tensor) -> Tensor:
        """The states (N, D) of a language model at some positions, sample by sample."""
        assert isinstance(backbone, LanguageBackbone)

        def run(part: Inputs, kept: Tensor) -> Tensor:
            with backbone.states_only(kept) as states:
                self._run(backbone, part)
            return states[0]

        if not self.cache:
            return run(inputs, positions)
        keys = list(map(tuple, fingerprints(inputs).tolist()))
        new = torch.tensor([index for index, key in enumerate(keys) if key not in self._cached], dtype=torch.long)
        if len(new):
            kept = positions[new.to(positions.device)]
            found = run(select(inputs, new), kept).split(kept.sum(dim=1).tolist())
            self._cached |= {keys[index]: states.clone() for index, states in zip(new.tolist(), found, strict=True)}
        return torch.cat([self._cached[key] for key in keys])

    def weight(self, backbone: Backbone, name: str) -> Tensor:
        """One tensor of the fine-tuned model, in the backbone's dtype.

        Args:
            backbone: the backbone.
            name: the tensor's name in the backbone's model; the weights may have a tied one's.
        """
        own = backbone.model.state_dict()
        return self.weights[names_of_changes(own, self.weights)[name]].to(own[name].dtype)

    def _run(self, backbone: Backbone, inputs: Inputs) -> Tensor:
        own = backbone.model.state_dict()
        names = set(names_of_changes(own, self.weights).values())  # of tied tensors one, which the others follow
        weights = {f"model.{name}": self.weights[name].to(own[name].dtype) for name in names}
        with exclusive(backbone.model):
            return functional_call(backbone, weights, (inputs,))


def fingerprints(inputs: Inputs) -> Tensor:
    """A 128-bit hash of each sample's content.

    The hash is a sum of the elements' bits times pseudo-random odd numbers. Integer sums wrap around exactly, so the
    hash does not depend on the order of summation, the device or the other samples of the batch, nor on what pads
    tokens and labels on the right. A cryptographic hash would need the inputs on the CPU.

    Args:
        inputs: a batch.

    Returns:
        int64 (B, 2).
    """
    tensors = {"": inputs} if isinstance(inputs, Tensor) else named(inputs)
    total: Tensor | None = None
    for salt, name in enumerate(sorted(tensors)):
        flat = tensors[name].detach().flatten(1).contiguous()
        if name == "labels" and not flat.is_floating_point():
            flat = flat.masked_fill(flat == IGNORED, 0)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        numbers = (flat.view(bits) if flat.dtype != torch.bool else flat).long()
        position = torch.arange(numbers.shape[1], device=flat.device) + (salt << 40)
        part = torch.stack([(numbers * _position_weights(position, seed)).sum(dim=1) for seed in (1, 2)], dim=1)
        total = part if total is None else total + part
    assert total is not None  # a batch has at least one tensor
    return total


def _position_weights(position: Tensor, seed: int) -> Tensor:
    """An odd pseudo-random int64 for each position (splitmix64)."""
    z = position * -7046029254386353131 + seed * 7809847782465536322
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)) | 1
