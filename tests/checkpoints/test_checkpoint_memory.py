"""Tensors in memory without readable values are refused by name; views are read with the values they show."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.parameter import UninitializedParameter

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.merging import TaskArithmetic, merge


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake():
    with FakeTensorMode():
        return torch.ones(3)


REFUSED = {
    "nested": (lambda: nested(torch.strided), "is nested"),
    "jagged": (lambda: nested(torch.jagged), "is nested"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        r"is quantized \(torch.qint8\)",
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), "is sparse"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "is sparse"),
    "meta": (lambda: torch.ones(3, device="meta"), "is on the meta device"),
    "lazy": (UninitializedParameter, "has no shape yet"),
    "freed": (freed, "has no data"),
    "fake": (fake, "has no data"),
    "four bits": (
        lambda: torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "has the dtype torch.float4",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that nested, quantized and CSR tensors may change
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_unreadable_tensors_are_refused_by_name(make, message, tmp_path):
    tensors = {"good": torch.ones(2), "a.weight": make()}
    expected = f"mine: the tensor 'a.weight' {message}.* first$"
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(tensors, label="mine")
    with pytest.raises(CheckpointError, match=f"the tensor 'a.weight' {message}"):
        merge({"good": torch.ones(2), "a.weight": torch.ones(3)}, [tensors], TaskArithmetic())
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: the tensor 'a.weight' {message}"):
        save_checkpoint(tmp_path / "m.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_a_tensor_made_of_others_is_refused():
    """Like a distributed tensor, whose local memory is that of one process."""

    class Sharded(torch.Tensor):
        def __tensor_flatten__(self):
            return ["part"], None

    with pytest.raises(CheckpointError, match="the tensor 'w' is a Sharded, made of other tensors; pass it whole"):
        open_checkpoint({"w": torch.ones(2).as_subclass(Sharded)})


def test_conjugate_and_negative_views_are_their_values(tmp_path):
    wave = torch.tensor([1 + 2j, 3 - 4j])
    tensors = {"wave": wave, "conjugate": wave.conj(), "below": wave.conj().imag, "w": torch.ones(2)}
    for found in (
        load_checkpoint(save(tmp_path / "m.safetensors", tensors)),
        merge(tensors, [tensors], TaskArithmetic()),
    ):
        assert found["conjugate"].tolist() == [1 - 2j, 3 + 4j]
        assert found["wave"].tolist() == [1 + 2j, 3 - 4j]
        assert found["below"].tolist() == [-2.0, 4.0]
    assert open_checkpoint(tensors).read_range("conjugate", 1, 2).tolist() == [3 + 4j]
    assert open_checkpoint(tensors).tied == {}


def save(path, tensors):
    save_checkpoint(path, tensors)
    return path


def test_unusual_but_readable_tensors_are_read():
    class Named(torch.Tensor):
        pass

    tensors = {
        "expanded": torch.ones(1, 3).expand(2, 3),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "parameter": nn.Parameter(torch.ones(2)),
        "named": torch.ones(2).as_subclass(Named),
        "empty": torch.ones(0, 3),
    }
    checkpoint = open_checkpoint(tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
