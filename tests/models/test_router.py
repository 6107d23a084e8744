"""The router's features against sums by hand."""

import torch

from freemerge.models import Router


def test_features_are_local_means_of_pixels_and_gradients() -> None:
    router = Router(2, channels=1, grid=2)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, :, 2:] = 1.0  # a vertical edge between columns 1 and 2
    pixels, across, down = router.features(image).view(3, 2, 2)
    assert pixels.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert across.tolist() == [[0.5, 0.0], [0.5, 0.0]]  # one step of 1 in each row of two columns
    assert down.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_output_has_a_logit_per_task_for_any_image_size() -> None:
    router = Router(5, channels=3).eval()
    assert router(torch.randn(2, 3, 17, 40)).shape == (2, 5)
