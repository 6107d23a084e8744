"""`check_backbone` accepts correct backbones and names the faults of others."""

import pytest
import torch
from torch import nn

from freemerge.models import Backbone, ModuleBackbone, TorchvisionBackbone
from freemerge.testing import check_backbone
from tests.models.own_parts import OwnBackbone, OwnViT
from tests.tiny import VIT, tiny_backbone, tiny_text_backbone

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = {
    "input_ids": torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0], [2, 4, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]),
}


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (tiny_backbone, IMAGES),
        (tiny_text_backbone, TOKENS),
        (lambda: TorchvisionBackbone("shufflenet_v2_x0_5"), torch.rand(2, 3, 64, 64)),
        (OwnBackbone, IMAGES),
        (lambda: OwnViT(config=VIT, pooling="mean"), IMAGES),
    ],
    ids=["transformers, images", "transformers, texts", "torchvision", "user-made", "derived from ours"],
)
def test_correct_backbones_pass(make, inputs):
    torch.manual_seed(0)
    check_backbone(make(), inputs)


class Wide(OwnBackbone):
    def forward(self, inputs):
        return super().forward(inputs).repeat(1, 2)


class Mixing(OwnBackbone):
    def forward(self, inputs):
        features = super().forward(inputs)
        return features - features.mean(dim=0) if len(features) > 1 else features


class Dropping(OwnBackbone):
    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs))


class Counting(OwnBackbone):
    def __init__(self, width=8):
        super().__init__(width)
        self.model.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.model.calls += 1
        return super().forward(inputs)


class Aside(OwnBackbone):
    """Computes with weights that `weights()` does not return."""

    def __init__(self, width=8):
        super().__init__(width)
        self.other = nn.Linear(64, width)

    def forward(self, inputs):
        return self.other(inputs.flatten(1))


class Frozen(OwnBackbone):
    def forward(self, inputs):
        return super().forward(inputs).detach().requires_grad_()


class Forgetful(OwnBackbone):
    def recipe(self):
        return None


class Blank(Backbone):
    """Is rebuilt with another forward pass, because its recipe lacks an argument."""

    def __init__(self, factor=1.0):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 4)
        self.factor = factor

    def forward(self, inputs):
        return self.factor * self.model(inputs)

    def recipe(self):
        return {}


class Tuples(OwnBackbone):
    def forward(self, inputs):
        return (super().forward(inputs),)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Wide, r"Wide returns features of shape \(3, 16\), expected \(3, 8\)"),
        (Mixing, "Mixing: the features of sample 0 depend on the other samples"),
        (Dropping, "Dropping is not deterministic in evaluation mode"),
        (Counting, "Counting changes its weights in a forward pass; the first is 'calls'"),
        (Aside, "Aside: other weights give the same features"),
        (Frozen, "Frozen: no gradient reaches its parameters"),
        (Forgetful, r"Forgetful cannot be loaded from its own folder: .* recipe\(\) must return"),
        (lambda: Blank(2.0), "Blank is loaded from its folder and returns other features"),
        (Tuples, "Tuples returns a tuple, expected a tensor of features"),
    ],
)
def test_a_fault_is_named(backbone, message):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=message):
        check_backbone(backbone(), IMAGES)


def test_one_sample_is_refused():
    with pytest.raises(AssertionError, match="at least two samples"):
        check_backbone(ModuleBackbone(nn.Flatten(), feature_dim=64), IMAGES[:1])
