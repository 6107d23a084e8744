"""Saving is atomic and exact; hashes depend only on the weights."""

import os
import stat

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoints import CheckpointError, hash_tensors, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.checkpoints.checkpoint import TensorSpec
from freemerge.checkpoints.formats.safetensors_files import write_safetensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64,
]  # fmt: skip


def test_every_dtype_reads_back_here_and_with_safetensors(tmp_path):
    bits = torch.arange(240, dtype=torch.uint8)
    tensors = {
        str(dtype): (bits % 2 == 0) if dtype == torch.bool else bits.clone().view(dtype).reshape(2, -1)
        for dtype in DTYPES
    }
    save_checkpoint(tmp_path / "all.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "all.safetensors")
    for loaded in (load_checkpoint(tmp_path / "all.safetensors"), theirs):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert hash_tensors(theirs) == hash_tensors(tensors)


def test_odd_sizes_stay_aligned(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"byte": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(2)})
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["wide"].tolist() == [1, 1]
    assert open_checkpoint(tmp_path / "a.safetensors").names == ("wide", "byte")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    save_checkpoint(path, {"w": torch.zeros(3)})

    def stream():
        yield "a", torch.ones(1)
        raise RuntimeError("the power is gone")

    specs = {"a": TensorSpec((1,), torch.float32), "b": TensorSpec((1,), torch.float32)}
    with pytest.raises(RuntimeError, match="the power is gone"):
        write_safetensors(path, specs, stream())
    with pytest.raises(ValueError, match="expected the tensor 'a'"):
        write_safetensors(path, specs, [("b", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(ValueError, match="zip"):
        write_safetensors(path, specs, [("a", torch.ones(1))])
    assert os.listdir(path.parent) == ["w.safetensors"]
    assert load_checkpoint(path)["w"].tolist() == [0, 0, 0]


def test_errors_of_saving(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no torch\.complex128, the dtype of the tensor 'w'"):
        save_checkpoint(tmp_path / "w.safetensors", {"w": torch.zeros(1, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="the entry 'w' is a list, not a tensor"):
        save_checkpoint(tmp_path / "w.safetensors", {"w": [1]})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "w.safetensors", {"w": torch.zeros(1)})


def test_a_new_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "w.safetensors", {"w": torch.zeros(1, requires_grad=True)})
    mode = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "w.safetensors")]
    assert mode[0] == mode[1]


def test_the_hash_depends_only_on_weights(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.ones(2, dtype=torch.int64)}
    value = hash_tensors(tensors)
    assert len(value) == 64
    save_checkpoint(tmp_path / "x.safetensors", tensors, {"note": "any"})
    torch.save(tensors, tmp_path / "x.pt")
    same = [
        dict(reversed(tensors.items())),
        {"b": tensors["b"].T.contiguous().T, "a": tensors["a"]},
        open_checkpoint(tmp_path / "x.safetensors"),
        open_checkpoint(tmp_path / "x.pt"),
    ]
    assert {hash_tensors(other) for other in same} == {value}
    other = [
        {"b": tensors["b"], "c": tensors["a"]},
        {"b": tensors["b"].reshape(4, 3), "a": tensors["a"]},
        {"b": tensors["b"], "a": tensors["a"].double()},
        {"b": tensors["b"] + 1e-6, "a": tensors["a"]},
        {"b": tensors["b"]},
        {},
    ]
    assert len({hash_tensors(item) for item in other} | {value}) == 7


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 4), max_size=3),
        max_size=4,
    )
)
def test_any_names_and_shapes_read_back(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_checkpoint(path, tensors)
    loaded = load_checkpoint(path)
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in tensors.items()}
