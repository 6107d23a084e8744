"""Parameters with one value per model, against arithmetic written out."""

import pytest
import torch

from freemerge.merging import (
    Breadcrumbs,
    Dare,
    MergeError,
    TaskArithmetic,
    Ties,
    WeightAverage,
    merge_task_vectors,
)


def vectors(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def merged(method, *rows):
    return merge_task_vectors(vectors(*rows), method)["w"]


def test_weighted_average():
    assert merged(WeightAverage([1.0, 3.0]), [4.0, 0.0], [0.0, 8.0]).tolist() == [1.0, 6.0]
    with pytest.raises(ValueError, match="the sum of `coefficients` is 0"):
        WeightAverage([1.0, -1.0])


def test_ties_with_coefficients():
    """Weighted: [1, −2], [3, 4], [−6, 1]; signs of the sums: −, +; agreeing: −6 with w = 2; 4 and 1 with w = 1 + 2."""
    rows = [[2.0, -4.0], [3.0, 4.0], [-3.0, 0.5]]
    weights = [0.5, 1.0, 2.0]
    mean = merged(Ties(1.0, 2.0, coefficients=weights), *rows)
    torch.testing.assert_close(mean, 2 * torch.tensor([-6 / 2, (4 + 1) / (1 + 2)]))
    total = merged(Ties(1.0, 2.0, coefficients=weights, mean=False), *rows)
    torch.testing.assert_close(total, 2 * torch.tensor([-6.0, 5.0]))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_density_of_each_model(scope):
    """Of four entries the first model keeps the largest one, the second three, the third all."""
    rows = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    found = merged(Ties([0.25, 0.75, 1.0], scope=scope, mean=False), *rows)
    assert found.tolist() == [1.0, 4.0, 6.0, 12.0]


def test_breadcrumbs_of_each_model():
    """The first loses its smallest entry and its largest, the second nothing; signs of the sums: −, +, −, +."""
    rows = [[1.0, 2.0, -3.0, 4.0], [-1.0, 3.0, 1.0, 5.0]]
    method = Breadcrumbs(bottom=[0.25, 0.0], top=[0.25, 0.0], scale=[1.0, 2.0], elect="sum")
    assert merged(method, *rows).tolist() == [-2.0, 8.0, -3.0, 10.0]
    method = Breadcrumbs(bottom=[0.25, 0.0], top=[0.25, 0.0], scale=[1.0, 2.0])
    assert merged(method, *rows).tolist() == [-2.0, 8.0, -1.0, 10.0]


def test_dare_of_each_model():
    rows = [torch.ones(1000).tolist(), torch.ones(1000).tolist()]
    found = merged(Dare(TaskArithmetic([1.0, 0.0]), [0.5, 0.0]), *rows)
    assert set(found.tolist()) == {0.0, 2.0}
    assert 400 < found.count_nonzero() < 600
    assert torch.equal(merged(Dare(TaskArithmetic([0.0, 1.0]), [0.5, 0.0]), *rows), torch.ones(1000))


def test_the_number_of_values_is_that_of_the_models():
    for method, field in ((Ties([0.5, 1.0]), "density"), (Dare(Ties(), [0.5, 0.1]), "drop")):
        with pytest.raises(MergeError, match=f"has 2 values in `{field}` for 3 fine-tuned models"):
            merged(method, [1.0], [2.0], [3.0])
