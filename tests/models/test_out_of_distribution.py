"""Familiarity is a log density: checked against torch's own Gaussians."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from freemerge.models.out_of_distribution import Familiarity


def clusters(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tasks' features (N, 3): correlated Gaussians around different centers, one wide and one narrow."""
    generator = torch.Generator().manual_seed(0)
    tasks = torch.arange(count) % 2
    shapes = torch.tensor([[[2.0, 0, 0], [1.0, 1, 0], [0, 0, 1]], [[0.3, 0, 0], [0, 0.2, 0], [0.1, 0, 0.1]]])
    centers = torch.tensor([[0.0, 0, 0], [6.0, 0, 1]])
    noise = torch.randn(count, 3, 1, generator=generator)
    return centers[tasks] + (shapes[tasks] @ noise).squeeze(2), tasks


def test_it_is_the_log_density_of_the_likeliest_tasks_gaussian() -> None:
    features, tasks = clusters()
    familiarity = Familiarity(2, 3, directions=3)
    familiarity.fit(features, tasks)
    # In all three directions the features are only turned and scaled, which moves every log density by one constant.
    densities = []
    for task in range(2):
        own = features[tasks == task].double()
        densities.append(MultivariateNormal(own.mean(dim=0), own.T.cov(correction=0)).log_prob(features.double()))
    expected, found = 2 * torch.stack(densities).amax(dim=0), familiarity(features).double()
    shift = found - expected
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.999
    assert float((shift - shift.median()).abs().quantile(0.9)) < 0.5  # shrinking the covariances moves them a little


def test_what_lies_apart_from_all_tasks_is_less_familiar_than_what_lies_in_one() -> None:
    features, tasks = clusters()
    familiarity = Familiarity(2, 3)
    assert familiarity(features).tolist() == [0.0] * 4000  # before it is fitted
    assert familiarity.least == float("-inf")
    familiarity.fit(features, tasks)
    least = familiarity(features).quantile(0.01)
    between, beyond = torch.tensor([[3.0, -3.0, 0.5]]), torch.tensor([[6.0, 3.0, 1.0]])
    assert familiarity(between) < least
    assert familiarity(beyond) < least  # near the narrow task by distance alone
    alone = familiarity(features[7:8])
    torch.testing.assert_close(familiarity(features)[7:8], alone)


def test_features_that_never_change_and_few_inputs_do_no_harm() -> None:
    features = torch.cat([torch.randn(6, 4), torch.zeros(6, 2)], dim=1)
    familiarity = Familiarity(2, 6, directions=16)  # at most as many as there are features
    assert familiarity.directions.shape == (6, 6)
    familiarity.fit(features, torch.tensor([0, 0, 0, 0, 0, 1]))
    assert familiarity(features).isfinite().all()
    again = Familiarity(2, 6, directions=16)
    again.load_state_dict(familiarity.state_dict())
    assert torch.equal(again(features), familiarity(features))
    without = Familiarity(2, 6, directions=0)
    without.fit(features, torch.tensor([0, 0, 0, 0, 0, 1]))
    assert without(features).tolist() == [0.0] * 6
    with pytest.raises(ValueError, match="no inputs of task 1; fit it on inputs of all 2"):
        familiarity.fit(features, torch.zeros(6, dtype=torch.long))
