"""torchvision transforms as augmentations."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torchvision.transforms import v2

from freemerge.data import ArrayDataset, NpzSource, TaskSource
from freemerge.data.arrays import Preprocessing
from freemerge.data.augment import Compose, RandomFlip
from freemerge.data.errors import DataError
from freemerge.data.sources.source import describe
from tests.configs import tiny_files

IMAGES = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_each_image_has_random_parameters_of_its_own() -> None:
    flipped = Preprocessing(augment=v2.RandomHorizontalFlip())(IMAGES)
    plain = IMAGES.float() / 255
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 10 < int(same.sum()) < 54  # 32 expected; applied to the whole batch, it would be 0 or 64


def test_transforms_can_be_combined_and_follow_torchs_seed() -> None:
    steps = Compose(v2.RandomRotation(20), RandomFlip(), v2.RandAugment(), v2.RandomResizedCrop(6), v2.RandomErasing())
    data = ArrayDataset(IMAGES, torch.zeros(64, dtype=torch.int64), augment=steps)
    torch.manual_seed(1)
    first = data.__getitems__(range(64)).inputs
    torch.manual_seed(1)
    assert torch.equal(data.__getitems__(range(64)).inputs, first)
    assert first.shape == (64, 3, 6, 6)
    assert not torch.equal(data.__getitems__(range(64)).inputs, first)


def test_a_configuration_names_transforms_by_class_path(tmp_path) -> None:
    tiny_files.write_npz(tmp_path / "a.npz")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TaskSource, "source")
    augment = [
        {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": 6, "scale": [0.5, 1.0]}},
        {"class_path": "freemerge.data.augment.RandomFlip"},
    ]
    arguments = {"path": str(tmp_path / "a.npz"), "augment": augment}
    config = parser.parse_object({"source": {"class_path": "freemerge.data.NpzSource", "init_args": arguments}})
    source = parser.instantiate_classes(config).source
    task = source.build("a", 0)
    assert (task.train[0][0].shape, task.val[0][0].shape) == ((3, 6, 6), (3, 12, 12))
    assert source.identity() == parser.instantiate_classes(config).source.identity()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.JPEG(50), r"augment: JPEG cannot take a float32 image \(3, 8, 8\) in \[0, 1\]"),
        (v2.ToPILImage(), "augment: ToPILImage must return float images of one shape .*, got Image"),
        (v2.ToDtype(torch.uint8, scale=True), "ToDtype must return float images .* got torch.uint8"),
        (v2.RandomResize(4, 9), "RandomResize must return float images of one shape"),
        (v2.MixUp(num_classes=2), "MixUp changes labels, but augmentations receive images only"),
        (v2.CutMix(num_classes=2), "CutMix changes labels"),
    ],
)
def test_unsuitable_transforms_are_refused(transform, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(DataError, match=message) as caught:
        Preprocessing(augment=transform)(IMAGES)
    assert "\n" not in str(caught.value)


def test_the_identity_covers_a_transforms_parameters() -> None:
    def source(transform) -> dict:
        return describe(NpzSource(path="x", augment=[transform]))

    assert source(v2.RandomRotation(10)) == source(v2.RandomRotation(10))
    different = [
        v2.RandomRotation(10),
        v2.RandomRotation(20),
        v2.RandomRotation(10, interpolation=v2.InterpolationMode.BILINEAR),
        v2.ToDtype(torch.float32),
        v2.ToDtype(torch.float16),
        v2.LinearTransformation(torch.eye(3), torch.zeros(3)),
        v2.LinearTransformation(torch.eye(3) * 2, torch.zeros(3)),
        partial(torch.roll, shifts=1),
        partial(torch.roll, shifts=2),
    ]
    found = [source(each) for each in different]
    assert all(found[i] != found[j] for i in range(len(found)) for j in range(i))
    assert describe(np.array([1.0])) != describe(np.array([2.0]))
    assert "0x" not in str(found)
