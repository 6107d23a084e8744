"""Checkpoints of torch.distributed.checkpoint are read in one process, in chunks, without running their code."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint
from freemerge.checkpoints.formats.distributed_files import _Block, _tiles
from freemerge.merging import WeightAverage, merge
from tests import processes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints written by two processes: by Lightning's ModelParallelStrategy, and by torch directly."""
    folder = tmp_path_factory.mktemp("distributed")
    done = processes.run(Path(__file__).with_name("write_distributed.py"), folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint written by one process."""
    tensors = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(3).bfloat16()}
    dcp.save(
        {"model": tensors, "optimizer": {"step": torch.ones(1), "lr": 0.1}}, checkpoint_id=tmp_path / "d", no_dist=True
    )
    return tmp_path / "d"


def assert_same(checkpoint, tensors):
    assert set(checkpoint.names) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.spec(name) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint.tensor(name), tensor)
        for start, stop in ((0, 0), (1, 2), (2, 7), (3, tensor.numel())):
            stop = min(stop, tensor.numel())
            start = min(start, stop)
            assert torch.equal(checkpoint.read_range(name, start, stop), tensor.reshape(-1)[start:stop])


def test_lightning_writes_it_and_its_prefix_is_found(written, tmp_path):
    tensors = torch.load(written / "lightning.pt", weights_only=True)
    checkpoint = open_checkpoint(written / "lightning.ckpt")
    assert_same(checkpoint, tensors)
    assert len(list((written / "lightning.ckpt").glob("*.distcp"))) == 2
    base = {name.removeprefix("backbone."): torch.zeros_like(t) for name, t in tensors.items() if "backbone" in name}
    merged = merge(base, [written / "lightning.ckpt"], WeightAverage())
    assert all(torch.equal(tensor, tensors[f"backbone.{name}"]) for name, tensor in merged.items())


def test_shards_of_any_dimension(written):
    tensors = torch.load(written / "plain.pt", weights_only=True)
    checkpoint = open_checkpoint(written / "plain")
    assert_same(checkpoint, tensors)
    loaded = load_checkpoint(written / "plain")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_only_the_model_is_part_of_it(folder):
    assert open_checkpoint(folder).names == ("w", "b")
    dcp.save({"w": torch.ones(2), "sub": {"x": torch.ones(1)}}, checkpoint_id=folder.parent / "p", no_dist=True)
    assert open_checkpoint(folder.parent / "p").names == ("w", "sub.x")
    dcp.save({"steps": 3}, checkpoint_id=folder.parent / "q", no_dist=True)
    with pytest.raises(CheckpointError, match=r"\.metadata: lists no tensors of a model"):
        open_checkpoint(folder.parent / "q")


def test_every_dtype(tmp_path):
    bits = torch.arange(48, dtype=torch.uint8)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.uint16]
    tensors = {str(dtype): bits.clone().view(dtype) for dtype in dtypes} | {"bool": bits > 3}
    dcp.save(tensors, checkpoint_id=tmp_path / "d", no_dist=True)
    for name, tensor in load_checkpoint(tmp_path / "d").items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))


class Code:
    def __reduce__(self):
        return (os.system, ("echo this must never be printed",))


@pytest.mark.parametrize("content", [Code(), {"state_dict_metadata": Code()}, os.path.join, subprocess.Popen])
def test_code_in_the_metadata_never_runs(folder, capfd, content):
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.metadata: names .*, which no checkpoint of tensors needs") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


def test_code_in_a_block_never_runs(folder, capfd):
    """Even if the code is in place of a tensor's block."""
    for path in folder.glob("*.distcp"):
        evil = folder / "evil.pt"
        torch.save(Code(), evil)
        path.write_bytes(evil.read_bytes() * 9)
    with pytest.raises(CheckpointError, match=r"distcp: (names .*, which no checkpoint|damaged where the tensor)"):
        load_checkpoint(folder)
    assert capfd.readouterr().out == ""


def load_or_error(folder):
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_every_flipped_byte_is_one_line_or_harmless(folder, name):
    """Flips in a tensor's values are in no table and cannot be detected here."""
    good = load_checkpoint(folder)
    path = folder / name
    data = path.read_bytes()
    step = 3 if name == ".metadata" else 19
    for position in range(0, len(data), step):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        outcome = load_or_error(folder)
        if isinstance(outcome, str):
            assert "\n" not in outcome
            assert str(folder) in outcome
        else:  # a flipped value; or the name, the dtype (of the same width) or the order of axes in the tables
            assert sum(t.nbytes for t in outcome.values()) in (sum(t.nbytes for t in good.values()), 48, 6)


def test_missing_and_truncated_files(folder):
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 4])  # the optimizer's state at the end is not read
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: truncated: \.metadata promises"):
        open_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: missing, though \.metadata lists it"):
        open_checkpoint(folder)
    path.write_bytes(data)
    opened = open_checkpoint(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"a distributed checkpoint that lacks \.metadata"):
        open_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        opened.tensor("w")


def test_a_block_outside_of_the_folder_is_refused(folder):
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = "../d2/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the folder; do not trust this file"):
        open_checkpoint(folder)


def test_gaps_between_blocks(folder):
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.state_dict_metadata["model.w"].size = torch.Size([4, 4])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"blocks of the tensor 'w' do not cover its shape \[4, 4\]"):
        open_checkpoint(folder)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tilings(data):
    """A grid of blocks covers the tensor; with one block missing or moved it does not."""
    edges = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))})
        for size in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    ]
    blocks = [_Block((), (), Path(), 0, 0)]
    for cuts in edges:
        blocks = [
            block._replace(offsets=(*block.offsets, low), sizes=(*block.sizes, high - low))
            for block in blocks
            for low, high in itertools.pairwise(cuts)
        ]
    shape = tuple(cuts[-1] for cuts in edges)
    assert _tiles(shape, blocks)
    assert not _tiles(shape, blocks[1:])
    victim = data.draw(st.integers(0, len(blocks) - 1))
    moved = blocks[victim]._replace(offsets=(blocks[victim].offsets[0] + 1, *blocks[victim].offsets[1:]))
    assert not _tiles(shape, [*blocks[:victim], moved, *blocks[victim + 1 :]])


def test_any_flipped_bit_of_the_values_is_seen(tmp_path):
    tensor = torch.randn(64)
    dcp.save({"w": tensor}, checkpoint_id=tmp_path / "d", no_dist=True)
    (file,) = (tmp_path / "d").glob("*.distcp")
    whole = file.read_bytes()
    begin = whole.index(tensor.numpy().tobytes())
    for position in range(begin, begin + 4 * 64, 37):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged where the tensor 'w' should be.*Bad CRC-32"):
            open_checkpoint(tmp_path / "d").tensor("w")
    file.write_bytes(whole)
    assert torch.equal(open_checkpoint(tmp_path / "d").tensor("w"), tensor)


def test_a_pickle_whose_memo_would_be_gigabytes_is_small_and_one_line(folder):
    """The pickle states the size of its memo table, which the C unpickler would allocate at once."""
    (folder / ".metadata").write_bytes(b"\x80\x02N" + b"r" + (0x7FFFFFF0).to_bytes(4, "little") + b".")
    script = (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))\n"
        "from freemerge.checkpoints import open_checkpoint, CheckpointError\n"
        f"try: open_checkpoint({str(folder)!r})\nexcept CheckpointError as error: print(str(error).count(chr(10)))\n"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]


def test_a_name_longer_than_the_file_system_allows_is_one_line(folder):
    metadata = (folder / ".metadata").read_bytes()
    name = next(folder.glob("*.distcp")).name.encode()
    long = b"x" * 300
    changed = metadata.replace(b"\x8c" + bytes([len(name)]) + name, b"X" + len(long).to_bytes(4, "little") + long)
    changed = changed.replace(
        b"X" + len(name).to_bytes(4, "little") + name, b"X" + len(long).to_bytes(4, "little") + long
    )
    assert changed != metadata
    (folder / ".metadata").write_bytes(changed)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
