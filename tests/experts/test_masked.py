"""Masked experts equal the formula of EMR-Merging, with one bit per entry."""

from pathlib import Path

import pytest
import torch

from freemerge.checkpoints import CheckpointError
from freemerge.experts import attached, emr_experts, load_expert, save_expert
from freemerge.merging import EMRMerging, apply_task_vector, emr_task_vector, merge_task_vectors, task_vector


def test_base_and_masked_expert_are_the_papers_task_model() -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tuned = [{name: t + 0.1 * torch.randn(t.shape) for name, t in start.items()} for _ in range(3)]
    vectors = {str(index): task_vector(start, weights) for index, weights in enumerate(tuned)}
    shared, experts = emr_experts(vectors)
    unified = merge_task_vectors(list(vectors.values()), EMRMerging())
    assert all(torch.equal(shared[name], unified[name]) for name in unified)
    for task, vector in vectors.items():
        expected = apply_task_vector(start, emr_task_vector(unified, vector)[0])
        assert experts[task].shared is shared  # one object for all tasks
        with attached(base, experts[task]):
            for name, tensor in base.state_dict().items():
                torch.testing.assert_close(tensor, expected[name])
        assert all(torch.equal(start[name], tensor) for name, tensor in base.state_dict().items())


def test_a_shared_vector_without_one_of_the_tensors_is_refused(tmp_path: Path) -> None:
    shared, experts = emr_experts({task: {"w": torch.randn(3, 2), "b": torch.randn(3)} for task in "ab"})
    path = save_expert(tmp_path / "a.safetensors", experts["a"])
    with pytest.raises(CheckpointError, match="needs the task vector that its tasks share, with tensor 'b'"):
        load_expert(path, shared={"w": shared["w"]})
