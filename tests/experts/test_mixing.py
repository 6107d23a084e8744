"""Mixtures of experts are weighted sums."""

import pytest
import torch

from freemerge.experts import emr_experts, extract, extract_low_rank, mix


def residuals() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(9, 7, generator=generator), "b": torch.randn(9, generator=generator)} for _ in range(3)]


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_a_mixture_is_the_weighted_sum(kind: str) -> None:
    experts = [extract(r, 0.3) if kind == "sparse" else extract_low_rank(r, rank=2) for r in residuals()]
    weights = [0.5, 0.25, 0.25]
    dense = mix(experts, weights).dense()
    for name in ("w", "b"):
        expected = sum(
            weight * expert.dense().get(name, torch.zeros(1)) for expert, weight in zip(experts, weights, strict=True)
        )
        torch.testing.assert_close(dense[name], expected)


def test_a_tensor_that_is_whole_in_one_expert_is_whole_in_the_sum() -> None:
    first, second = extract_low_rank(residuals()[0], rank=1), extract_low_rank(residuals()[1], rank=7)
    assert "w" in second.whole
    torch.testing.assert_close(
        mix([first, second], [1.0, 2.0]).dense()["w"], first.dense()["w"] + 2 * second.dense()["w"]
    )


def test_refusals() -> None:
    sparse, low_rank = extract(residuals()[0], 0.3), extract_low_rank(residuals()[0], rank=1)
    with pytest.raises(ValueError, match="all be sparse or all be low-rank to be mixed, got low_rank, sparse"):
        mix([sparse, low_rank], [1.0, 1.0])
    masked = emr_experts({"a": residuals()[0], "b": residuals()[1]})[1]
    with pytest.raises(ValueError, match="got masked"):
        mix(list(masked.values()), [0.5, 0.5])
    with pytest.raises(ValueError, match="got 1 experts and 0 weights"):
        mix([sparse], [])
