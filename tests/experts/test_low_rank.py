"""Low-rank experts: the best approximation of each weight within a budget of values."""

import pytest
import torch

from freemerge.experts import LowRankExpert, extract_low_rank


def residual() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(12, 8, generator=generator),
        "a.bias": torch.randn(12, generator=generator),
        "conv.weight": 5 * torch.randn(6, 4, 3, 3, generator=generator),
        "norm.running_mean": torch.randn(6, generator=generator),
    }


def test_a_rank_keeps_the_leading_singular_directions_and_vectors_whole() -> None:
    tensors = residual()
    expert = extract_low_rank(tensors, rank=2)
    dense = expert.dense()
    assert set(dense) == {"a.weight", "a.bias", "conv.weight"}
    assert torch.equal(dense["a.bias"], tensors["a.bias"])
    matrix = tensors["conv.weight"].reshape(6, 36).double()
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (u[:, :2] * sigma[:2]) @ v[:2]
    torch.testing.assert_close(dense["conv.weight"].reshape(6, 36).double(), best, atol=1e-5, rtol=1e-5)
    assert expert.num_values == 2 * (12 + 8) + 12 + 2 * (6 + 36)


def test_a_full_rank_is_the_whole_tensor() -> None:
    tensors = residual()
    expert = extract_low_rank(tensors, rank=99)
    assert set(expert.whole) == {"a.weight", "a.bias", "conv.weight"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expert.dense().items())


def test_a_density_keeps_the_directions_that_explain_most_per_value() -> None:
    tensors = {name: tensor for name, tensor in residual().items() if tensor.dim() > 1}
    expert = extract_low_rank(tensors, density=0.5)
    budget = round(0.5 * (96 + 216))
    assert expert.num_values <= budget
    gains = []
    for name, tensor in tensors.items():
        matrix = tensor.reshape(len(tensor), -1)
        gains += [(float(s**2) / sum(matrix.shape), name) for s in torch.linalg.svdvals(matrix)]
    spent, expected = 0, dict.fromkeys(tensors, 0)
    for _, name in sorted(gains, reverse=True):
        cost = sum(tensors[name].reshape(len(tensors[name]), -1).shape)
        if spent + cost <= budget:
            spent, expected[name] = spent + cost, expected[name] + 1
    assert {name: left.shape[1] for name, left in expert.left.items()} == {n: r for n, r in expected.items() if r}


def test_sums_are_rounded_once_and_scaling_scales_the_effect() -> None:
    expert = extract_low_rank(residual(), rank=1)
    for name, delta in expert.dense().items():
        weight = torch.randn(delta.shape).bfloat16()
        assert torch.equal(expert.added(name, weight), (weight.float() + delta).bfloat16())
        torch.testing.assert_close(expert.scaled(0.3).dense()[name], 0.3 * delta)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="give either `rank` or `density`"):
        extract_low_rank(residual())
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        extract_low_rank(residual(), rank=0)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 2"):
        extract_low_rank(residual(), density=2.0)
    with pytest.raises(ValueError, match=r"'w' of shape \(3, 4\) has factors of shapes \(3, 1\) and \(2, 4\)"):
        LowRankExpert({"w": torch.ones(3, 1)}, {"w": torch.ones(2, 4)}, {}, {"w": (3, 4)})
