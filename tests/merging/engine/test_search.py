"""Repeated merges of the same models: equal results with the fewest possible statistics passes."""

from dataclasses import dataclass

import pytest
import torch

from freemerge.checkpoints import save_checkpoint
from freemerge.merging import MergeError, MergeMethod, PCBMerging, TaskArithmetic, Ties, WeightAverage, merge
from freemerge.merging.engine.search import Candidates
from freemerge.merging.methods.scales import has_scale, is_linear, rescaled
from tests.merging.merging_models import METHODS


@dataclass(frozen=True)
class Clipped(MergeMethod):
    """Clips after scaling and does not set `linear_in_scale`."""

    scale: float = 1.0

    def combine(self, name, deltas, statistics):
        return (deltas.sum(0) * self.scale).clamp(-0.05, 0.05)


@dataclass(frozen=True)
class ClippedArithmetic(TaskArithmetic):
    """The same, as a subclass of a method with `linear_in_scale`."""

    def combine(self, name, deltas, statistics):
        return super().combine(name, deltas, statistics).clamp(-0.05, 0.05)


@pytest.mark.parametrize("memory", [None, 0])
def test_a_candidate_is_what_merge_makes(base, models, method, memory):
    named = dict(zip(("a", "b", "c"), models, strict=True))
    candidates = Candidates(base, named, memory=memory)
    assert candidates.in_memory == (memory is None)
    expected = merge(base, named, method)
    for _ in range(2):  # a method that overwrites its inputs must not change the next merge
        merged = candidates.merge(method)
        assert list(merged) == list(expected)
        for name in base:
            assert torch.equal(merged[name], expected[name]), name
            assert merged[name].dtype == expected[name].dtype


def test_candidates_with_equal_statistics_parameters_share_statistics(base, models):
    candidates = Candidates(base, dict(zip("abc", models, strict=True)))
    for scale in (1.0, 0.5, [0.1, 0.2, 0.3]):
        candidates.merge(PCBMerging(0.2, scale))
    assert candidates.passes == 1
    candidates.merge(PCBMerging(0.3))
    assert candidates.passes == 2
    for _ in range(2):
        for density in (0.1, 0.2):
            merged = candidates.merge(Ties(density, 0.5))
            expected = merge(base, dict(zip("abc", models, strict=True)), Ties(density, 0.5))
            assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert candidates.passes == 4


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


@pytest.mark.parametrize(
    ("method", "at"),
    [
        (Clipped(), lambda factor: Clipped(factor)),
        (ClippedArithmetic(), lambda factor: ClippedArithmetic(factor)),
        (ClippedArithmetic([0.5, 0.2, 0.9]), lambda f: ClippedArithmetic([0.5 * f, 0.2 * f, 0.9 * f])),
        (TaskArithmetic([0.5, 0.2, 0.9]), lambda f: TaskArithmetic([0.5 * f, 0.2 * f, 0.9 * f])),
        (PCBMerging(scale=[1.0, 0.5, 2.0]), lambda f: PCBMerging(scale=[f, 0.5 * f, 2.0 * f])),
        (Ties(scale=0.7), lambda factor: Ties(scale=factor)),
    ],
)
def test_a_search_over_scales_equals_separate_merges(base, models, method, at):
    """Including tied tensors and batch-norm statistics, which do not depend on λ."""
    for each in (base, *models):
        each["bn.running_mean"], each["tied.weight"] = each["norm.bias"].clone(), each["embed.weight"]
    named = dict(zip("abc", models, strict=True))
    factors = [0.3, 1.0, 1.7]
    for factor, merged in zip(factors, Candidates(base, named).over_scales(method, factors), strict=True):
        expected = merge(base, named, at(factor))
        for name in base:
            torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [method for method in METHODS if has_scale(method)], ids=repr)
def test_methods_declared_linear_are_linear(base, models, method):
    assert is_linear(method)
    candidates = Candidates(base, dict(zip("abc", models, strict=True)))
    one, three = (candidates.merge(rescaled(method, factor)) for factor in (1.0, 3.0))
    for name, tensor in base.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(three[name] - tensor, 3 * (one[name] - tensor), rtol=1e-4, atol=2e-6)


def test_linear_methods_merge_once_for_all_scales(base, models, monkeypatch):
    seen = []
    combine = TaskArithmetic.combine
    monkeypatch.setattr(
        TaskArithmetic, "combine", lambda self, name, *rest: seen.append(name) or combine(self, name, *rest)
    )
    candidates = Candidates(base, dict(zip("abc", models, strict=True)))
    for method, passes in ((TaskArithmetic(), 1), (ClippedArithmetic(), 3)):
        seen.clear()
        assert len(list(candidates.over_scales(method, [0.1, 0.2, 0.3]))) == 3
        assert sorted(seen) == sorted(passes * [name for name in base if base[name].is_floating_point()])


def test_which_methods_have_a_scale():
    @dataclass(frozen=True)
    class Odd(MergeMethod):
        scale: str = "large"

        def combine(self, name, deltas, statistics):
            return deltas[0]

    assert not any(has_scale(method) for method in (WeightAverage(), Odd(), Odd(scale=True), Odd(scale=None)))
    assert has_scale(Clipped(1))
    assert has_scale(TaskArithmetic([1, 2.0]))
    assert rescaled(TaskArithmetic([1, 2.0]), 0.5) == TaskArithmetic([0.5, 1.0])
    assert not is_linear(Clipped())
    assert not is_linear(ClippedArithmetic())
