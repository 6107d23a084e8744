"""Storage in half and quarter precision: arithmetic in float32, one rounding, and no silent overflow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import (
    MergeError,
    PCBMerging,
    TaskArithmetic,
    WeightAverage,
    apply_task_vector,
    merge,
    task_vector,
)
from freemerge.merging.engine.search import Candidates
from freemerge.tensors.rounding import largest, round_to
from tests.merging.merging_models import METHODS

NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def narrow(models, dtype):
    return [{n: t.to(dtype) if t.is_floating_point() else t for n, t in model.items()} for model in models]


def wide(models):
    return [{n: t.float() if t.is_floating_point() else t for n, t in model.items()} for model in models]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_narrow_models_merge_as_their_values_in_float32_do(base, models, method, dtype):
    stored, *tuned = narrow([base, *models], dtype)
    expected_base, *expected_tuned = wide([stored, *tuned])
    expected = merge(expected_base, expected_tuned, method)
    merged = merge(stored, tuned, method)
    for name, tensor in merged.items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor.float(), expected[name].to(tensor.dtype).float())


@pytest.mark.parametrize("dtype", NARROW)
def test_files_of_every_precision_in_and_out(tmp_path, base, models, dtype):
    """The base, the models and the output each have another precision, in files and in folders."""
    stored = narrow([base, *models], dtype)
    save_checkpoint(tmp_path / "base.safetensors", base)
    paths = []
    for index, model in enumerate((stored[1], models[1])):
        paths.append(tmp_path / f"{index}.safetensors")
        save_checkpoint(paths[-1], model)
    name = str(dtype).removeprefix("torch.")
    output = merge(tmp_path / "base.safetensors", paths, PCBMerging(0.5), dtype=name, output=tmp_path / "out")
    expected = merge(base, [wide([stored[1]])[0], models[1]], PCBMerging(0.5))
    for key, tensor in load_checkpoint(output).items():
        assert tensor.dtype == (dtype if base[key].is_floating_point() else base[key].dtype)
        assert torch.equal(tensor.float(), expected[key].to(tensor.dtype).float())


@pytest.mark.parametrize("dtype", NARROW)
def test_one_model_comes_through_bit_for_bit(base, models, dtype):
    stored, tuned, *_ = narrow([base, *models], dtype)
    merged = merge(stored, [tuned], WeightAverage())
    for name, tensor in merged.items():
        assert torch.equal(tensor.float(), tuned[name].float() if tensor.is_floating_point() else stored[name])


@pytest.mark.parametrize("dtype", NARROW)
@settings(max_examples=100, deadline=None)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_value_fits_or_is_an_error(dtype, value):
    """Depending on dtype and version, torch turns a value that overflows into infinity, NaN or the largest number."""
    top = torch.finfo(dtype).max
    if abs(value) < largest(dtype):
        rounded = float(round_to(torch.tensor([value]), dtype, "w"))
        assert math.isfinite(rounded)
        assert abs(rounded - value) <= max(torch.finfo(dtype).eps / 2 * abs(value), float(torch.finfo(dtype).tiny))
        assert abs(rounded) <= top
    else:
        with pytest.raises(MergeError, match="'w' has 1 values that do not fit into"):
            round_to(torch.tensor([value]), dtype, "w")


@pytest.mark.parametrize("dtype", NARROW)
def test_the_edges(dtype):
    top, edge = torch.finfo(dtype).max, largest(dtype)
    below = torch.nextafter(torch.tensor(edge, dtype=torch.float32), torch.tensor(0.0))
    assert float(round_to(torch.tensor([top, -top, float(below)]), dtype, "w").float().abs().max()) == top
    for value in (edge, -edge):
        with pytest.raises(MergeError, match="do not fit into"):
            round_to(torch.tensor([0.0, value]), dtype, "w")
    assert round_to(torch.zeros(0), dtype, "w").shape == (0,)
    # NaN and infinity come from the inputs here; the checks of inputs and result report them.
    assert torch.isnan(round_to(torch.tensor([math.nan]), dtype, "w").float()).all()


@pytest.mark.parametrize("memory", [None, 0])
def test_an_overflow_is_the_same_error_in_searches_and_in_memory(memory):
    """60 000 + 2 · 4 000 overflows float16; 60 000 + 0.5 · 4 000 does not."""
    base = {"w": torch.tensor([60000.0, 1.0], dtype=torch.float16), "bn.running_var": torch.ones(1).half()}
    tuned = {"w": torch.tensor([64000.0, 2.0], dtype=torch.float16), "bn.running_var": torch.ones(1).half()}
    candidates, vector = Candidates(base, {"a": tuned}, memory=memory), task_vector(base, tuned)
    message = (
        r"the merged tensor 'w' has 1 values that do not fit into float16 \(the first is 68000, its largest 65504\)"
    )
    for large, fitting in (
        (lambda: merge(base, [tuned], TaskArithmetic(2.0)), lambda: merge(base, [tuned], TaskArithmetic(0.5))),
        (lambda: candidates.merge(TaskArithmetic(2.0)), lambda: candidates.merge(TaskArithmetic(0.5))),
        (lambda: apply_task_vector(base, vector, 2.0), lambda: apply_task_vector(base, vector, 0.5)),
    ):
        with pytest.raises(MergeError, match=message) as error:
            large()
        assert "\n" not in str(error.value)
        assert torch.equal(fitting()["w"], torch.tensor([62000.0, 1.5], dtype=torch.float16))
    for statistic in ("bn.running_var", "w"):
        infinite = {name: delta + (torch.inf if name == statistic else 0) for name, delta in vector.items()}
        with pytest.raises(MergeError, match=f"the merged tensor '{statistic}' has NaN or infinite values"):
            apply_task_vector(base, infinite)


def test_infinite_results_are_an_error_in_searches_too():
    base, tuned = {"w": torch.zeros(2)}, {"w": torch.full((2,), 3e38)}
    for merged in (Candidates(base, {"a": tuned}).merge, lambda method: merge(base, [tuned], method)):
        with pytest.raises(MergeError, match="TaskArithmetic: the merged tensor 'w' has NaN or infinite values"):
            merged(TaskArithmetic(10.0))


def test_an_overflow_is_one_line(tmp_path, base, models):
    large = base | {"embed.weight": base["embed.weight"] * 1e5}
    for arguments in ({}, {"exclude": ["embed.*"]}):
        with pytest.raises(
            MergeError, match=r"merged tensor 'embed.weight' has \d+ values that do not fit into float16"
        ):
            merge(large, [large], TaskArithmetic(), dtype="float16", output=tmp_path / "o.safetensors", **arguments)
    assert not list(tmp_path.iterdir())
    merge(large, [large], TaskArithmetic(), dtype="bfloat16")
