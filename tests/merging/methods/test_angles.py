"""Methods of practitioners against their formulas: SLERP and relatives, Model Stock, SCE, NearSwap, Breadcrumbs."""

import math

import numpy as np
import pytest
import torch

from freemerge.merging import (
    SCE,
    ArceeFusion,
    Breadcrumbs,
    KarcherMean,
    LocalizeAndStitch,
    MergeError,
    ModelStock,
    MultiSlerp,
    NearSwap,
    Slerp,
    WeightSlerp,
    merge,
    merge_task_vectors,
)
from freemerge.testing import check_method


def draw(tasks, size=60):
    return [np.random.default_rng(seed).standard_normal(size) * (seed + 1) + 0.5 for seed in range(tasks)]


def merged(deltas, method):
    return merge_task_vectors([{"w": torch.from_numpy(delta).float()} for delta in deltas], method)["w"].numpy()


def units(deltas):
    return [delta / np.linalg.norm(delta) for delta in deltas]


class TestSlerp:
    @pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
    def test_is_the_formula(self, t):
        one, two = draw(2)
        angle = math.acos(float(np.dot(*units([one, two]))))
        expected = (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)
        np.testing.assert_allclose(merged([one, two], Slerp(2.0, t)), 2 * expected, atol=1e-5)

    def test_at_equal_norms_the_norm_stays(self):
        one, two = units(draw(2))
        assert np.linalg.norm(merged([one, two], Slerp())) == pytest.approx(1.0, abs=1e-6)
        assert np.linalg.norm(one + two) / 2 < 0.95

    def test_parallel_and_silent_vectors_are_averaged(self):
        (one,) = draw(1)
        for other in (3 * one, -one, 0 * one):
            np.testing.assert_allclose(merged([one, other], Slerp(t=0.25)), 0.75 * one + 0.25 * other, atol=1e-6)

    def test_takes_two_models(self):
        with pytest.raises(MergeError, match="Slerp merges two models, got 3; KarcherMean and MultiSlerp merge more"):
            merged(draw(3), Slerp())
        with pytest.raises(ValueError, match=r"`t` must lie in \[0, 1\], got 1.5"):
            Slerp(t=1.5)


def whole_merge(base, models, method):
    """The merged weights of one tensor, float64 in and out."""
    tensors = [{"w": torch.from_numpy(values)} for values in (base, *models)]
    return merge(tensors[0], tensors[1:], method)["w"].numpy()


class TestWeightSlerp:
    """Between weights that are far apart, mergekit's formula; between weights of one direction, the chord."""

    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_from_the_base_to_a_model(self, t):
        base, model = (values.reshape(6, 10) for values in draw(2))
        angle = math.acos(float(np.sum(base * model) / np.linalg.norm(base) / np.linalg.norm(model)))
        expected = (math.sin((1 - t) * angle) * base + math.sin(t * angle) * model) / math.sin(angle)
        np.testing.assert_allclose(whole_merge(base, [model], WeightSlerp(t)), expected, atol=1e-6)

    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_between_two_models_the_base_has_no_part(self, t):
        base, one, two = draw(3)
        angle = math.acos(float(np.dot(*units([one, two]))))
        expected = (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)
        for start in (base, 0 * base):
            np.testing.assert_allclose(whole_merge(start, [one, two], WeightSlerp(t)), expected, atol=1e-5)

    def test_nearly_parallel_weights_are_on_the_chord(self):
        base = draw(1)[0]
        model = base + 1e-3 * np.random.default_rng(5).standard_normal(60)
        assert np.dot(*units([base, model])) > 0.9995
        np.testing.assert_allclose(whole_merge(base, [model], WeightSlerp(0.25)), 0.75 * base + 0.25 * model, atol=1e-7)

    def test_what_the_engine_relies_on(self):
        check_method(WeightSlerp(0.3), models=1)
        check_method(WeightSlerp(0.3), models=2, symmetric=False)

    def test_needs_the_weights_of_at_most_two_models(self):
        with pytest.raises(MergeError, match="one model into the base, or two models, got 3"):
            merged(draw(3), WeightSlerp())
        with pytest.raises(MergeError, match="'w': this method needs the weights themselves"):
            merged(draw(2), WeightSlerp())


class TestArceeFusion:
    @pytest.mark.parametrize("shape", [(12, 9), (60,), (4, 3, 3, 3), ()], ids=str)
    def test_is_the_formula(self, shape):
        generator = np.random.default_rng(3)
        base = generator.standard_normal(shape)
        model = base + 0.1 * generator.standard_normal(shape)

        def softmax(values):
            powers = np.exp(values - values.max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True) + 1e-8

        rows = (np.atleast_1d(model), np.atleast_1d(base))
        own, before = map(softmax, rows)
        importance = np.abs(rows[0] - rows[1]) * (own * np.log(own / before)).sum(-1, keepdims=True)
        ordered = np.sort(importance.ravel())
        first, median, third = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
        taken = importance >= median + 1.5 * (third - first)
        assert 0 < taken.sum() <= max(1, 0.4 * taken.size)
        expected = np.where(taken, *rows).reshape(shape)
        np.testing.assert_allclose(
            whole_merge(np.asarray(base), [np.asarray(model)], ArceeFusion()), expected, atol=1e-6
        )

    def test_what_the_engine_relies_on(self):
        check_method(ArceeFusion(), models=1)

    def test_takes_one_model(self):
        with pytest.raises(MergeError, match="ArceeFusion merges one model into the base, got 2"):
            merged(draw(2), ArceeFusion())


class TestLocalizeAndStitch:
    @pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
    def test_is_the_formula(self, density):
        deltas = draw(3, 200)
        kept = [np.abs(delta) >= np.sort(np.abs(delta))[len(delta) - int(density * len(delta))] for delta in deltas]
        total = sum(delta * mask for delta, mask in zip(deltas, kept, strict=True))
        expected = 0.5 * total / np.maximum(sum(mask.astype(int) for mask in kept), 1)
        np.testing.assert_allclose(merged(deltas, LocalizeAndStitch(density, 0.5)), expected, atol=1e-6)

    def test_ranks_over_the_whole_model_or_within_each_tensor(self):
        vectors = [{"small": torch.full((10,), 0.1 * k), "large": torch.arange(1.0, 11.0) * k} for k in (1, 2)]
        whole = merge_task_vectors(vectors, LocalizeAndStitch(0.25))
        assert torch.equal(whole["small"], torch.zeros(10))
        assert torch.equal(whole["large"], torch.tensor([0.0] * 5 + [1.5 * value for value in range(6, 11)]))
        within = merge_task_vectors(vectors, LocalizeAndStitch(0.1, scope="tensor"))
        assert torch.allclose(within["small"], torch.full((10,), 0.15))
        assert torch.equal(within["large"], torch.tensor([0.0] * 9 + [15.0]))

    def test_parameters_are_checked(self):
        with pytest.raises(ValueError, match=r"`density` must lie in \(0, 1\], got 0"):
            LocalizeAndStitch(0)
        with pytest.raises(ValueError, match="`scale` must be one number"):
            LocalizeAndStitch(scale=[1.0, 2.0])


def multislerp(deltas, weights):
    """mergekit's steps: mean direction, tangent space, average, exponential map."""
    weights = np.array(weights) / sum(weights)
    directions = units(deltas)
    mean = sum(weight * direction for weight, direction in zip(weights, directions, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (d - (d @ mean) * mean) for w, d in zip(weights, directions, strict=True))
    length = np.linalg.norm(tangent) + 1e-8
    result = mean * np.cos(length) + tangent * (np.sin(length) / length)
    return result * sum(weight * np.linalg.norm(delta) for weight, delta in zip(weights, deltas, strict=True))


def karcher(deltas, weights, iterations=200):
    """Gradient descent on the sphere until convergence."""
    weights = np.array(weights) / sum(weights)
    directions = units(deltas)
    mean = units([sum(weight * direction for weight, direction in zip(weights, directions, strict=True))])[0]
    for _ in range(iterations):
        step = 0
        for weight, direction in zip(weights, directions, strict=True):
            angle = math.acos(np.clip(direction @ mean, -1, 1))
            step = step + weight * angle / math.sin(angle) * (direction - math.cos(angle) * mean)
        size = np.linalg.norm(step)
        if size < 1e-12:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
    return mean * sum(weight * np.linalg.norm(delta) for weight, delta in zip(weights, deltas, strict=True))


class TestMeansOnTheSphere:
    @pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.5]])
    def test_multi_slerp(self, weights):
        deltas = draw(3)
        np.testing.assert_allclose(merged(deltas, MultiSlerp(1.0, weights)), multislerp(deltas, weights), atol=1e-5)

    @pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.5, 4.0]])
    def test_karcher(self, weights):
        deltas = draw(4)
        expected = karcher(deltas, weights)
        result = merged(deltas, KarcherMean(coefficients=weights, iterations=100, tolerance=1e-9))
        np.testing.assert_allclose(result, expected, atol=1e-5)
        np.testing.assert_allclose(merged(deltas, KarcherMean(coefficients=weights)), expected, atol=1e-3)

    def test_of_two_it_is_slerp(self):
        deltas = [3 * unit for unit in units(draw(2))]
        np.testing.assert_allclose(merged(deltas, KarcherMean()), merged(deltas, Slerp()), atol=1e-5)

    @pytest.mark.parametrize("method", [MultiSlerp(), KarcherMean()], ids=repr)
    def test_one_silent_and_opposite_models(self, method):
        (one,) = draw(1)
        np.testing.assert_allclose(merged([one], method), one, rtol=1e-5)
        assert not merged([one, -one], method).any()
        assert not merged([0 * one, 0 * one], method).any()
        np.testing.assert_allclose(merged([one, 0 * one], method), one / 2, rtol=1e-5)  # half of the norm

    def test_wrong_parameters(self):
        for build, message in [
            (lambda: KarcherMean(coefficients=[1.0, -1.0]), "`coefficients` must be at least 0 and not all 0"),
            (lambda: MultiSlerp(coefficients=[0.0, 0.0]), "`coefficients` must be at least 0 and not all 0"),
            (lambda: KarcherMean(iterations=-1), "`iterations` must be an integer of at least 0, got -1"),
        ]:
            with pytest.raises(ValueError, match=message):
                build()
        with pytest.raises(MergeError, match="KarcherMean has 2 values in `coefficients` for 3 fine-tuned models"):
            merged(draw(3), KarcherMean(coefficients=[1.0, 1.0]))


class TestModelStock:
    def test_is_the_formula(self):
        deltas = [delta + 3 for delta in draw(3)]
        directions = units(deltas)
        cosine = np.mean([directions[i] @ directions[j] for i in range(3) for j in range(i)])
        ratio = 3 * cosine / (1 + 2 * cosine)
        np.testing.assert_allclose(merged(deltas, ModelStock()), ratio * sum(deltas) / 3, rtol=1e-5)

    def test_equal_models_come_back_and_opposite_ones_do_not(self):
        (one,) = draw(1)
        np.testing.assert_allclose(merged([one, one], ModelStock()), one, rtol=1e-5)
        assert not merged([one, -0.5 * one], ModelStock()).any()
        with pytest.raises(MergeError, match="ModelStock needs at least two fine-tuned models"):
            merged([one], ModelStock())


def sce(deltas, select):
    """mergekit's steps in float64."""
    values = np.stack(deltas)
    variance = values.var(axis=0)
    kept = np.argsort(variance)[len(variance) - int(select * np.count_nonzero(variance)) :]
    if select < 1:
        mask = np.zeros(len(variance))
        mask[kept] = 1
        values = values * mask
    weights = np.square(values).mean(axis=1)
    weights = (weights / weights.sum())[:, None]
    sign = np.where(values.sum(axis=0) >= 0, 1, -1)
    weights = weights * (np.sign(values) == sign)
    total = weights.sum(axis=0)
    return (values * weights).sum(axis=0) / np.where(total == 0, 1, total)


class TestSCE:
    @pytest.mark.parametrize("select", [1.0, 0.5, 0.1])
    def test_is_the_formula(self, select):
        deltas = draw(3)
        deltas[0][:7] = deltas[1][:7] = deltas[2][:7] = 1.0  # where they agree there is no variance
        np.testing.assert_allclose(merged(deltas, SCE(2.0, select)), 2 * sce(deltas, select), atol=1e-5)

    def test_silence_and_nothing_selected(self):
        (one,) = draw(1)
        assert not merged([0 * one, 0 * one], SCE()).any()
        assert not merged([one, one], SCE(select=0.5)).any()
        with pytest.raises(ValueError, match=r"`select` must lie in \(0, 1\], got 0"):
            SCE(select=0)


def test_nearswap_moves_by_at_most_t():
    result = merged([np.array([0.5, -0.05, 0.0, 0.1, -7.0])], NearSwap(0.1))
    np.testing.assert_allclose(result, [0.1, -0.05, 0.0, 0.1, -0.1], rtol=1e-6)
    with pytest.raises(MergeError, match="NearSwap merges one model into the base, got 2"):
        merged(draw(2), NearSwap())
    with pytest.raises(ValueError, match="`t` must be above 0, got 0"):
        NearSwap(0)


@pytest.mark.parametrize("scale", [0.5, [0.5, 2.0, 1.0]])
def test_breadcrumbs_with_an_election(scale):
    deltas = draw(3, 100)
    values = np.stack(deltas)
    ranks = np.abs(values).argsort(axis=1).argsort(axis=1)
    values = np.where((ranks >= 60) & (ranks < 95), values, 0) * np.array(scale).reshape(-1, 1)
    sign = np.sign(values.sum(axis=0))
    agree = (np.sign(values) == sign) & (values != 0)
    expected = (values * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    result = merged(deltas, Breadcrumbs(bottom=0.6, top=0.05, scale=scale, elect=True))
    np.testing.assert_allclose(result, expected, atol=1e-6)
