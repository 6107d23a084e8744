"""The router looks at what there is in an image, at any size, and not at its neighbours in the batch."""

import torch

from freemerge.models import ConvRouter


def test_output_has_a_logit_per_task_for_any_image_size() -> None:
    router = ConvRouter(5, channels=3, width=4).eval()
    for size in ((8, 8), (17, 40), (1, 1)):
        assert router(torch.randn(2, 3, *size)).shape == (2, 5)


def test_a_sample_is_routed_alike_alone_and_in_a_batch() -> None:
    router, images = ConvRouter(3, channels=1, width=4).eval(), torch.randn(6, 1, 16, 16)
    torch.testing.assert_close(router(images)[2:3], router(images[2:3]))


def test_features_do_not_depend_on_where_something_is() -> None:
    """A dot moved by the convolutions' total stride of 8, away from the borders, changes neither mean nor maximum."""
    router = ConvRouter(2, channels=1, width=4).eval()
    here, there = torch.zeros(1, 1, 48, 48), torch.zeros(1, 1, 48, 48)
    here[..., 20, 20] = 1.0
    there[..., 28, 28] = 1.0
    torch.testing.assert_close(router.features(here), router.features(there))
