"""Consensus TA and TIES against the masks' definition, and DELLA against its probabilities."""

import pytest
import torch

from freemerge.merging import (
    Consensus,
    Della,
    FRMerging,
    MergeError,
    TaskArithmetic,
    Ties,
    merge,
    merge_task_vectors,
)
from freemerge.merging.methods.dare import draw_uniform


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestConsensus:
    def test_by_hand(self):
        """τ = [4, 1, 0, 3]: an entry is used where |v_k| > |τ − v_k|."""
        vectors = [{"w": torch.tensor(row)} for row in ([3.0, 0.4, 5.0, 2.0], [1.0, 0.6, -5.0, 1.0])]
        for tasks, expected in ((0, [4.0, 1.0, 0.0, 3.0]), (1, [4.0, 1.0, 0.0, 3.0]), (2, [0.0, 0.0, 0.0, 0.0])):
            merged = merge_task_vectors(vectors, Consensus(scale=1.0, threshold=1.0, tasks=tasks))["w"]
            assert merged.tolist() == pytest.approx(expected), tasks
        assert merge_task_vectors(vectors, Consensus(scale=2.0, threshold=0.3))["w"].tolist() == [8.0, 2.0, 0.0, 6.0]

    @pytest.mark.parametrize("inner", [TaskArithmetic(1.0), Ties(0.4), FRMerging()], ids=repr)
    @pytest.mark.parametrize("tasks", [1, 2, 3])
    def test_masks_another_methods_result(self, inner, tasks):
        vectors = [{"w": normal(30, 20, seed=seed)} for seed in range(3)]
        plain = merge_task_vectors(vectors, inner)["w"]
        users = sum((v["w"].abs() > 0.8 * (plain - v["w"]).abs()).int() for v in vectors)
        merged = merge_task_vectors(vectors, Consensus(inner, scale=0.5, threshold=0.8, tasks=tasks))["w"]
        torch.testing.assert_close(merged, torch.where(users >= tasks, 0.5 * plain, 0.0))
        assert 0 < int((merged != 0).sum()) <= int((plain != 0).sum())
        assert tasks == 1 or int((users < tasks).sum()) > 100

    def test_errors(self):
        with pytest.raises(MergeError, match="no entry is used by 2 of 1 tasks"):
            merge_task_vectors([{"w": normal(3)}], Consensus())
        for build, message in [
            (lambda: Consensus("Ties"), "`method` must be a MergeMethod, got 'Ties'"),
            (lambda: Consensus(threshold=-1), "`threshold` must be at least 0, got -1"),
            (lambda: Consensus(tasks=1.5), "`tasks` must be an integer of at least 0, got 1.5"),
        ]:
            with pytest.raises(ValueError, match=message):
                build()


class TestDella:
    def test_small_entries_are_dropped_more_often_and_the_expectation_stays(self):
        """Rows 1 … 10: the r-th largest is dropped with the probability 0.5 − 0.2 + 0.4·r/10."""
        rows = torch.arange(1.0, 11).expand(40_000, 10).contiguous()
        merged = merge_task_vectors([{"w": rows}], Della(TaskArithmetic(1.0), drop=0.5, epsilon=0.4))["w"]
        rank = torch.arange(9.0, -1, -1)
        keep = 1 - (0.3 + 0.4 * rank / 10)
        torch.testing.assert_close((merged != 0).float().mean(0), keep, atol=0.01, rtol=0)
        torch.testing.assert_close(merged.mean(0), rows[0], atol=0.15, rtol=0)
        torch.testing.assert_close(merged.amax(0), rows[0] / keep)

    def test_convolutions_have_rows_and_vectors_are_one(self):
        vector = {"c": normal(6, 5, 2, 2), "b": normal(300)}
        flat = {"c": vector["c"].flatten(1), "b": vector["b"]}
        merged, other = (merge_task_vectors([each], Della(drop=0.5)) for each in (vector, flat))
        assert torch.equal(merged["c"].flatten(1), other["c"])
        assert 100 < int((merged["b"] != 0).sum()) < 200

    def test_what_is_dropped_depends_on_seed_model_and_tensor_alone(self):
        base = {"a": torch.zeros(30, 30), "b": torch.zeros(900)}
        ones = {name: normal(*tensor.shape) for name, tensor in base.items()}
        method = Della(TaskArithmetic(1.0), drop=0.5)
        alone = merge(base, {"x": ones}, method)
        assert torch.equal(alone["a"], merge(base, {"y": base, "x": ones}, method)["a"])
        assert torch.equal(alone["b"], merge(base, {"x": ones}, method, include=["b"])["b"])
        for other in (
            merge(base, {"y": ones}, method),
            merge(base, {"x": ones}, Della(TaskArithmetic(1.0), 1.0, 0.5, seed=1)),
        ):
            assert 0.3 < float(((alone["a"] != 0) == (other["a"] != 0)).float().mean()) < 0.7

    def test_the_method_inside_sees_what_it_will_merge(self):
        merged = merge_task_vectors([{"w": normal(100, 100)}], Della(Ties(0.2), drop=0.5))
        assert int((merged["w"] != 0).sum()) == 2000

    def test_any_chunk_of_random_numbers_can_be_drawn_separately(self):
        whole = draw_uniform("x", 0, 1000)
        for start, count in ((0, 10), (1, 10), (7, 9), (8, 8), (13, 987), (999, 1), (500, 0)):
            assert torch.equal(draw_uniform("x", start, count), whole[start : start + count])
        many = draw_uniform("y", 12345, 100_000)
        assert 0 <= float(many.min()) < 1e-4
        assert 1 - 1e-4 < float(many.max()) < 1
        assert float(many.mean()) == pytest.approx(0.5, abs=0.005)

    def test_wrong_parameters(self):
        for build, message in [
            (lambda: Della(drop=0.95), r"`drop` ± `epsilon`/2 must lie in \[0, 1\), got 0.95 ± 0.1"),
            (lambda: Della(epsilon=-0.1), "`epsilon` must be at least 0, got -0.1"),
            (lambda: Della(seed=0.5), "`seed` must be an integer, got 0.5"),
        ]:
            with pytest.raises(ValueError, match=message):
                build()
