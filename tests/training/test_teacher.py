"""The teacher: the fine-tuned model's features from weights of any dtype, and their cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.training.teacher import Teacher, fingerprints
from tests.tiny import tiny_backbone


@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]))
@settings(max_examples=50, deadline=None)
def test_fingerprints_depend_only_on_a_samples_content(seed: int, dtype: torch.dtype) -> None:
    inputs = (20 * torch.rand(6, 3, 5, generator=torch.Generator().manual_seed(seed))).to(dtype)
    prints = fingerprints(inputs)
    assert torch.equal(fingerprints(inputs[[4, 1]]), prints[[4, 1]])
    different = len(torch.unique(inputs, dim=0))
    assert len({tuple(row) for row in prints.tolist()}) == different
    changed = inputs.clone()
    changed[0, 0, 0] = ~changed[0, 0, 0] if dtype == torch.bool else changed[0, 0, 0] + 1
    assert not torch.equal(fingerprints(changed)[0], prints[0])


def test_fingerprints_ignore_right_padding_and_the_order_of_names() -> None:
    ids, mask = torch.randint(1, 99, (4, 5)), torch.ones(4, 5, dtype=torch.long)
    prints = fingerprints({"input_ids": ids, "attention_mask": mask})
    padded = {name: torch.nn.functional.pad(t, (0, 3)) for name, t in (("attention_mask", mask), ("input_ids", ids))}
    assert torch.equal(fingerprints(padded), prints)
    assert not torch.equal(fingerprints({"input_ids": mask, "attention_mask": ids}), prints)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_the_fine_tuned_backbone(dtype: torch.dtype) -> None:
    backbone, tuned, images = tiny_backbone(0).eval(), tiny_backbone(1).eval(), torch.randn(5, 1, 8, 8)
    teacher = Teacher({name: tensor.to(dtype) for name, tensor in tuned.weights().items()})
    tuned.load_weights({name: tensor.float() for name, tensor in teacher.weights.items()})
    with torch.no_grad():
        torch.testing.assert_close(teacher(backbone, images), tuned(images))


def test_cached_features_are_not_computed_again() -> None:
    backbone, images = tiny_backbone().eval(), torch.randn(8, 1, 8, 8)
    teacher, passes = Teacher(tiny_backbone(1).weights(), cache=True), []
    backbone.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    first = teacher(backbone, images[:5])
    again = teacher(backbone, images[[6, 2, 0, 7]])
    torch.testing.assert_close(again[[1, 2]], first[[2, 0]])
    assert torch.equal(teacher(backbone, images[[6, 7]]), again[[0, 3]])
    assert passes == [5, 2]
