"""Expert files: exact positions, values within half a quantization step, small files, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from freemerge.checkpoints import CheckpointError, hash_tensors, save_checkpoint
from freemerge.experts import Expert, emr_experts, extract, extract_low_rank, load_expert, save_expert
from freemerge.experts.codec import decode_positions, decode_values, deflate, encode_positions, encode_values, inflate
from tests import processes
from tests.models.own_parts import ShiftExpert


@given(st.lists(st.integers(0, 5000), unique=True, max_size=300))
@settings(max_examples=100, deadline=None)
def test_positions_round_trip(positions: list[int]) -> None:
    ascending = torch.tensor(sorted(positions), dtype=torch.int64)
    assert torch.equal(decode_positions(encode_positions(ascending)), ascending)


def test_gaps_around_the_escape_byte() -> None:
    positions = torch.tensor([0, 254, 255, 256, 509, 510, 511, 1]).cumsum(0)
    assert torch.equal(decode_positions(encode_positions(positions)), positions)
    assert encode_positions(torch.tensor([255])).tolist() == [255, 0]


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=50),
    encoding=st.sampled_from(["int4", "int8", "bf16", "float32"]),
)
@settings(max_examples=200, deadline=None)
def test_decoded_values_are_close_and_encoding_them_again_is_exact(values: list[float], encoding: str) -> None:
    parts = [torch.tensor(values), torch.zeros(3), torch.tensor([-1.0, 0.5])]
    sizes = [len(part) for part in parts]
    once = decode_values(*encode_values(parts, encoding), sizes)
    for part, decoded in zip(parts, once, strict=True):
        largest = float(part.abs().max())
        if encoding == "int4":  # may clip large values if this reduces the total error
            lost = float((decoded - part).double().square().sum())
            assert lost <= len(part) * (largest * 1.001 / 7 / 2) ** 2 + 2.0**-198
            continue
        step = {"int8": largest * 1.001 / 127, "bf16": 0.0, "float32": 0.0}[encoding]
        bound = step / 2 + part.abs() * (2**-8 if encoding == "bf16" else 1e-6) + 2.0**-99
        assert bool(((decoded - part).abs() <= bound).all())
    again = decode_values(*encode_values(once, encoding), sizes)
    assert all(torch.equal(first, second) for first, second in zip(once, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
def test_deflating_is_lossless(dtype: torch.dtype) -> None:
    array = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    assert torch.equal(inflate(deflate(array), dtype), array)
    assert inflate(deflate(array[:0]), dtype).shape == (0,)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite; its training diverged"):
        encode_values([torch.tensor([1.0, float("nan")])], "int8")
    with pytest.raises(ValueError, match="one of int4, int8, bf16, float32, got 'int2'"):
        encode_values([torch.ones(2)], "int2")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(300, 200, generator=generator),
        "norm.weight": torch.randn(200, generator=generator),
        "mlp.weight": torch.randn(200, 400, generator=generator),
    }


def kinds(weights: dict[str, torch.Tensor]) -> dict[str, Expert]:
    _, masked = emr_experts({"digits": weights, "other": {name: t.flip(0) for name, t in weights.items()}})
    return {
        "sparse": extract(weights, 0.01, metadata={"task": "digits"}),
        "low_rank": extract_low_rank(weights, rank=2, metadata={"task": "digits"}),
        "masked": masked["digits"],
    }


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "masked"])
@pytest.mark.parametrize("values", ["int4", "int8", "bf16", "float32"])
def test_every_kind_round_trips(tmp_path, weights, kind: str, values: str) -> None:
    expert = kinds(weights)[kind]
    shared = expert.shared if kind == "masked" else None
    loaded = load_expert(save_expert(tmp_path / "new" / "e.safetensors", expert, values), shared=shared)
    assert type(loaded) is type(expert)
    assert loaded.shapes == expert.shapes
    assert loaded.metadata == {**expert.metadata, "values": values}
    for name, part in expert.parts().items():
        got, largest = loaded.parts()[name], float(part.abs().max())
        assert got.shape == part.shape
        bounds = {"int4": 0.71 * largest, "int8": largest / 250, "bf16": largest / 256, "float32": 0}
        assert float((got - part).abs().max()) <= bounds[values]
    if values == "float32":
        assert all(torch.equal(loaded.dense()[name], tensor) for name, tensor in expert.dense().items())
    again = load_expert(save_expert(tmp_path / "again.safetensors", loaded), shared=shared)  # the same encoding
    assert torch.equal(again.flat_values(), loaded.flat_values())
    assert again.metadata["values"] == values


def test_one_per_cent_of_the_entries_is_under_one_per_cent_of_the_bytes(tmp_path, weights) -> None:
    metadata = {"task": "digits", "merged_hash": hash_tensors(weights), "base_hash": hash_tensors(weights)}
    total = 4 * sum(t.numel() for t in weights.values())
    expert = extract(weights, 0.01, metadata=metadata)
    bf16 = save_expert(tmp_path / "bf16.safetensors", expert, "bf16").stat().st_size
    int8 = save_expert(tmp_path / "int8.safetensors", expert).stat().st_size
    int4 = save_expert(tmp_path / "int4.safetensors", expert, "int4").stat().st_size
    assert int8 < bf16 - 0.2 * expert.num_values
    assert int4 < int8 - 0.3 * expert.num_values
    assert bf16 <= 0.01 * total


def test_masks_take_a_bit_per_entry(tmp_path, weights) -> None:
    path = save_expert(tmp_path / "e.safetensors", kinds(weights)["masked"])
    assert path.stat().st_size <= sum(t.numel() for t in weights.values()) / 8 + 1500


def test_an_expert_of_another_backbone_is_refused(tmp_path, weights) -> None:
    other = {**weights, "norm.weight": weights["norm.weight"] + 1}
    metadata = {"merged_hash": hash_tensors(weights), "base_hash": hash_tensors(other)}
    path = save_expert(tmp_path / "e.safetensors", extract(weights, 0.01, metadata=metadata))
    assert load_expert(path, merged=weights, base=hash_tensors(other)).metadata["density"] == "0.01"
    with pytest.raises(CheckpointError, match=r"e\.safetensors: this expert belongs to merged weights") as caught:
        load_expert(path, merged=other)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"e\.safetensors: this expert belongs to base weights"):
        load_expert(path, base=weights)


def test_a_masked_expert_needs_the_shared_task_vector(tmp_path, weights) -> None:
    path = save_expert(tmp_path / "e.safetensors", kinds(weights)["masked"])
    with pytest.raises(
        CheckpointError, match=r"needs the task vector that its tasks share, with tensor 'embed\.weight'"
    ):
        load_expert(path)


def test_other_files_are_refused(tmp_path, weights) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: no such expert file"):
        load_expert(tmp_path / "missing.safetensors")
    save_checkpoint(tmp_path / "plain.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: not an expert file"):
        load_expert(tmp_path / "plain.safetensors")
    path = save_expert(tmp_path / "cut.safetensors", extract(weights, 0.01))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: damaged"):
        load_expert(path)
    path.write_bytes(whole)
    length = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + length])["__metadata__"]
    tensors = load_file(path)
    save_file({**tensors, "gaps": deflate(torch.tensor([3], dtype=torch.uint8))}, path, metadata)
    with pytest.raises(CheckpointError, match=r"damaged expert file \(positions and values do not match the layout"):
        load_expert(path)
    save_file({**tensors, "codes": tensors["codes"][:-9]}, path, metadata)
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: damaged expert file"):
        load_expert(path)


def test_a_file_of_a_user_made_kind_is_imported_only_if_allowed(tmp_path: Path) -> None:
    shapes = {"w": (2, 3)}
    path = save_expert(tmp_path / "e.safetensors", ShiftExpert({"w": torch.tensor([0.5])}, shapes), "float32")
    script = (
        "import sys; from freemerge.experts import load_expert\n"
        "from freemerge.checkpoints import CheckpointError\n"
        "try:\n    load_expert(sys.argv[1])\nexcept CheckpointError as error:\n    print(error)\n"
        "assert 'tests.models.own_parts' not in sys.modules\n"
        "print(load_expert(sys.argv[1], trust_remote_code=True).dense()['w'].tolist())"
    )
    run = processes.run("-c", script, path)
    assert run.returncode == 0, run.stderr
    said, loaded = run.stdout.strip().splitlines()
    assert f"{path}: unknown kind of expert 'shift'; import tests.models.own_parts first" in said
    assert loaded == str([[0.5] * 3] * 2)
    assert not any("class" in key for key in load_expert(path).metadata)
