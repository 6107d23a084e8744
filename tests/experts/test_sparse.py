"""Extraction: exactly the top entries of a model, tensor or row, and the released rescaling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.experts import SparseExpert, extract


def residual(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 10, generator=generator),
        "a.bias": 3 * torch.randn(6, generator=generator),
        "b.weight": 0.1 * torch.randn(4, 5, 5, generator=generator),
        "steps": torch.tensor(7),
    }


@given(seed=st.integers(0, 1000), density=st.floats(0.01, 1.0), levels=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_model_scope_keeps_the_top_of_the_model_with_ties(seed: int, density: float, levels: int) -> None:
    tensors = {name: (t * levels).round() for name, t in residual(seed).items() if t.is_floating_point()}
    expert = extract(tensors, density)
    flat = torch.cat([t.flatten() for t in tensors.values()]).abs()
    count = max(1, round(density * flat.numel()))
    assert expert.num_values == count
    dense = torch.cat([expert.dense().get(name, torch.zeros_like(t)).flatten() for name, t in tensors.items()])
    kept = torch.cat([expert.values[name] for name in expert.values]).abs().sort(descending=True).values
    assert torch.equal(kept, flat.sort(descending=True).values[:count])
    whole = torch.cat([t.flatten() for t in tensors.values()])
    assert torch.equal(dense[dense != 0], whole[dense != 0])  # kept entries are unchanged


def test_earlier_positions_are_kept_among_equal_magnitudes() -> None:
    expert = extract({"x": torch.tensor([1.0, -2.0, 2.0, 2.0])}, 0.5)
    assert expert.indices["x"].tolist() == [1, 2]


def test_tensor_scope_keeps_a_fraction_of_each_tensor() -> None:
    expert = extract(residual(), 0.1, scope="tensor")
    assert {name: len(values) for name, values in expert.values.items()} == {"a.weight": 6, "a.bias": 1, "b.weight": 10}
    tensor = residual()["a.weight"].flatten().abs()
    assert expert.indices["a.weight"].tolist() == sorted(tensor.topk(6).indices.tolist())


def test_row_scope_keeps_a_fraction_of_each_row() -> None:
    expert = extract({"w": residual()["a.weight"]}, 0.2, scope="row")
    assert (expert.dense()["w"] != 0).sum(dim=1).tolist() == [2] * 6


def test_released_rescaling_is_minus_log10_d_times_the_ratio_of_means() -> None:
    density, tensor = 0.1, residual()["a.weight"]
    plain = extract({"w": tensor}, density, scope="tensor")
    released = extract({"w": tensor}, density, scope="tensor", rescale="released")
    mu = -plain.values["w"].abs().mean() * math.log10(density) / tensor.abs().mean()
    assert mu > 1
    torch.testing.assert_close(released.values["w"], plain.values["w"] * mu)


def test_density_one_keeps_the_residual() -> None:
    tensors = {name: t for name, t in residual().items() if t.is_floating_point()}
    dense = extract(tensors, 1.0).dense()
    assert all(torch.equal(dense[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_over_a_large_model_equals_a_full_sort(dtype: torch.dtype) -> None:
    """Large enough that the streamed order statistic uses brackets instead of sorting; bfloat16 has many ties."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (scale * torch.randn(shape, generator=generator)).to(dtype)
        for name, scale, shape in (("a", 1.0, (700, 900)), ("b", 3.0, (900,)), ("c", 0.2, (1000, 700)))
    }
    expert = extract(tensors, 0.013)
    flat = torch.cat([t.float().flatten().abs() for t in tensors.values()])
    expected = flat.argsort(descending=True, stable=True)[: round(0.013 * len(flat))].sort().values
    starts = dict(zip(tensors, (0, 630_000, 630_900), strict=True))
    found = torch.cat([index + starts[name] for name, index in expert.indices.items()])
    assert torch.equal(found, expected)


def test_whole_vectors_are_kept_within_half_the_budget() -> None:
    tensors = {"w": torch.randn(40, 50), "small": torch.full((20,), 1e-3), "large": torch.full((60,), 1e-3)}
    expert = extract(tensors, 0.05, vectors="whole")  # a budget of 104: 20 values fit into its half, 80 do not
    assert {name: len(value) for name, value in expert.values.items()} == {"w": 84, "small": 20}
    assert "small" not in extract(tensors, 0.05, vectors="none").shapes
    assert extract(tensors, 0.05).num_values == 104


def test_running_statistics_are_left_out_by_default() -> None:
    tensors = {"norm.running_var": torch.full((9,), 9.0), "norm.weight": torch.ones(9)}
    assert set(extract(tensors, 1.0).shapes) == {"norm.weight"}
    assert set(extract(tensors, 1.0, exclude=None).shapes) == {"norm.running_var", "norm.weight"}


def test_a_residual_of_zeros_extracts_zeros() -> None:
    expert = extract({"w": torch.zeros(4, 5)}, 0.1, rescale="released")
    assert expert.num_values == 2
    assert not expert.flat_values().any()


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        extract(residual(), density)


def test_unknown_scope_and_rescale_and_nothing_to_extract_are_refused() -> None:
    with pytest.raises(ValueError, match="scope must be 'model', 'tensor' or 'row', got 'layer'"):
        extract(residual(), 0.1, scope="layer")
    with pytest.raises(ValueError, match="rescale must be 'none' or 'released', got 'paper'"):
        extract(residual(), 0.1, rescale="paper")
    with pytest.raises(ValueError, match="no floating-point entries"):
        extract({"steps": torch.tensor([1, 2])}, 0.1)


def test_with_values_and_scaled_keep_the_support() -> None:
    expert = extract(residual(), 0.1, metadata={"task": "t"})
    doubled = expert.with_values(2 * expert.flat_values())
    assert torch.equal(doubled.flat_values(), expert.scaled(2.0).flat_values())
    assert all(torch.equal(doubled.indices[name], expert.indices[name]) for name in expert.indices)
    assert doubled.metadata == {"task": "t", "density": "0.1"}


def test_an_inconsistent_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="must name the same tensors"):
        SparseExpert({"w": torch.tensor([0])}, {}, {"w": (3,)})
    with pytest.raises(ValueError, match="'w' has indices of shape"):
        SparseExpert({"w": torch.tensor([0])}, {"w": torch.zeros(2)}, {"w": (3,)})
