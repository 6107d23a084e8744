"""Reference values in tests/golden, computed in float64 NumPy independently of this project."""

from pathlib import Path

import numpy as np
import pytest
import torch

from freemerge.merging import FRMerging, NyquistDisc, PCBMerging, Ties, merge_task_vectors

GOLDEN = Path(__file__).parents[2] / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def assert_near(found, expected):
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def split(flat):
    """A flat task vector as tensors of odd shapes."""
    return {"a": flat[:1000].reshape(10, 100), "b": flat[1000:1001].reshape(()), "c": flat[1001:]}


@pytest.mark.parametrize("index", range(6))
def test_nyquist_disc(index):
    golden = load("fr_filter")
    filtered = NyquistDisc(float(golden[f"radius_{index}"]))(torch.from_numpy(golden[f"in_{index}"]))
    assert_near(filtered, golden[f"out_{index}"])


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("align_scale0.7", FRMerging(scale=0.7)),
        ("mean_scale1", FRMerging(coefficients="mean")),
        ("uniform_scale0.3", FRMerging(coefficients="uniform", scale=0.3)),
        ("mean_scale1", FRMerging(coefficients=load("fr_merge")["paper_lambda"].tolist())),
    ],
)
def test_fr_merging(key, method):
    golden = load("fr_merge")
    names = [name.removeprefix("task0/") for name in golden if name.startswith("task0/")]
    vectors = [{name: torch.from_numpy(golden[f"task{task}/{name}"]) for name in names} for task in range(3)]
    merged = merge_task_vectors(vectors, method)
    for name in names:
        assert_near(merged[name], golden[f"{key}/{name}"])


@pytest.mark.parametrize("index", range(3))
def test_pcb_merging(index):
    golden = load("pcb")
    vectors = [split(flat) for flat in torch.from_numpy(golden[f"tv_{index}"])]
    method = PCBMerging(ratio=float(golden[f"ratio_{index}"]), clip=float(golden[f"clip_{index}"]))
    merged = merge_task_vectors(vectors, method)
    assert_near(torch.cat([merged[name].flatten() for name in "abc"]), golden[f"merged_{index}"])


def test_ties():
    golden = load("ties")
    vectors = [split(flat) for flat in torch.from_numpy(golden["tv"])]
    merged = merge_task_vectors(vectors, Ties(density=float(golden["density"])))
    assert_near(torch.cat([merged[name].flatten() for name in "abc"]), golden["merged"])
