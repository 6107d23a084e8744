"""The out-of-distribution score is a log density, compared with torch's Gaussian distributions."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from freemerge.models.out_of_distribution import OutOfDistributionScore


def clusters(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tasks' features (N, 3): correlated Gaussians around different centers, one wide and one narrow."""
    generator = torch.Generator().manual_seed(0)
    tasks = torch.arange(count) % 2
    shapes = torch.tensor([[[2.0, 0, 0], [1.0, 1, 0], [0, 0, 1]], [[0.3, 0, 0], [0, 0.2, 0], [0.1, 0, 0.1]]])
    centers = torch.tensor([[0.0, 0, 0], [6.0, 0, 1]])
    noise = torch.randn(count, 3, 1, generator=generator)
    return centers[tasks] + (shapes[tasks] @ noise).squeeze(2), tasks


def test_the_score_is_the_log_density_of_the_most_likely_tasks_gaussian() -> None:
    features, tasks = clusters()
    score = OutOfDistributionScore(2, 3, directions=3)
    score.fit(features, tasks)
    # In all three directions the features are only rotated and scaled, which shifts every log density by one constant.
    densities = []
    for task in range(2):
        own = features[tasks == task].double()
        densities.append(MultivariateNormal(own.mean(dim=0), own.T.cov(correction=0)).log_prob(features.double()))
    expected, found = 2 * torch.stack(densities).amax(dim=0), score(features).double()
    shift = found - expected
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.999
    assert float((shift - shift.median()).abs().quantile(0.9)) < 0.5  # the covariances' shrinkage changes them slightly


def test_inputs_far_from_all_tasks_have_a_lower_score() -> None:
    features, tasks = clusters()
    score = OutOfDistributionScore(2, 3)
    assert score(features).tolist() == [0.0] * 4000  # before `fit`
    assert score.threshold == float("-inf")
    score.fit(features, tasks)
    threshold = score(features).quantile(0.01)
    between, beyond = torch.tensor([[3.0, -3.0, 0.5]]), torch.tensor([[6.0, 3.0, 1.0]])
    assert score(between) < threshold
    assert score(beyond) < threshold  # near the narrow task by distance alone
    alone = score(features[7:8])
    torch.testing.assert_close(score(features)[7:8], alone)


def test_constant_features_and_few_inputs_give_finite_scores() -> None:
    features = torch.cat([torch.randn(6, 4), torch.zeros(6, 2)], dim=1)
    score = OutOfDistributionScore(2, 6, directions=16)  # at most as many as there are features
    assert score.directions.shape == (6, 6)
    score.fit(features, torch.tensor([0, 0, 0, 0, 0, 1]))
    assert score(features).isfinite().all()
    again = OutOfDistributionScore(2, 6, directions=16)
    again.load_state_dict(score.state_dict())
    assert torch.equal(again(features), score(features))
    without = OutOfDistributionScore(2, 6, directions=0)
    without.fit(features, torch.tensor([0, 0, 0, 0, 0, 1]))
    assert without(features).tolist() == [0.0] * 6
    with pytest.raises(ValueError, match="no inputs of task 1; fit it on inputs of all 2"):
        score.fit(features, torch.zeros(6, dtype=torch.long))
