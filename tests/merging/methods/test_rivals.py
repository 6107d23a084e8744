"""DARE, Breadcrumbs, TSV-Merge, Iso-C and EMR against the claims and steps of their papers."""

import numpy as np
import pytest
import torch

from freemerge.merging import (
    Breadcrumbs,
    Dare,
    EMRMerging,
    IsoC,
    MergeError,
    PCBMerging,
    TaskArithmetic,
    Ties,
    TSVMerge,
    WeightAverage,
    emr_task_vector,
    merge,
    merge_task_vectors,
)
from freemerge.merging.methods.dare import draw_mask
from freemerge.merging.methods.tsv import to_nearest_orthonormal_


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rows, columns, rank, seed):
    return normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)


class TestDare:
    def test_drops_a_fraction_and_keeps_the_expectation(self):
        vector = {"w": torch.ones(200, 500)}
        merged = merge_task_vectors([vector], Dare(TaskArithmetic(1.0), 0.9))["w"]
        assert merged.unique().tolist() == pytest.approx([0.0, 10.0])
        assert float((merged != 0).float().mean()) == pytest.approx(0.1, abs=0.005)
        assert float(merged.mean()) == pytest.approx(1.0, abs=0.05)

    def test_a_mask_depends_on_seed_model_and_tensor_alone(self):
        zero = {"a": torch.zeros(30, 30), "b": torch.zeros(900)}
        ones = {name: torch.ones_like(tensor) for name, tensor in zero.items()}
        method = Dare(TaskArithmetic(1.0), 0.5)
        alone = merge(zero, {"x": ones}, method)
        # The same mask with other models, other tensors and another order.
        beside = merge(zero, {"y": zero, "x": ones}, method)
        part = merge(zero, {"x": ones}, method, include=["b"])
        assert torch.equal(alone["a"], beside["a"])
        assert torch.equal(alone["b"], part["b"])
        # Another seed, model or tensor: another mask.
        others = [
            merge(zero, {"x": ones}, Dare(TaskArithmetic(1.0), 0.5, seed=1))["a"].flatten(),
            merge(zero, {"y": ones}, method)["a"].flatten(),
            alone["b"],
        ]
        for other in others:
            assert 0.4 < float((alone["a"].flatten() == other).float().mean()) < 0.6

    @pytest.mark.parametrize("method", [Ties(0.5), PCBMerging(0.5), WeightAverage()], ids=repr)
    def test_nothing_dropped_is_the_method_itself(self, base, models, method):
        plain, thinned = merge(base, models, method), merge(base, models, Dare(method, 0.0))
        assert all(torch.equal(plain[name], thinned[name]) for name in base)

    def test_the_wrapped_method_collects_statistics_of_the_thinned_vectors(self):
        """TIES after DARE keeps a fifth of the entries of the thinned vector, not of the original one."""
        vector = {"w": normal(100, 100), "v": 5 * normal(100)}
        merged = merge_task_vectors([vector], Dare(Ties(0.2), 0.5))
        kept = sum(int((tensor != 0).sum()) for tensor in merged.values())
        assert kept == int(0.2 * 10_100)

    def test_any_chunk_of_a_mask_can_be_drawn_separately(self):
        whole = draw_mask("x", 0, 1000, 0.3)
        for start, count in ((0, 10), (1, 10), (7, 9), (8, 8), (13, 987), (999, 1), (500, 0)):
            assert torch.equal(draw_mask("x", start, count, 0.3), whole[start : start + count])
        assert float(draw_mask("y", 12345, 100_000, 0.3).float().mean()) == pytest.approx(0.3, abs=0.01)
        assert draw_mask("x", 5, 9, 1.0).all()

    def test_probabilities_have_more_than_16_bits(self):
        rare = draw_mask("x", 0, 1 << 22, 2.0**-17)  # 32 in the mean, none or 64 if only 16 bits decided
        assert 12 <= int(rare.sum()) <= 52
        place = int(rare.nonzero()[0])
        assert draw_mask("x", place, 1, 2.0**-17).item()
        assert not draw_mask("x", place + 1, 1, 2.0**-17).item()

    def test_masks_are_stable_across_versions(self):
        """Published results must be reproducible: this mask is the same in all versions."""
        mask = draw_mask("0|1|a|w", 0, 24, 0.5).int().tolist()
        assert "".join(map(str, mask)) == "000111010000000100100100"

    def test_wrong_parameters(self, base, models):
        for build, message in [
            (lambda: Dare(Ties(), 1.0), r"`drop` must lie in \[0, 1\), got 1.0"),
            (lambda: Dare(method="Ties"), "`method` must be a MergeMethod, got 'Ties'"),
            (lambda: Dare(Ties(), seed=0.5), "`seed` must be an integer, got 0.5"),
        ]:
            with pytest.raises(ValueError, match=message):
                build()
        with pytest.raises(MergeError, match="TaskArithmetic has 1 values in `scale` for 3 fine-tuned models"):
            merge(base, models, Dare(method=TaskArithmetic([1.0])))


class TestBreadcrumbs:
    def test_removes_both_tails_of_each_tensor(self):
        vector = {"w": torch.arange(1.0, 101).reshape(10, 10), "v": 1000 * torch.arange(-50.0, 50)}
        merged = merge_task_vectors([vector], Breadcrumbs(bottom=0.8, top=0.05, scale=1.0))
        kept = vector["w"].flatten()[80:95]
        assert torch.equal(merged["w"].flatten()[80:95], kept)
        assert int((merged["w"] != 0).sum()) == 15
        plain = vector["v"].abs().sort().values
        expected = torch.where((vector["v"].abs() >= plain[80]) & (vector["v"].abs() <= plain[94]), vector["v"], 0.0)
        assert torch.equal(merged["v"], expected)

    def test_over_the_whole_model_the_tails_are_those_of_all_tensors(self):
        vector = {"w": torch.arange(1.0, 101).reshape(10, 10), "v": 1000 * torch.arange(-50.0, 50)}
        merged = merge_task_vectors([vector], Breadcrumbs(bottom=0.5, top=0.05, scale=1.0, scope="model"))
        magnitudes = torch.cat([tensor.flatten() for tensor in vector.values()]).abs().sort().values
        for name, tensor in vector.items():
            inside = (tensor.abs() >= magnitudes[100]) & (tensor.abs() <= magnitudes[189])
            assert torch.equal(merged[name], torch.where(inside, tensor, 0.0))

    def test_nothing_removed_is_task_arithmetic(self, base, models):
        plain, merged = merge(base, models, TaskArithmetic(0.4)), merge(base, models, Breadcrumbs(0, 0, 0.4))
        assert all(torch.equal(plain[name], merged[name]) for name in base)

    def test_wrong_parameters(self):
        for build, message in [
            (lambda: Breadcrumbs(bottom=1), r"`bottom` must lie in \[0, 1\), got 1"),
            (lambda: Breadcrumbs(bottom=0.9, top=0.1), r"`top` must lie in \[0, 0.1\), as `bottom` is 0.9; got 0.1"),
        ]:
            with pytest.raises(ValueError, match=message):
                build()


def plain_tsv(deltas):
    """The paper's steps in float64 NumPy."""
    left, values, right = [], [], []
    rank = min(deltas[0].shape) // len(deltas)
    for delta in deltas:
        u, s, vh = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        left.append(u[:, :rank])
        values.append(s[:rank])
        right.append(vh[:rank].T)
    factors = []
    for joined in (np.concatenate(left, 1), np.concatenate(right, 1)):
        p, _, qh = np.linalg.svd(joined, full_matrices=False)
        factors.append(p @ qh)
    return factors[0] @ np.diag(np.concatenate(values)) @ factors[1].T


class TestTSVMerge:
    @pytest.mark.parametrize("shape", [(24, 24), (40, 12), (13, 31)])
    @pytest.mark.parametrize("tasks", [1, 2, 3])
    def test_follows_the_paper(self, shape, tasks):
        deltas = [normal(*shape, seed=index) for index in range(tasks)]
        merged = merge_task_vectors([{"w": delta} for delta in deltas], TSVMerge())["w"]
        np.testing.assert_allclose(merged.numpy(), plain_tsv([delta.numpy() for delta in deltas]), atol=2e-5)

    def test_tasks_in_their_own_directions_are_summed(self):
        first, second = torch.zeros(12, 12), torch.zeros(12, 12)
        first[:6, :6], second[6:, 6:] = normal(6, 6), normal(6, 6, seed=1)
        merged = merge_task_vectors([{"w": first}, {"w": second}], TSVMerge())["w"]
        torch.testing.assert_close(merged, first + second, atol=1e-5, rtol=0)

    def test_one_task_comes_back(self):
        vector = {"w": normal(9, 20), "b": normal(5), "c": normal(2, 3, 3)}
        merged = merge_task_vectors([vector], TSVMerge())
        for name in vector:
            torch.testing.assert_close(merged[name], vector[name], atol=1e-5, rtol=0)

    def test_other_tensors_are_averaged(self):
        vectors = [{"b": normal(5, seed=seed), "s": normal(1, seed=seed).reshape(())} for seed in range(2)]
        merged, mean = merge_task_vectors(vectors, TSVMerge()), merge_task_vectors(vectors, WeightAverage())
        assert all(torch.equal(merged[name], mean[name]) for name in mean)

    def test_more_tasks_than_directions_and_silent_tasks(self):
        vectors = [{"w": normal(2, 9, seed=seed)} for seed in range(5)]
        assert torch.isfinite(merge_task_vectors(vectors, TSVMerge())["w"]).all()
        silent = {"w": torch.zeros(8, 8)}
        spoken = {"w": low_rank(8, 8, 2, 0)}
        merged = merge_task_vectors([silent, spoken], TSVMerge())["w"]
        torch.testing.assert_close(merged, spoken["w"], atol=1e-5, rtol=0)

    def test_nearest_orthonormal(self):
        columns = normal(9, 4)
        to_nearest_orthonormal_(columns)
        torch.testing.assert_close(columns.T @ columns, torch.eye(4), atol=1e-5, rtol=0)
        once = columns.clone()
        to_nearest_orthonormal_(columns)
        torch.testing.assert_close(columns, once, atol=1e-5, rtol=0)


class TestIsoC:
    @pytest.mark.parametrize("shape", [(16, 16), (30, 10), (7, 19)])
    def test_the_spectrum_is_flat_and_its_mean_kept(self, shape):
        vectors = [{"w": normal(*shape, seed=seed)} for seed in range(3)]
        total = sum(vector["w"] for vector in vectors)
        values = torch.linalg.svdvals(total)
        merged = merge_task_vectors(vectors, IsoC(1.5))["w"]
        torch.testing.assert_close(torch.linalg.svdvals(merged), torch.full_like(values, 1.5 * values.mean()))
        u, _, vh = torch.linalg.svd(total, full_matrices=False)
        torch.testing.assert_close(merged, 1.5 * values.mean() * u @ vh, atol=1e-4, rtol=1e-4)

    def test_directions_without_singular_values_are_left_out(self):
        vectors = [{"w": low_rank(20, 20, 2, seed)} for seed in (0, 10)]
        values = torch.linalg.svdvals(merge_task_vectors(vectors, IsoC())["w"])
        assert int((values > 1e-3 * values[0]).sum()) == 4
        assert not merge_task_vectors([{"w": torch.zeros(4, 4)}], IsoC())["w"].any()

    def test_other_tensors_are_averaged(self):
        vectors = [{"b": normal(5, seed=seed)} for seed in range(2)]
        assert torch.equal(merge_task_vectors(vectors, IsoC())["b"], merge_task_vectors(vectors, WeightAverage())["b"])


class TestEMR:
    def test_elects_and_takes_the_largest_that_agrees(self):
        rows = torch.tensor([[1.0, -2.0, 3.0, 0.0, -1.0], [2.0, 1.0, -1.0, 0.0, -4.0], [-1.0, 0.5, 0.0, 0.0, 1.0]])
        merged = merge_task_vectors([{"w": row} for row in rows], EMRMerging())["w"]
        assert merged.tolist() == [2.0, -2.0, 3.0, 0.0, -4.0]

    def test_one_task_comes_back_through_its_mask(self):
        vector = {"w": normal(30, 30), "b": normal(7)}
        unified = merge_task_vectors([vector], EMRMerging())
        restored, masks, rescale = emr_task_vector(unified, vector)
        assert rescale == pytest.approx(1.0)
        assert all(torch.equal(restored[name], vector[name]) for name in vector)
        assert all(masks[name].dtype == torch.bool for name in vector)

    def test_masks_bring_each_task_nearer_than_the_unified_vector(self):
        vectors = [{"w": normal(50, 50, seed=seed)} for seed in range(4)]
        unified = merge_task_vectors(vectors, EMRMerging())
        for vector in vectors:
            restored, masks, rescale = emr_task_vector(unified, vector)
            assert torch.equal(masks["w"], vector["w"] * unified["w"] > 0)
            assert 0 < rescale < 1
            assert float(restored["w"].abs().mean()) == pytest.approx(float(vector["w"].abs().mean()), rel=1e-5)
            assert (restored["w"] - vector["w"]).norm() < (unified["w"] - vector["w"]).norm()

    def test_errors_and_silent_tasks(self):
        unified = {"w": torch.ones(3)}
        restored, _, rescale = emr_task_vector(unified, {"w": torch.zeros(3)})
        assert rescale == 0
        assert not restored["w"].any()
        with pytest.raises(MergeError, match="differ in their tensors, first in 'v'"):
            emr_task_vector(unified, {"w": torch.ones(3), "v": torch.ones(1)})
        with pytest.raises(MergeError, match=r"'w' has shape \[2\] in the task's own vector and \[3\]"):
            emr_task_vector(unified, {"w": torch.ones(2)})
