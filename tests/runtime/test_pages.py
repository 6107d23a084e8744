"""Pools of memory for large tensors: any size and dtype, reused, bounded."""

import pytest
import torch

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.runtime.pages import Pool, fresh


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 1 << 20), ((5 << 20) + 1,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_fresh_memory_is_like_any_other(shape, dtype):
    tensor = fresh(shape, dtype).fill_(3)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert bool((tensor == 3).all())


def test_a_pool_reuses_returned_memory():
    pool = Pool(limit=1000)
    first, second = pool.take(400), pool.take(300)
    assert first.data_ptr() != second.data_ptr()
    pool.give(first)
    pool.give(second)
    assert pool.take(250).data_ptr() == second.data_ptr()  # the smallest that is large enough
    assert pool.take(250).data_ptr() == first.data_ptr()
    assert len(pool.take(250)) == 250  # none was left


def test_a_pool_respects_its_bound_and_drops_oversized_memory():
    pool = Pool(limit=1000)
    large = pool.take(900)
    pool.give(large)
    small = pool.take(100)  # beside the large one, which stays
    assert small.data_ptr() != large.data_ptr()
    pool.give(small)
    assert pool.take(800).data_ptr() == large.data_ptr()
    pool.give(large)
    middle = pool.take(300)  # the limit: what is free goes
    assert len(middle) == 300
    assert len(pool.take(800)) == 800


def test_damage_is_detected_when_reading_by_chunks(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"w": torch.arange(1000, dtype=torch.bfloat16), "x": torch.ones(3)})
    data = bytearray(path.read_bytes())
    place = data.rindex(torch.arange(1000, dtype=torch.bfloat16)[700:720].view(torch.uint8).numpy().tobytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="'w' are not those that were written"):
        load_checkpoint(path)
    checkpoint = open_checkpoint(path)
    for start in range(0, 900, 100):
        checkpoint.read_range("w", start, start + 100)
    with pytest.raises(CheckpointError, match="'w' are not those that were written"):
        checkpoint.read_range("w", 900, 1000)
    # A single chunk, or chunks out of order, cannot verify the whole tensor.
    assert len(open_checkpoint(path).read_range("w", 900, 1000)) == 100
    checkpoint = open_checkpoint(path)
    for start in (0, 200, 100, 900):
        checkpoint.read_range("w", start, start + 100)
