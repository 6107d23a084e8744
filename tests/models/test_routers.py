"""Routers: features of images of any size and of texts, early points of a backbone, rounding, configurations."""

import pytest
import torch

from freemerge.models import ConvRouter, EarlyRouter, feature_width, make_router
from tests.tiny import tiny_backbone, tiny_text_backbone


def test_there_is_one_logit_per_task_for_any_image_size() -> None:
    router = ConvRouter(5, channels=3, width=4).eval()
    for size in ((8, 8), (17, 40), (1, 1)):
        assert router(torch.randn(2, 3, *size)).shape == (2, 5)


def test_a_samples_logits_do_not_depend_on_its_batch() -> None:
    router, images = ConvRouter(3, channels=1, width=4).eval(), torch.randn(6, 1, 16, 16)
    torch.testing.assert_close(router(images)[2:3], router(images[2:3]))


def test_features_do_not_depend_on_positions() -> None:
    """Moving a dot by the convolutions' total stride of 8, away from the borders, changes neither mean nor maximum."""
    router = ConvRouter(2, channels=1, width=4).eval()
    here, there = torch.zeros(1, 1, 48, 48), torch.zeros(1, 1, 48, 48)
    here[..., 20, 20] = 1.0
    there[..., 28, 28] = 1.0
    torch.testing.assert_close(router.features(here), router.features(there))


@torch.no_grad()
def test_features_are_mean_deviation_and_maximum_of_pixels_and_of_each_convolution() -> None:
    router, images = ConvRouter(2, channels=3, width=4).eval(), torch.randn(5, 3, 16, 16)
    maps, expected = router.norm(images), []
    for convolution in (None, *router.convolutions):
        maps = maps if convolution is None else torch.nn.functional.gelu(convolution(maps))
        expected += [maps.mean(dim=(2, 3)), maps.std(dim=(2, 3), correction=0), maps.amax(dim=(2, 3))]
    features = router.features(images)
    assert features.shape == (5, 3 * (3 + 5 * 4))
    torch.testing.assert_close(features, torch.cat(expected, dim=1), atol=2e-3, rtol=1e-3)


def test_constant_images_have_a_finite_gradient() -> None:
    router = ConvRouter(2, channels=1, width=4)
    router(torch.zeros(3, 1, 8, 8)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


def test_a_router_in_bfloat16_is_close_to_float32() -> None:
    router, images = ConvRouter(3, channels=1, width=4).eval(), torch.randn(6, 1, 16, 16)
    expected = router(images)
    found = router.bfloat16()(images.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_an_early_router_uses_the_submodules_output_and_nothing_after_it_runs() -> None:
    backbone, images = tiny_backbone().eval(), torch.randn(5, 1, 8, 8)
    assert feature_width(images, backbone, "embeddings") == 16
    router = EarlyRouter(3, "embeddings", 16, hidden=0).eval()
    tokens = backbone.model.embeddings(images)
    summary = torch.cat([tokens.mean(dim=1), tokens.std(dim=1, correction=0), tokens.amax(dim=1)], dim=1)
    ran = []
    backbone.model.layernorm.register_forward_hook(lambda *_: ran.append(1))
    logits = router(images, backbone)
    assert not ran
    torch.testing.assert_close(logits, router.head(router.standardise(summary)), atol=1e-4, rtol=1e-3)
    assert backbone(images).shape == (5, 16)  # the backbone runs to its end as before
    assert ran


@torch.no_grad()
def test_an_early_router_summarises_each_text_of_a_pair_separately() -> None:
    """Padding on the right changes nothing; a missing second text has zeros as mean and maximum."""
    backbone = tiny_text_backbone().eval()
    router = EarlyRouter(3, "embeddings", 16, segments=2, hidden=0).eval()
    ids = torch.randint(1, 50, (2, 6))
    segment = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    features = router.features({"input_ids": ids, "attention_mask": mask, "token_type_ids": segment}, backbone)
    tokens = backbone.model.embeddings(input_ids=ids, token_type_ids=segment)  # (2, 6, 16)
    parts = [tokens[0, :2], tokens[0, 2:5], tokens[1]]
    expected = [torch.cat([part.mean(0), part.std(0, correction=0), part.amax(0)]) for part in parts]
    torch.testing.assert_close(features[0], torch.cat(expected[:2]), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(features[1, :48], expected[2], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(features[1, 48:], torch.zeros(48), atol=1e-3, rtol=0)
    without_mask = router.features({"input_ids": ids[1:], "token_type_ids": segment[1:]}, backbone)
    torch.testing.assert_close(without_mask, features[1:])
    with pytest.raises(ValueError, match="2 segments need token_type_ids, which the inputs do not have"):
        router({"input_ids": ids, "attention_mask": mask}, backbone)


def test_a_rounded_router_is_stored_in_half_the_bytes_and_an_unrounded_one_exactly() -> None:
    router, images = ConvRouter(3, channels=2, width=4).eval(), torch.randn(2, 2, 8, 8)
    assert router.stored()["head.weight"].dtype == router.stored()["convolutions.0.weight"].dtype == torch.float32
    before = router(images)
    stored = router.round_().stored()
    torch.testing.assert_close(router(images), before, atol=0.05, rtol=0.05)
    parameters = dict(router.named_parameters())
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.bfloat16} == parameters.keys()
    again = make_router(router.config).eval()
    again.load_state_dict(stored)
    assert torch.equal(again(images), router(images))


def test_a_router_is_rebuilt_from_its_config() -> None:
    early = EarlyRouter(2, "embeddings", 16, segments=2, hidden=8)
    for router in (ConvRouter(3, channels=2, width=4), early):
        again = make_router(router.config)
        again.load_state_dict(router.state_dict())
        assert type(again) is type(router)
        assert again.config == router.config
    with pytest.raises(ValueError, match="unknown kind of router 'oracle'; kinds: conv, early"):
        make_router({"kind": "oracle"})


def test_an_early_router_refuses_points_that_are_missing_or_not_run() -> None:
    backbone, images = tiny_backbone().eval(), torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="the backbone has no submodule 'stem'; it has embeddings"):
        EarlyRouter(2, "stem", 16)(images, backbone)
    with pytest.raises(ValueError, match="uses the backbone's features; pass `backbone=`"):
        EarlyRouter(2, "embeddings", 16)(images)
    backbone.model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' does not run in a forward pass"):
        EarlyRouter(2, "unused", 16)(images, backbone)
