"""Parameters over the layers, and methods on whole weights, against arithmetic written out."""

import pytest
import torch

from freemerge.merging import (
    SVC,
    BalancedMerging,
    Dare,
    KarcherMean,
    MergeError,
    MultiSlerp,
    OverLayers,
    PerPattern,
    TaskArithmetic,
    Ties,
    WeightAverage,
    WholeWeights,
    merge,
    merge_task_vectors,
)
from freemerge.merging.methods.over_layers import find_depths
from freemerge.testing import check_method

NAMES = ("embed_tokens.weight", "layers.0.w", "layers.1.w", "layers.2.w", "norm.weight", "lm_head.weight")


def ones(value):
    return {name: torch.full((3,), float(value)) for name in NAMES}


def test_each_tensor_has_the_values_of_its_depth():
    merged = merge_task_vectors([ones(1), ones(10)], OverLayers(TaskArithmetic([0.5, 0.0]), {"scale.1": [0, 0.4, 2]}))
    found = {name: round(float(value[0]), 5) for name, value in merged.items()}
    assert found == dict(zip(NAMES, [0.5, 0.5, 4.5, 20.5, 20.5, 20.5], strict=True))


def test_values_are_interpolated_between_layers():
    vector = {f"h.{index}.w": torch.ones(2) for index in range(5)}
    merged = merge_task_vectors([vector], OverLayers(TaskArithmetic(), {"scale": [1.0, 0.0]}))
    assert [float(merged[f"h.{index}.w"][0]) for index in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_part_of_the_layers():
    vector = {f"h.{index}.w": torch.ones(2) for index in range(6)}
    merged = merge_task_vectors([vector], OverLayers(TaskArithmetic(), {"scale": [1.0, 2.0]}, [2, 5]))
    assert [float(merged[f"h.{index}.w"][0]) for index in range(6)] == [1.0, 1.0, 1.0, 1.5, 2.0, 2.0]


def test_memory_and_passes_are_those_of_the_most_demanding_depth():
    assert OverLayers(BalancedMerging(), {"scale": [1.0, 2.0]}).extra_copies(3) == 4
    assert OverLayers(SVC(TaskArithmetic()), {"scale": [1.0, 2.0]}).extra_copies(3) == 3
    assert OverLayers(Ties(density=1.0), {"density": [1.0, 0.2, *[1.0] * 15]}).passes == 2
    assert OverLayers(Ties(density=1.0), {"density": [1.0, 1.0]}).passes == 1


def test_the_depth_after_the_layers():
    merged = merge_task_vectors([ones(1)], OverLayers(TaskArithmetic(), {"scale": [1.0, 3.0]}, end=0.25))
    assert [float(merged[name][0]) for name in ("norm.weight", "lm_head.weight")] == [1.5, 1.5]


def test_behind_a_pattern_the_depth_is_that_in_the_whole_model():
    vector = {f"h.{index}.{part}": torch.ones(2) for index in range(3) for part in ("attn", "mlp")}
    method = PerPattern(
        TaskArithmetic(7.0),
        {"*.1.attn": OverLayers(TaskArithmetic(), {"scale": [0.0, 1.0]}), "*.lm_head": TaskArithmetic(0.0)},
        optional=True,
    )
    assert float(merge_task_vectors([vector], method)["h.1.attn"][0]) == 0.5


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.embed_tokens.weight", 0.0),
        ("transformer.wte.weight", 0.0),
        ("bert.embeddings.LayerNorm.weight", 0.0),
        ("vision_model.pre_layrnorm.weight", 0.0),
        ("model.layers.0.mlp.experts.7.w1.weight", 0.0),
        ("model.layers.1.mlp.experts.3.w1.weight", 0.5),
        ("model.layers.2.self_attn.q_proj.weight", 1.0),
        ("vision_model.encoder.layers.1.mlp.fc1.weight", 1.0),
        ("model.norm.weight", 1.0),
        ("lm_head.weight", 1.0),
        ("classifier.bias", 1.0),
    ],
)
def test_depths(name, depth):
    others = ["model.layers.0.a", "model.layers.1.a", "model.layers.2.a"]
    others += ["vision_model.encoder.layers.0.a", "vision_model.encoder.layers.1.a"]
    assert find_depths([*others, name])[name] == depth


def test_a_single_layer_has_the_last_value():
    merged = merge_task_vectors([{"h.0.w": torch.ones(1)}], OverLayers(TaskArithmetic(), {"scale": [0.0, 3.0]}))
    assert float(merged["h.0.w"]) == 3.0


def test_statistics_are_those_of_each_depth():
    """At the first layer 4 of 4 entries are kept, at the last 1 of 4."""
    vector = {f"h.{index}.w": torch.tensor([1.0, 2.0, 3.0, 4.0]) for index in range(2)}
    merged = merge_task_vectors([vector], OverLayers(Ties(scope="tensor"), {"density": [1.0, 0.25]}))
    assert merged["h.0.w"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert merged["h.1.w"].tolist() == [0.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize(
    "method",
    [
        OverLayers(Dare(TaskArithmetic([0.5, 0.2, 0.9])), {"method.scale.1": [0.0, 1.0, 0.3], "drop": [0.9, 0.1]}),
        OverLayers(Ties(), {"density": [0.2, 1.0]}, [0, 4]),
    ],
    ids=["DARE", "TIES"],
)
def test_what_the_engine_relies_on(method):
    check_method(method)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: OverLayers(TaskArithmetic(), {"scael": [0, 1]}), MergeError, "no parameter 'scael'; did you mean"),
        (lambda: OverLayers(TaskArithmetic([1, 2]), {"scale.2": [0, 1]}), MergeError, "no value '2' in the list"),
        (lambda: OverLayers(Ties(), {"density": [0.5, 1.5]}), ValueError, r"`density` must lie in \(0, 1\], got 1.5"),
        (lambda: OverLayers(Ties(), {"density": 0.5}), ValueError, "`values` of 'density' must be a list, got 0.5"),
        (lambda: OverLayers(Ties(), {}, [3, 3]), ValueError, r"the one after the last, got \[3, 3\]"),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()


class TestWholeWeights:
    def test_a_sum_that_is_no_average(self):
        base, one, two = ({"w": torch.tensor(values)} for values in ([1.0, 2.0], [3.0, 5.0], [-1.0, 7.0]))
        merged = merge(base, [one, two], WholeWeights(TaskArithmetic([0.5, 2.0])))
        torch.testing.assert_close(merged["w"], torch.tensor([0.5 * 3 - 2 * 1, 0.5 * 5 + 2 * 7]))

    def test_spheres_around_zero(self):
        """Two orthogonal vectors of lengths 3 and 4: the mean direction is their bisector, the mean length 3.5."""
        base, one, two = ({"w": torch.tensor(values)} for values in ([1.0, 2.0], [3.0, 0.0], [0.0, 4.0]))
        expected = torch.tensor([1.0, 1.0]) * 3.5 / 2**0.5
        for method in (MultiSlerp(), KarcherMean()):
            torch.testing.assert_close(merge(base, [one, two], WholeWeights(method))["w"], expected)

    def test_statistics_are_those_of_the_weights(self):
        base, model = {"w": torch.tensor([5.0, 0.1, 0.0])}, {"w": torch.tensor([5.0, 0.2, 3.0])}
        merged = merge(base, [model], WholeWeights(Ties(density=1 / 3)))["w"]
        torch.testing.assert_close(merged, torch.tensor([5.0, 0.0, 0.0]))

    def test_what_the_engine_relies_on(self):
        check_method(WholeWeights(WeightAverage([0.5, 0.2, 0.9])))
