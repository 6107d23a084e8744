"""Merging the same models again and again: the same results, with as few surveys as can be."""

import pytest
import torch

from freemerge.checkpoints import save_checkpoint
from freemerge.merging import MergeError, PCBMerging, TaskArithmetic, Ties, merge
from freemerge.merging.candidates import Candidates


@pytest.mark.parametrize("memory", [None, 0])
def test_a_candidate_is_what_merge_makes(base, models, method, memory):
    named = dict(zip(("a", "b", "c"), models, strict=True))
    candidates = Candidates(base, named, memory=memory)
    assert candidates.in_memory == (memory is None)
    expected = merge(base, named, method)
    for _ in range(2):  # a method that overwrites what it is given must not spoil the next merge
        merged = candidates.merge(method)
        assert list(merged) == list(expected)
        for name in base:
            assert torch.equal(merged[name], expected[name]), name
            assert merged[name].dtype == expected[name].dtype


def test_candidates_that_agree_in_what_is_surveyed_share_a_survey(base, models):
    candidates = Candidates(base, dict(zip("abc", models, strict=True)))
    for scale in (1.0, 0.5, [0.1, 0.2, 0.3]):
        candidates.merge(PCBMerging(0.2, scale))
    assert candidates.surveys == 1
    candidates.merge(PCBMerging(0.3))
    assert candidates.surveys == 2
    for _ in range(2):
        for density in (0.1, 0.2):
            merged = candidates.merge(Ties(density, 0.5))
            expected = merge(base, dict(zip("abc", models, strict=True)), Ties(density, 0.5))
            assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert candidates.surveys == 4


def test_models_come_from_files_too(tmp_path, base, models):
    for name, tensors in (("base", base), ("a", models[0])):
        save_checkpoint(tmp_path / f"{name}.safetensors", tensors)
    merged = Candidates(tmp_path / "base.safetensors", {"a": tmp_path / "a.safetensors"}).merge(TaskArithmetic(0.5))
    expected = merge(base, [models[0]], TaskArithmetic(0.5))
    assert all(torch.equal(merged[name], expected[name]) for name in base)


def test_tied_tensors_stay_tied():
    base, model = torch.ones(3, 3), torch.full((3, 3), 3.0)
    candidates = Candidates({"embed": base, "head": base}, {"a": {"embed": model, "head": model}})
    merged = candidates.merge(TaskArithmetic(0.5))
    assert torch.equal(merged["embed"], torch.full((3, 3), 2.0))
    assert merged["head"] is merged["embed"]


def test_what_does_not_fit_is_refused(base, models):
    with pytest.raises(MergeError, match="scale"):
        Candidates(base, {"a": models[0]}).merge(TaskArithmetic([0.1, 0.2]))
    with pytest.raises(MergeError, match=r"a: the tensor 'conv\.weight' is missing"):
        Candidates(base, {"a": {name: tensor for name, tensor in models[0].items() if name != "conv.weight"}})
