"""Properties of every method, and each method against its formulas in plain float64."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from freemerge.merging import (
    FRMerging,
    HighPass,
    MergeError,
    MergeMethod,
    NyquistDisc,
    PCBMerging,
    PerPattern,
    TaskArithmetic,
    Ties,
    WeightAverage,
    apply_task_vector,
    merge,
    merge_task_vectors,
    task_vector,
)
from freemerge.merging.methods.pcb import _tanh_
from tests.merging.merging_models import METHODS, finetune


def vectors_of(base, models):
    return [task_vector(base, model) for model in models]


def permuted(method, order):
    """The method with its per-model parameters in another order."""
    changes = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, list):
            changes[field.name] = [value[index] for index in order]
        elif isinstance(value, MergeMethod):
            changes[field.name] = permuted(value, order)
        elif isinstance(value, dict):
            changes[field.name] = {key: permuted(inner, order) for key, inner in value.items()}
    return dataclasses.replace(method, **changes)


def test_zero_vectors_give_the_base(base, method):
    merged = merge(base, [copy.deepcopy(base) for _ in range(3)], method)
    assert all(torch.equal(merged[name], base[name]) for name in base)


def test_the_order_of_the_models_does_not_matter(base, models, method):
    named = dict(zip("abc", models, strict=True))
    merged = merge(base, named, method)
    order = [2, 0, 1]
    other = merge(base, {name: named[name] for name in "cab"}, permuted(method, order))
    for name in base:
        torch.testing.assert_close(merged[name], other[name], rtol=1e-4, atol=1e-5)


def test_scale_is_linear(base, models, method):
    if isinstance(method, WeightAverage):
        pytest.skip("it has no scale")
    vectors = vectors_of(base, models)
    scale = [2 * value for value in method.scale] if isinstance(method.scale, list) else 2 * method.scale
    once, twice = (merge_task_vectors(vectors, each) for each in (method, dataclasses.replace(method, scale=scale)))
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name])


def test_methods_are_values(method):
    assert method == copy.deepcopy(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.scale = 3


def test_merging_changes_no_input(base, models, method):
    vectors = vectors_of(base, models)
    before = copy.deepcopy((base, models, vectors))
    merge(base, models, method)
    merge_task_vectors(vectors, method)
    for old, new in zip((before[0], *before[1], *before[2]), (base, *models, *vectors), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("method", [TaskArithmetic(1.0), WeightAverage(), Ties(density=1.0)], ids=repr)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_one_model_comes_back_bit_for_bit(base, method, size):
    model = finetune(base, 0, size)
    merged = merge(base, [model], method)
    for name in base:
        assert torch.equal(merged[name], model[name]), name


def test_shared_statistics_serve_a_search_over_scale(base, models):
    from freemerge.merging import Vectors

    vectors = vectors_of(base, models)
    source = Vectors(
        "abc", {name: v.shape for name, v in vectors[0].items()}, lambda name: torch.stack([v[name] for v in vectors])
    )
    statistics = PCBMerging(ratio=0.3).collect_statistics(source)
    method = PCBMerging(ratio=0.3, scale=0.4)
    expected = merge_task_vectors(vectors, method)
    for name, deltas in source:
        assert torch.equal(method.combine(name, deltas, statistics), expected[name])


# Task vectors with whatever hypothesis likes: equal values, zeros, denormals, large numbers.
NUMBERS = st.floats(-100, 100, width=32, allow_subnormal=True) | st.sampled_from([0.0, 1.0, -1.0, 1e-30])
FLAT = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=NUMBERS)


def merged_flat(values, method):
    tensors = torch.from_numpy(values)
    cut = tensors.shape[1] // 3
    merged = merge_task_vectors([{"a": row[:cut], "b": row[cut:]} for row in tensors], method)
    return torch.cat([merged["a"], merged["b"]]).double().numpy()


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * max(np.abs(expected).max(), 1e-20))


def plain_ties(values, density, scale):
    values = values.astype(np.float64)
    keep = max(1, int(values.shape[1] * density))
    trimmed = np.stack([np.where(np.abs(row) >= np.sort(np.abs(row))[-keep], row, 0) for row in values])
    # The sum that elects is the float32 one: where it cancels exactly, which sign rounding leaves is not maths.
    elected = np.sign(torch.from_numpy(trimmed.astype(np.float32)).sum(0).numpy())
    agrees = (np.sign(trimmed) == elected) & (trimmed != 0)
    return scale * np.where(agrees, trimmed, 0).sum(0) / np.maximum(agrees.sum(0), 1)


@settings(max_examples=80, deadline=None)
@given(values=FLAT, density=st.sampled_from([0.05, 0.2, 0.5, 1.0]))
def test_ties_follows_the_paper(values, density):
    assert_near(merged_flat(values, Ties(density=density, scale=0.7)), plain_ties(values, density, 0.7))


def test_ties_per_tensor_trims_each_tensor():
    """Tensors of standard deviation 0.5, 1 and 2: over the model, nearly all of the top fifth is in the widest."""
    generator = torch.Generator().manual_seed(0)
    vector = {str(std): std * torch.randn(10000, generator=generator) for std in (0.5, 1.0, 2.0)}
    kept = {
        scope: [
            round(float((tensor != 0).float().mean()), 3)
            for tensor in merge_task_vectors([vector], Ties(density=0.2, scope=scope)).values()
        ]
        for scope in ("tensor", "model")
    }
    assert kept["tensor"] == [0.2, 0.2, 0.2]
    assert kept["model"] == pytest.approx([0.003, 0.138, 0.459], abs=0.01)


def plain_pcb(values, ratio, clip, inter, scale):
    values = values.astype(np.float64)
    tasks, total = values.shape
    magnitude = np.sort(np.abs(values), axis=1)
    first = int(total * clip)
    low, high = magnitude[:, first, None], magnitude[:, max(int(total * (1 - clip) - 1), first), None]
    clamped = np.clip(np.abs(values), low, high)
    normalized = (clamped - low) / np.where(high > low, high - low, 1)
    signed = np.sign(values) * normalized
    agreement = {
        "sum": lambda: np.tanh(values * values.sum(0)),
        "normalized": lambda: np.tanh(signed * signed.sum(0)),
        "pairwise": lambda: np.tanh(signed[:, None] * signed[None]).sum(1),
    }[inter]()
    scores = np.exp(tasks * normalized**2) * agreement
    threshold = np.sort(scores, axis=1)[:, min(int(total * (1 - ratio)), total - 1), None]
    maximum = scores.max(1, keepdims=True)
    # A threshold between equals is decided by rounding: there the formulas have no float32 answer.
    spread = (maximum - threshold) / np.maximum(np.abs(scores).max(1, keepdims=True), 1e-300)
    assume(bool((spread > 1e-3).all()))
    weights = (np.clip(scores, threshold, maximum) - threshold) / (maximum - threshold)
    total_weight = weights.sum(0)
    assume(bool(((total_weight == 0) | (total_weight > 1e-3)).all()))
    scale = np.broadcast_to(np.asarray(scale, dtype=np.float64), tasks)[:, None]
    return (scale * np.sign(values) * clamped * weights).sum(0) / np.maximum(total_weight, 1e-12)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tasks=st.integers(1, 4),
    total=st.integers(20, 400),
    power=st.integers(1, 3),
    ratio=st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    clip=st.sampled_from([0.0, 1e-4, 1e-2, 0.2]),
    inter=st.sampled_from(["sum", "normalized", "pairwise"]),
    per_model=st.booleans(),
)
def test_pcb_follows_the_paper(seed, tasks, total, power, ratio, clip, inter, per_model):
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal((tasks, total)) ** power).astype(np.float32)
    scale = [0.5 + index for index in range(tasks)] if per_model else 1.2
    expected = plain_pcb(values, ratio, clip, inter, scale)
    found = merged_flat(values, PCBMerging(ratio=ratio, clip=clip, inter=inter, scale=scale))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


@settings(max_examples=60, deadline=None)
@given(values=FLAT, inter=st.sampled_from(["sum", "normalized", "pairwise"]), ratio=st.sampled_from([0.1, 1.0]))
def test_pcb_never_leaves_the_range_of_its_inputs(values, inter, ratio):
    """Also for constants, zeros and single values, where the formulas divide zero by zero."""
    merged = merged_flat(values, PCBMerging(ratio=ratio, inter=inter))
    assert np.isfinite(merged).all()
    assert (np.abs(merged) <= np.abs(values).max() * (1 + 1e-5)).all()


def test_pcb_per_tensor_merges_each_tensor_as_if_it_were_a_model():
    generator = torch.Generator().manual_seed(0)
    vectors = [
        {"w": torch.randn(30, 40, generator=generator), "b": 9 * torch.randn(50, generator=generator)} for _ in range(3)
    ]
    merged = merge_task_vectors(vectors, PCBMerging(0.3, 0.7, 0.01, scope="tensor"))
    for name in ("w", "b"):
        alone = merge_task_vectors([{name: vector[name]} for vector in vectors], PCBMerging(0.3, 0.7, 0.01))
        assert torch.equal(merged[name], alone[name])


@pytest.mark.parametrize("far", [0.0, 0.01, 0.5])
def test_tanh_of_small_numbers_is_correctly_rounded(far):
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(4, 50_000, generator=generator) * 2 - 1) * 3e-4
    share = torch.rand(values.shape, generator=generator) < far
    values = torch.where(share, torch.randn(values.shape, generator=generator), values)
    exact = values.double().tanh()
    found = _tanh_(values.clone())
    assert torch.equal(found[~share], exact.float()[~share])
    torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=0)


def test_a_zero_task_vector_has_no_influence_in_pcb():
    vector = {"w": torch.randn(200, generator=torch.Generator().manual_seed(0))}
    alone = merge_task_vectors([vector], PCBMerging(inter="sum"))["w"]
    beside = merge_task_vectors([vector, {"w": torch.zeros(200)}], PCBMerging(inter="sum"))["w"]
    assert torch.equal(alone != 0, beside != 0)
    torch.testing.assert_close(alone, beside, rtol=0.05, atol=0.05)


def test_constants_are_merged_whole_by_pcb():
    merged = merge_task_vectors([{"w": torch.full((10,), 2.0)}, {"w": torch.full((10,), 4.0)}], PCBMerging())["w"]
    torch.testing.assert_close(merged, torch.full((10,), 3.0))


def test_fr_merging_alignment_brings_all_tasks_to_the_largest():
    vectors = [{"b": torch.tensor([1.0, -1.0])}, {"b": torch.tensor([0.0, 4.0])}, {"b": torch.zeros(2)}]
    merged = merge_task_vectors(vectors, FRMerging())["b"]
    torch.testing.assert_close(merged, torch.tensor([2.0, 2.0]))


def test_fr_merging_does_not_amplify_rounding():
    """The filter removes a constant completely; alignment must not amplify the rounding error that remains."""
    vectors = [{"w": torch.full((16, 16), 0.3)}, {"w": torch.randn(16, 16)}]
    merged = merge_task_vectors(vectors, FRMerging(HighPass(0.1)))["w"]
    torch.testing.assert_close(merged, HighPass(0.1)(vectors[1]["w"]), rtol=0, atol=1e-6)


def test_methods_without_tensors():
    for method in METHODS:
        if isinstance(method, PerPattern):
            continue
        merged = merge_task_vectors([{}, {}, {}], method)
        assert merged == {}
        empty = merge_task_vectors([{"w": torch.zeros(0, 3)}] * 3, method)
        assert empty["w"].shape == (0, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TaskArithmetic(float("nan")), "TaskArithmetic: `scale` must be a finite number, got nan"),
        (lambda: TaskArithmetic("much"), "TaskArithmetic: `scale` must be a finite number, got 'much'"),
        (lambda: TaskArithmetic([]), "`scale` must be a finite number"),
        (lambda: TaskArithmetic(True), "`scale` must be a finite number"),
        (lambda: Ties(density=0), r"Ties: `density` must lie in \(0, 1\], got 0"),
        (lambda: Ties(density=20), r"Ties: `density` must lie in \(0, 1\], got 20"),
        (lambda: Ties(scope="layer"), 'Ties: `scope` must be "model" or "tensor", got \'layer\''),
        (lambda: PCBMerging(ratio=1.5), r"PCBMerging: `ratio` must lie in \(0, 1\], got 1.5"),
        (lambda: PCBMerging(clip=0.5), r"PCBMerging: `clip` must lie in \[0, 0.5\), got 0.5"),
        (lambda: PCBMerging(inter="some"), 'PCBMerging: `inter` must be "sum"'),
        (lambda: PCBMerging(scope="layer"), 'PCBMerging: `scope` must be "model" or "tensor", got \'layer\''),
        (lambda: PCBMerging(filter="x"), "PCBMerging: `filter` must be a Filter or None, got 'x'"),
        (lambda: FRMerging(coefficients="best"), 'FRMerging: `coefficients` must be "align", "mean", "uniform"'),
        (lambda: FRMerging(coefficients=[1.0, None]), "FRMerging: `coefficients` must be a finite number"),
        (lambda: FRMerging(filter=0.7), "FRMerging: `filter` must be a Filter, got 0.7"),
        (lambda: NyquistDisc(0), "NyquistDisc: `radius` must be positive, got 0"),
        (lambda: HighPass(0.8), r"HighPass: `cutoff` must lie in \[0, 0.7071\], got 0.8"),
    ],
)
def test_wrong_parameters_are_refused_at_once(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_numbers_per_model_must_fit_the_models(base, models):
    with pytest.raises(MergeError, match="TaskArithmetic has 2 values in `scale` for 3 fine-tuned models"):
        merge(base, models, TaskArithmetic([1, 2]))
    with pytest.raises(MergeError, match="FRMerging has 1 values in `coefficients` for 3 fine-tuned models"):
        merge(base, models, FRMerging(coefficients=[1.0]))


def test_task_vectors_are_an_algebra(base, models):
    vector = task_vector(base, models[0])
    assert set(vector) == {"embed.weight", "conv.weight", "norm.bias", "temperature"}
    assert all(delta.dtype == torch.float32 for delta in vector.values())
    back = apply_task_vector(base, vector)
    for name in base:
        torch.testing.assert_close(back[name], models[0][name])
    halfway = apply_task_vector(base, vector, 0.5)
    torch.testing.assert_close(halfway["norm.bias"], (base["norm.bias"] + models[0]["norm.bias"]) / 2)
    back["steps"].add_(1)
    back["norm.bias"].add_(1)
    assert base["steps"] == 3
    assert not torch.equal(back["norm.bias"], base["norm.bias"])


def test_task_vectors_keep_narrow_and_wide_dtypes(base):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = {"w": base["conv.weight"].to(dtype)}
        tuned = {"w": narrow["w"] + 0.5}
        vector = task_vector(narrow, tuned)
        assert vector["w"].dtype == torch.float32
        applied = apply_task_vector(narrow, vector)["w"]
        assert applied.dtype == dtype
        torch.testing.assert_close(applied, tuned["w"])
    tiny = {"w": torch.tensor([1.0], dtype=torch.float64)}
    moved = {"w": torch.tensor([1.0 + 1e-12], dtype=torch.float64)}
    assert apply_task_vector(tiny, task_vector(tiny, moved))["w"].item() == pytest.approx(1.0 + 1e-12, abs=1e-16)


def test_errors_of_the_algebra(base, models):
    with pytest.raises(MergeError, match=r"the fine-tuned model has no tensor 'norm\.bias'"):
        task_vector(base, {name: tensor for name, tensor in base.items() if name != "norm.bias"})
    with pytest.raises(MergeError, match=r"'norm.bias' has shape \[2\] in the fine-tuned model and \[6\] in the base"):
        task_vector(base, base | {"norm.bias": torch.zeros(2)})
    with pytest.raises(MergeError, match="the task vector has a tensor 'x', which the base does not have"):
        apply_task_vector(base, {"x": torch.zeros(1)})
    with pytest.raises(MergeError, match=r"'norm.bias' has shape \[1\] in the task vector and \[6\] in the base"):
        apply_task_vector(base, {"norm.bias": torch.zeros(1)})
    with pytest.raises(MergeError, match="there are no task vectors to merge"):
        merge_task_vectors([], WeightAverage())
    with pytest.raises(MergeError, match="task vectors 0 and 1 differ in their tensors, first in 'b'"):
        merge_task_vectors([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}], WeightAverage())
    with pytest.raises(MergeError, match=r"'a' has shape \[2\] in task vector 1 and \[1\] in task vector 0"):
        merge_task_vectors([{"a": torch.zeros(1)}, {"a": torch.zeros(2)}], WeightAverage())


@pytest.mark.parametrize(
    ("old", "new"),
    [("survey", "collect_statistics"), ("survey_fields", "statistics_fields"), ("combine_run", "combine_chunk")],
)
def test_a_method_with_an_old_name_is_refused_when_it_is_defined(old, new):
    with pytest.raises(TypeError, match=f"Mine.{old}: this is called {new}"):
        type("Mine", (TaskArithmetic,), {old: None})
