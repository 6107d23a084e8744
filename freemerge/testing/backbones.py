"""What training, merging and FreeModel rely on in a backbone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from freemerge.errors import CheckpointError
from freemerge.inputs import Inputs, batch_size, select
from freemerge.models import Backbone, load_backbone


def check_backbone(backbone: Backbone, inputs: Inputs, *, trust_remote_code: bool = True) -> None:
    """Check a backbone as training, merging and FreeModel use it.

    It is left as it was, but in evaluation mode.

    Args:
        backbone: the backbone.
        inputs: a batch of at least two samples that differ: a tensor (B, …), or a dict or tuple of inputs.
        trust_remote_code: whether its class may be imported when its folder is loaded.

    Raises:
        AssertionError: the backbone breaks what others rely on; the message says what.
    """
    kind = type(backbone).__name__
    _require(isinstance(backbone, Backbone), f"{kind} is not derived from freemerge.models.Backbone")
    samples = batch_size(inputs)
    _require(samples >= 2, "give a batch of at least two samples")
    weights = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    backbone.eval()
    features = _features(kind, backbone, inputs)
    expected = (samples, backbone.feature_dim)
    _require(
        tuple(features.shape) == expected,
        f"{kind} returns features of shape {tuple(features.shape)}, expected {expected}: samples × feature_dim",
    )
    _require(bool(torch.isfinite(features).all()), f"{kind} returns features that are NaN or infinite")
    _require(bool((features[0] != features[1]).any()), f"{kind} gives two samples the same features; do they differ?")
    again = _features(kind, backbone, inputs)
    _require(torch.equal(features, again), f"{kind} in eval mode is not deterministic, so nothing can be compared")
    for index in range(samples):
        alone = _features(kind, backbone, select(inputs, torch.tensor([index])))
        message = f"{kind}: the features of sample {index} depend on the other samples of its batch"
        _close(message, alone[0], features[index])
    _same(f"{kind} changes its weights when it computes", weights, backbone.weights())
    _check_weights(kind, backbone, inputs, features)
    _check_training(kind, backbone, inputs)
    _check_folder(kind, backbone, inputs, features, trust_remote_code)


def _check_weights(kind: str, backbone: Backbone, inputs: Inputs, features: Tensor) -> None:
    """What is merged is the model's state, and what is loaded is computed with."""
    _require(bool(backbone.weights()), f"{kind}.weights() is empty, so there is nothing to merge")
    other = copy.deepcopy(backbone)
    changed = {
        name: tensor * 1.5 + 0.1 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in other.weights().items()
    }
    other.load_weights(changed)
    _same(f"{kind}.weights() is not what load_weights() was given", changed, other.weights())
    _require(
        not torch.equal(_features(kind, other, inputs), features),
        f"{kind}: other weights give the same features, so what is merged is not what computes",
    )
    other.load_weights({name: tensor.clone() for name, tensor in backbone.weights().items()})
    _require(
        torch.equal(_features(kind, other, inputs), features), f"{kind}: a copy with its weights computes otherwise"
    )


def _check_training(kind: str, backbone: Backbone, inputs: Inputs) -> None:
    trained = copy.deepcopy(backbone).train()
    with torch.enable_grad():
        trained(inputs).float().square().sum().backward()
    grads = [parameter.grad for parameter in trained.parameters() if parameter.requires_grad]
    _require(
        any(grad is not None and bool(grad.any()) for grad in grads),
        f"{kind}: no gradient reaches its parameters; is its forward under no_grad, or everything frozen?",
    )


def _check_folder(kind: str, backbone: Backbone, inputs: Inputs, features: Tensor, trust_remote_code: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        backbone.save_pretrained(folder)
        try:
            loaded = load_backbone(folder, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            raise AssertionError(
                f"{kind} cannot be loaded from its own folder: {error}; let recipe() return the arguments of its "
                "constructor, and let its class be importable"
            ) from error
        _require(type(loaded) is type(backbone), f"{kind} comes back from its folder as a {type(loaded).__name__}")
        loaded.eval()
        _same(f"{kind} comes back from its folder with other weights", backbone.weights(), loaded.weights())
        message = f"{kind} comes back from its folder and computes otherwise"
        _close(message, _features(kind, loaded, inputs), features)


@torch.no_grad()
def _features(kind: str, backbone: Backbone, inputs: Inputs) -> Tensor:
    features = backbone(inputs)
    found = type(features).__name__
    _require(isinstance(features, Tensor), f"{kind} returns a {found}, expected a tensor of features (B, F)")
    return features


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _close(message: str, found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max().clamp_min(1e-6))
    _require(torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * scale), message)


def _same(message: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    _require(expected.keys() == found.keys(), f"{message}: other names")
    for name, tensor in expected.items():
        _require(torch.equal(found[name], tensor), f"{message}, first '{name}'")
