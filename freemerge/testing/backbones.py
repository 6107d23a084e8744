"""`check_backbone`: whether a backbone of your own has the properties that training, merging and FreeModel rely on."""

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
    """Check a backbone in the ways that training, merging and FreeModel use it.

    Its weights do not change; afterwards it is in evaluation mode.

    Args:
        backbone: the backbone.
        inputs: a batch of at least two different samples: a tensor (B, …), or a dictionary or tuple of tensors.
        trust_remote_code: whether the backbone's class may be imported when its folder is loaded.

    Raises:
        AssertionError: if a check fails; the message names it.
    """
    kind = type(backbone).__name__
    _require(isinstance(backbone, Backbone), f"{kind} is not derived from freemerge.models.Backbone")
    samples = batch_size(inputs)
    _require(samples >= 2, "pass a batch of at least two samples")
    weights = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    backbone.eval()
    features = _features(kind, backbone, inputs)
    expected = (samples, backbone.feature_dim)
    _require(
        tuple(features.shape) == expected,
        f"{kind} returns features of shape {tuple(features.shape)}, expected {expected}: samples × feature_dim",
    )
    _require(bool(torch.isfinite(features).all()), f"{kind} returns features that are NaN or infinite")
    _require(
        bool((features[0] != features[1]).any()),
        f"{kind} returns the same features for two samples; are they equal?",
    )
    again = _features(kind, backbone, inputs)
    _require(torch.equal(features, again), f"{kind} is not deterministic in evaluation mode")
    for index in range(samples):
        alone = _features(kind, backbone, select(inputs, torch.tensor([index])))
        message = f"{kind}: the features of sample {index} depend on the other samples of its batch"
        _close(message, alone[0], features[index])
    _same(f"{kind} changes its weights in a forward pass", weights, backbone.weights())
    _check_weights(kind, backbone, inputs, features)
    _check_training(kind, backbone, inputs)
    _check_folder(kind, backbone, inputs, features, trust_remote_code)


def _check_weights(kind: str, backbone: Backbone, inputs: Inputs, features: Tensor) -> None:
    """`weights()` is the state that is merged, and loaded weights are used in the forward pass."""
    _require(bool(backbone.weights()), f"{kind}.weights() is empty, so there is nothing to merge")
    other = copy.deepcopy(backbone)
    changed = {
        name: tensor * 1.5 + 0.1 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in other.weights().items()
    }
    other.load_weights(changed)
    _same(f"{kind}.weights() differs from the weights passed to load_weights()", changed, other.weights())
    _require(
        not torch.equal(_features(kind, other, inputs), features),
        f"{kind}: other weights give the same features, so the forward pass does not use weights()",
    )
    other.load_weights({name: tensor.clone() for name, tensor in backbone.weights().items()})
    _require(
        torch.equal(_features(kind, other, inputs), features),
        f"{kind}: a copy with the same weights returns other features",
    )


def _check_training(kind: str, backbone: Backbone, inputs: Inputs) -> None:
    """Gradients reach at least one parameter."""
    trained = copy.deepcopy(backbone).train()
    with torch.enable_grad():
        trained(inputs).float().square().sum().backward()
    grads = [parameter.grad for parameter in trained.parameters() if parameter.requires_grad]
    _require(
        any(grad is not None and bool(grad.any()) for grad in grads),
        f"{kind}: no gradient reaches its parameters; is its forward under no_grad, or is everything frozen?",
    )


def _check_folder(kind: str, backbone: Backbone, inputs: Inputs, features: Tensor, trust_remote_code: bool) -> None:
    """A saved and reloaded backbone has the same class, weights and features."""
    with tempfile.TemporaryDirectory() as folder:
        backbone.save_pretrained(folder)
        try:
            loaded = load_backbone(folder, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            raise AssertionError(
                f"{kind} cannot be loaded from its own folder: {error}; recipe() must return the arguments of its "
                "constructor, and its class must be importable"
            ) from error
        _require(type(loaded) is type(backbone), f"{kind} is loaded from its folder as a {type(loaded).__name__}")
        loaded.eval()
        _same(f"{kind} is loaded from its folder with other weights", backbone.weights(), loaded.weights())
        message = f"{kind} is loaded from its folder and returns other features"
        _close(message, _features(kind, loaded, inputs), features)


@torch.no_grad()
def _features(kind: str, backbone: Backbone, inputs: Inputs) -> Tensor:
    """The features of a batch."""
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
    _require(expected.keys() == found.keys(), f"{message}: the names differ")
    for name, tensor in expected.items():
        _require(torch.equal(found[name], tensor), f"{message}; the first is '{name}'")
