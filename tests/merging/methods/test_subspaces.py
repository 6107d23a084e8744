"""SVC, KnOTS and Core Space against their equations in float64."""

import numpy as np
import pytest
import torch

from freemerge.merging import SVC, CoreSpace, KnOTS, PCBMerging, TaskArithmetic, Ties, TSVMerge, merge_task_vectors


def draw(shape, tasks, rank=None):
    generator = np.random.default_rng(0)
    if rank is None:
        return [generator.standard_normal(shape) for _ in range(tasks)]
    rows, columns = shape
    return [generator.standard_normal((rows, rank)) @ generator.standard_normal((rank, columns)) for _ in range(tasks)]


def merged(deltas, method):
    vectors = [{"w": torch.from_numpy(delta).float()} for delta in deltas]
    return merge_task_vectors(vectors, method)["w"].double().numpy()


def calibrated(deltas, matrix, alpha, form):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    result = np.zeros_like(matrix)
    for r in range(len(s)):
        own = s[r] * vh[r]
        counts = [own @ (u[:, r] @ delta) / np.square(u[:, r] @ delta).sum() for delta in deltas]
        if form == "paper":
            factor = len(deltas) / sum(max(alpha, count) for count in counts)
        else:
            factor = 1 / max(np.mean(counts), alpha) if min(counts) > 0 else 1.0
        result += factor * s[r] * np.outer(u[:, r], vh[r])
    return result


@pytest.mark.parametrize("shape", [(20, 20), (30, 12), (12, 30)])
class TestSVC:
    @pytest.mark.parametrize("form", ["paper", "released"])
    @pytest.mark.parametrize("alpha", [0.1, 1.0])
    def test_of_task_arithmetic(self, shape, form, alpha):
        deltas = draw(shape, 3)
        deltas = [delta + deltas[0] for delta in deltas]  # so that they share directions
        expected = 0.5 * calibrated(deltas, sum(deltas), alpha, form)
        result = merged(deltas, SVC(TaskArithmetic(1.0), scale=0.5, alpha=alpha, form=form))
        np.testing.assert_allclose(result, expected, atol=2e-4 * np.abs(expected).max())

    def test_of_another_method(self, shape):
        deltas = draw(shape, 2)
        plain = merged(deltas, TSVMerge())
        expected = calibrated(deltas, plain, 0.1, "released")
        np.testing.assert_allclose(merged(deltas, SVC(TSVMerge(), form="released")), expected, atol=2e-3)

    def test_shared_directions_are_counted_once(self, shape):
        """The calibrated sum of equal models is that model, for any scale of the wrapped method."""
        (delta,) = draw(shape, 1)
        for scale in (1.0, 0.3):
            np.testing.assert_allclose(merged([delta] * 4, SVC(TaskArithmetic(scale))), delta, atol=1e-4)


def test_svc_leaves_the_rest_and_takes_experts_one_by_one():
    name = "layers.0.experts.down_proj"
    vectors = [{name: torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
    whole = merge_task_vectors(vectors, SVC(TaskArithmetic(1.0)))[name]
    for index in range(3):
        alone = merge_task_vectors([{"w": vector[name][index]} for vector in vectors], SVC(TaskArithmetic(1.0)))["w"]
        torch.testing.assert_close(whole[index], alone)
    biases = [{"b": torch.randn(9, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
    expected = 0.5 * (biases[0]["b"] + biases[1]["b"])
    torch.testing.assert_close(merge_task_vectors(biases, SVC(TaskArithmetic(1.0), 0.5))["b"], expected)
    assert not merge_task_vectors([{"w": torch.zeros(4, 5)}] * 2, SVC(TaskArithmetic(1.0)))["w"].any()


@pytest.mark.parametrize("shape", [(24, 24), (40, 18), (18, 40)])
@pytest.mark.parametrize("rank", [3, None])
class TestSubspaces:
    @pytest.mark.parametrize("wrapper", [KnOTS, CoreSpace])
    def test_nothing_is_lost(self, shape, rank, wrapper):
        """Linear methods give the same merge as without a common basis."""
        deltas = draw(shape, 3, rank)
        expected = 0.4 * sum(deltas)
        result = merged(deltas, wrapper(TaskArithmetic(0.8), scale=0.5))
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())

    def test_knots(self, shape, rank):
        deltas = draw(shape, 3, rank)
        u, s, vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        kept = s > 1e-6 * s[0]
        parts = np.split(vh[kept], 3, axis=1)
        inner = merged(parts, Ties(0.3, scope="tensor"))
        expected = (u[:, kept] * s[kept]) @ inner
        np.testing.assert_allclose(merged(deltas, KnOTS(Ties(0.3))), expected, atol=1e-3 * np.abs(expected).max())

    @pytest.mark.parametrize("inner", [Ties(0.5), PCBMerging(0.5)], ids=["ties", "pcb"])
    def test_core_space(self, shape, rank, inner):
        deltas = draw(shape, 2, rank)
        lefts, rights = [], []
        for delta in deltas:
            u, s, vh = np.linalg.svd(delta, full_matrices=False)
            kept = s > 1e-6 * s[0]
            lefts.append(u[:, kept] * np.sqrt(s[kept]))
            rights.append(np.sqrt(s[kept])[:, None] * vh[kept])
        left, s, _ = np.linalg.svd(np.concatenate(lefts, axis=1), full_matrices=False)
        left = left[:, s > 1e-6 * s[0]]
        _, s, right = np.linalg.svd(np.concatenate(rights, axis=0), full_matrices=False)
        right = right[s > 1e-6 * s[0]]
        expected = left @ merged([left.T @ delta @ right.T for delta in deltas], inner) @ right
        result = merged(deltas, CoreSpace(inner))
        assert np.abs(result - expected).max() < 5e-3 * np.abs(expected).max()


def test_subspaces_take_vectors_experts_and_silence():
    name = "layers.0.experts.down_proj"
    for wrapper in (KnOTS(), CoreSpace()):
        vectors = [{name: torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
        whole = merge_task_vectors(vectors, wrapper)[name]
        for index in range(3):
            alone = merge_task_vectors([{"w": vector[name][index]} for vector in vectors], wrapper)["w"]
            torch.testing.assert_close(whole[index], alone)
        biases = [{"b": torch.randn(50, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
        torch.testing.assert_close(
            merge_task_vectors(biases, wrapper)["b"], merge_task_vectors(biases, wrapper.method)["b"]
        )
        assert not merge_task_vectors([{"w": torch.zeros(4, 5)}] * 2, wrapper)["w"].any()
