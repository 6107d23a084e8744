"""Backbones: pooling, reading and writing Hugging Face folders, refusals."""

import pytest
import torch
from transformers import AutoModel

from freemerge.models import Backbone, TransformersBackbone, extract_features
from tests.tiny import VIT, TinySuite, tiny_backbone


def test_pooling_uses_the_documented_tokens() -> None:
    backbone, images = tiny_backbone().eval(), torch.randn(3, 1, 8, 8)
    tokens = backbone.model(pixel_values=images).last_hidden_state
    assert torch.equal(backbone(images), tokens[:, 1:].mean(dim=1))
    backbone.pooling = "cls"
    assert torch.equal(backbone(images), tokens[:, 0])
    pooled = TransformersBackbone(config=VIT, pooling="pooler").eval()
    assert torch.equal(pooled(images), pooled.model(pixel_values=images).pooler_output)


def test_without_the_pooler_there_are_no_untrained_pooler_weights() -> None:
    assert not any("pooler" in name for name in tiny_backbone().weights())
    assert any("pooler" in name for name in TransformersBackbone(config=VIT, pooling="pooler").weights())


def test_a_saved_backbone_loads_with_and_without_freemerge(tmp_path) -> None:
    backbone, images = tiny_backbone().eval(), torch.randn(2, 1, 8, 8)
    backbone.save_pretrained(tmp_path)
    again = TransformersBackbone(pretrained=str(tmp_path), pooling="mean").eval()
    assert torch.equal(again(images), backbone(images))
    assert again.pretrained
    assert not backbone.pretrained
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert torch.equal(
        plain(pixel_values=images).last_hidden_state, backbone.model(pixel_values=images).last_hidden_state
    )


def test_weights_share_memory_and_load_copies() -> None:
    backbone = tiny_backbone()
    other = {name: tensor + 1 for name, tensor in backbone.weights().items()}
    live = backbone.weights()
    backbone.load_weights(other)
    assert all(torch.equal(live[name], other[name]) for name in live)


def test_exactly_one_source_is_required() -> None:
    with pytest.raises(ValueError, match="either `pretrained`"):
        TransformersBackbone()
    with pytest.raises(ValueError, match="either `pretrained`"):
        TransformersBackbone(pretrained="x", config=VIT)
    with pytest.raises(ValueError, match="needs a `model_type`"):
        TransformersBackbone(config={"hidden_size": 16})


def test_any_module_can_be_a_backbone() -> None:
    backbone = Backbone(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)), feature_dim=5)
    assert backbone(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert set(backbone.weights()) == {"1.weight", "1.bias"}


def test_extract_features_covers_all_samples_in_order_and_keeps_the_mode() -> None:
    suite, backbone = TinySuite(), tiny_backbone().train()
    loader = suite.val_dataloader()["bars"]
    features, labels = extract_features(backbone, loader, torch.device("cpu"))
    assert backbone.training
    backbone.eval()
    direct = torch.cat([backbone(images) for images, _ in loader])
    torch.testing.assert_close(features, direct.detach())
    assert torch.equal(labels, torch.cat([labels for _, labels in loader]))
