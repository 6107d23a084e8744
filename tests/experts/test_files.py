"""Expert files: exact positions, small files, and clear refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoints import CheckpointError, hash_tensors, save_checkpoint
from freemerge.experts import extract, load_expert, save_expert
from freemerge.experts.files import decode_positions, encode_positions


@given(st.lists(st.integers(0, 5000), unique=True, max_size=300))
@settings(max_examples=100, deadline=None)
def test_positions_survive_coding(positions: list[int]) -> None:
    ascending = np.array(sorted(positions), dtype=np.int64)
    assert np.array_equal(decode_positions(encode_positions(ascending)), ascending)


def test_gaps_around_the_escape_byte() -> None:
    positions = np.cumsum([0, 254, 255, 256, 509, 510, 511, 1])
    coded = encode_positions(positions)
    assert np.array_equal(decode_positions(coded), positions)
    assert encode_positions(np.array([255])).tolist() == [255, 0]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(300, 200, generator=generator),
        "norm.weight": torch.randn(200, generator=generator),
        "mlp.weight": torch.randn(200, 400, generator=generator),
    }


def test_round_trip_and_size(tmp_path, weights) -> None:
    expert = extract(weights, 0.01, metadata={"task": "digits", "merged_hash": hash_tensors(weights)})
    path = save_expert(tmp_path / "new" / "e.safetensors", expert)
    loaded = load_expert(path, weights)
    assert loaded.metadata == expert.metadata
    assert loaded.shapes == expert.shapes
    for name in expert.indices:
        assert torch.equal(loaded.indices[name], expert.indices[name])
        assert torch.equal(loaded.values[name], expert.values[name].bfloat16().float())
    assert path.stat().st_size <= 0.01 * 4 * sum(t.numel() for t in weights.values())
    again = save_expert(tmp_path / "again.safetensors", loaded)
    assert torch.equal(load_expert(again).flat_values(), loaded.flat_values())


def test_float32_values_are_kept_exactly(tmp_path, weights) -> None:
    expert = extract(weights, 0.02)
    loaded = load_expert(save_expert(tmp_path / "e.safetensors", expert, dtype=torch.float32))
    assert torch.equal(loaded.flat_values(), expert.flat_values())


def test_another_merged_backbone_is_refused(tmp_path, weights) -> None:
    path = save_expert(
        tmp_path / "e.safetensors", extract(weights, 0.01, metadata={"merged_hash": hash_tensors(weights)})
    )
    other = {**weights, "norm.weight": weights["norm.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"e\.safetensors: this expert belongs to merged weights"):
        load_expert(path, other)


def test_what_is_no_expert_is_refused(tmp_path, weights) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: no such expert file"):
        load_expert(tmp_path / "missing.safetensors")
    save_checkpoint(tmp_path / "plain.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: not an expert file"):
        load_expert(tmp_path / "plain.safetensors")
    path = save_expert(tmp_path / "cut.safetensors", extract(weights, 0.01))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: damaged"):
        load_expert(path)
