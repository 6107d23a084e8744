"""Backbones of every kind, on random models built from their configurations."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from freemerge.checkpoints import CheckpointError, save_checkpoint
from freemerge.models import (
    Backbone,
    ImageTextBackbone,
    LanguageBackbone,
    ModuleBackbone,
    TorchvisionBackbone,
    TransformersBackbone,
    load_backbone,
)
from tests.configs import tiny_files
from tests.configs.test_configs import BERT, CLIP, CONVNEXT, QWEN, T5, VIT

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
TOKENS = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), "attention_mask": MASK}
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def random(config: dict, **arguments) -> TransformersBackbone:
    torch.manual_seed(0)
    return TransformersBackbone(config=config, **arguments).eval()


def test_mean_pooling_of_texts_ignores_padding() -> None:
    backbone = random(BERT, pooling="mean")
    padded = backbone(TOKENS)
    alone = backbone({name: tensor[1:, :3] for name, tensor in TOKENS.items()})
    torch.testing.assert_close(padded[1:], alone)
    states = backbone.model(**TOKENS).last_hidden_state
    torch.testing.assert_close(padded[0], states[0].mean(dim=0))


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (VIT, 1),
        ({**VIT, "model_type": "deit"}, 2),  # class and distillation token
        ({**VIT, "model_type": "dinov2_with_registers", "num_register_tokens": 3, "mlp_ratio": 2}, 4),
        ({"model_type": "swin", "embed_dim": 8, "depths": [1], "num_heads": [1], "window_size": 2, "image_size": 8,
          "patch_size": 2}, 0),
    ],
)  # fmt: skip
def test_mean_pooling_of_images_uses_only_patches(config: dict, prefix: int) -> None:
    backbone = random(config, pooling="mean")
    states = backbone.model(pixel_values=IMAGES).last_hidden_state
    assert backbone.prefix_tokens == prefix
    torch.testing.assert_close(backbone(IMAGES), states[:, prefix:].mean(dim=1))


def test_convolutional_networks_of_transformers_are_pooled_over_positions() -> None:
    backbone = random(CONVNEXT, pooling="mean")
    images = torch.randn(2, 3, 32, 32)
    features = backbone(images)
    assert features.shape == (2, backbone.feature_dim)
    torch.testing.assert_close(features, backbone.model(images).last_hidden_state.mean(dim=(2, 3)))


def test_a_missing_model_is_a_one_line_error() -> None:
    with pytest.raises(ValueError, match="TransformersBackbone: /nonexistent: cannot load a model from it") as caught:
        TransformersBackbone("/nonexistent")
    assert "\n" not in str(caught.value)


def test_dropout_is_on_when_a_pretrained_model_is_fine_tuned(tmp_path) -> None:
    random(BERT).save_pretrained(tmp_path)
    assert all(module.training for module in TransformersBackbone(str(tmp_path)).modules())


# ---- dual encoders


@pytest.fixture
def clip(tmp_path) -> ImageTextBackbone:
    torch.manual_seed(0)
    return ImageTextBackbone(config=CLIP, tokenizer=tiny_files.write_tokenizer(tmp_path / "tokenizer")).eval()


def test_a_dual_encoder_computes_the_same_as_the_whole_model(clip: ImageTextBackbone, tmp_path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    clip.save_pretrained(tmp_path / "clip")
    whole = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    texts = ["a photo of a red", "a photo of a blue good"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "clip")(texts, padding=True, return_tensors="pt")
    expected = whole(pixel_values=IMAGES, **tokens).logits_per_image
    head = clip.class_head(["red", "blue_good"], ["a photo of a {}"])
    torch.testing.assert_close(head(clip(IMAGES)), expected)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_several_prompts_are_averaged(clip: ImageTextBackbone) -> None:
    head = clip.class_head(["red"], ["a photo of a {}", "the {}"])
    both = clip.text.embed(["a photo of a red", "the red"]).mean(dim=0)
    scale = clip.text.model.logit_scale.exp()
    torch.testing.assert_close(head.weight[0], scale * both / both.norm())


def test_only_the_image_tower_is_merged_and_copied(clip: ImageTextBackbone) -> None:
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in clip.weights())
    assert not any(name.startswith("text") for name, _ in clip.named_parameters())
    copied = copy.deepcopy(clip)
    assert copied.text is clip.text
    copied.load_weights({name: tensor + 1 for name, tensor in clip.weights().items()})
    assert not torch.equal(copied(IMAGES), clip(IMAGES))


def test_a_dual_encoder_folder_round_trips(clip: ImageTextBackbone, tmp_path) -> None:
    clip.save_pretrained(tmp_path / "clip")
    again = load_backbone(tmp_path / "clip").eval()
    assert isinstance(again, ImageTextBackbone)
    torch.testing.assert_close(again(IMAGES), clip(IMAGES))
    torch.testing.assert_close(again.class_head(["red"], ["{}"]).weight, clip.class_head(["red"], ["{}"]).weight)


def test_a_model_without_two_towers_is_refused() -> None:
    with pytest.raises(ValueError, match="ViTModel has no image and text towers"):
        ImageTextBackbone(config=VIT)


# ---- language models


def test_language_models_return_their_own_logits() -> None:
    labels = torch.tensor([[5, 6, 3], [7, 3, -100]])
    for config, kind, length in ((T5, "seq2seq", 3), (QWEN, "causal_lm", 4)):
        torch.manual_seed(0)
        backbone = LanguageBackbone(config=config).eval()
        assert backbone.kind == kind
        inputs = {**TOKENS, "labels": labels} if kind == "seq2seq" else TOKENS
        logits = backbone(inputs)
        assert logits.shape == (2, length, len(tiny_files.WORDS))
        torch.testing.assert_close(logits, backbone.model(**inputs).logits)


def test_a_language_model_folder_round_trips(tmp_path) -> None:
    backbone = LanguageBackbone(config=T5).eval()
    backbone.save_pretrained(tmp_path)
    again = load_backbone(tmp_path).eval()
    inputs = {**TOKENS, "labels": torch.tensor([[5, 6, 3], [7, 3, -100]])}
    assert torch.equal(again(inputs), backbone(inputs))
    with pytest.raises(ValueError, match="transformers has no class 'AutoModelForNothing'"):
        LanguageBackbone(config=T5, auto_class="AutoModelForNothing")


# ---- torchvision and modules


@pytest.mark.parametrize(
    ("name", "width", "last"),
    [("resnet18", 512, "fc"), ("mobilenet_v3_small", 1024, "classifier.3"), ("vgg11", 4096, "classifier.6"),
     ("densenet121", 1024, "classifier"), ("shufflenet_v2_x0_5", 1024, "fc")],
)  # fmt: skip
def test_torchvision_models_lose_only_their_last_layer(name: str, width: int, last: str, tmp_path) -> None:
    whole = models.get_model(name, weights=None).eval()
    save_checkpoint(tmp_path / "w.safetensors", whole.state_dict())
    backbone = TorchvisionBackbone(name, file=str(tmp_path / "w.safetensors")).eval()
    assert backbone.feature_dim == width
    assert backbone.pretrained
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(whole.get_submodule(last)(backbone(images)), whole(images))
    assert set(whole.state_dict()) - set(backbone.weights()) == {f"{last}.weight", f"{last}.bias"}


def test_torchvision_refusals() -> None:
    with pytest.raises(ValueError, match="no classification model 'resnet51'; did you mean 'resnet50'"):
        TorchvisionBackbone("resnet51")
    with pytest.raises(ValueError, match="squeezenet1_1 does not end in a linear layer"):
        TorchvisionBackbone("squeezenet1_1")
    with pytest.raises(ValueError, match="either `weights` or `file`"):
        TorchvisionBackbone("resnet18", weights="DEFAULT", file="x")
    with pytest.raises(ValueError, match="resnet18 cannot be built"):
        TorchvisionBackbone("resnet18", options={"depth": 3})


class Own(nn.Module):
    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(images).mean(dim=(2, 3)))


def test_any_module_by_a_method(tmp_path) -> None:
    module = Own()
    backbone = ModuleBackbone(module, features="forward_features")
    assert backbone.feature_dim == 6
    torch.testing.assert_close(backbone(IMAGES), module.layer(IMAGES).mean(dim=(2, 3)))
    assert ModuleBackbone(module, feature_dim=2)(IMAGES).shape == (2, 2)
    save_checkpoint(tmp_path / "w.safetensors", Own().state_dict())
    loaded = ModuleBackbone(Own(), file=str(tmp_path / "w.safetensors"), features="forward_features")
    assert loaded.pretrained
    assert not backbone.pretrained
    with pytest.raises(ValueError, match="has no method 'features_of'"):
        ModuleBackbone(module, features="features_of")
    with pytest.raises(ValueError, match="Linear has no `feature_dim` or `num_features`; pass `feature_dim=`"):
        ModuleBackbone(nn.Linear(2, 2))


def test_folders_contain_a_recipe_if_there_is_one(tmp_path) -> None:
    backbone = TorchvisionBackbone("shufflenet_v2_x0_5").eval()
    backbone.save_pretrained(tmp_path / "a")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_backbone(tmp_path / "a").eval()(images), backbone(images))
    text = random(BERT, pooling="mean")
    text.save_pretrained(tmp_path / "b")
    assert torch.equal(load_backbone(tmp_path / "b").eval()(TOKENS), text(TOKENS))
    Backbone(nn.Linear(2, 2), 2).save_pretrained(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"no backbone\.json"):
        load_backbone(tmp_path / "c")
    (tmp_path / "c" / "backbone.json").write_text('{"class": "Router", "arguments": {}}')
    with pytest.raises(CheckpointError, match="freemerge has no backbone 'Router'"):
        load_backbone(tmp_path / "c")


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = random(BERT, pooling="mean")
        if checkpointing:
            backbone.enable_gradient_checkpointing()
            assert backbone.model.is_gradient_checkpointing
        for module in backbone.modules():
            module.training = not isinstance(module, nn.Dropout)
        backbone(TOKENS).square().sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear does not support it"):
        Backbone(nn.Linear(2, 2), 2).enable_gradient_checkpointing()
