"""Files of `torch.save` with objects besides tensors or with damaged values; none of their code runs."""

import functools
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from random import Random

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint

STATE = {
    "w": torch.arange(12.0).view(3, 4),
    "narrow": torch.randn(3, 5).bfloat16(),
    "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    "transposed": torch.randn(4, 3).T,
    "counts": torch.arange(5),
}


class OwnList(list):
    pass


class OwnDict(dict):
    pass


OBJECTS = {
    "path": pathlib.Path("/x"),
    "omegaconf": OmegaConf.create({"a": {"b": 1}, "c": [1, 2]}),
    "module": nn.Sequential(nn.Linear(2, 3), nn.ReLU()),
    "partial": functools.partial(torch.optim.SGD, lr=0.1),
    "function": os.path.join,
    "class": nn.CrossEntropyLoss,
    "own": [OwnList([1, 2]), OwnDict(a=1), {pathlib.Path("k"): 1}, {1, 2}, frozenset({3}), bytearray(b"x")],
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_tensors_are_read_past_objects_of_any_class(tmp_path, kind):
    checkpoint = {"state_dict": STATE, "hyper_parameters": {"x": OBJECTS[kind]}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError) if kind != "own" else pytest.raises(Exception):  # noqa: PT011
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    found = load_checkpoint(tmp_path / "a.ckpt")
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())


def test_ties_are_seen_past_objects(tmp_path):
    tied = torch.randn(3, 2)
    torch.save({"state_dict": {"a": tied, "b": tied, "c": tied.clone()}, "x": pathlib.Path("/")}, tmp_path / "a.ckpt")
    assert open_checkpoint(tmp_path / "a.ckpt").tied == {"b": "a"}


class Harmful:
    """A pickle of this object calls the given function."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], tuple(self.call[1:])


def harmful_calls(mark: pathlib.Path) -> dict[str, Harmful]:
    return {
        "system": Harmful(os.system, f"touch {mark}"),
        "eval": Harmful(eval, f"open({str(mark)!r}, 'w').close()"),
        "exec": Harmful(exec, f"open({str(mark)!r}, 'w').close()"),
        "open": Harmful(open, str(mark), "w"),
        "nested": Harmful(functools.partial, os.system, f"touch {mark}"),
    }


@pytest.mark.parametrize("kind", harmful_calls(pathlib.Path("x")))
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_pickle_cannot_call_functions(tmp_path, kind, place):
    mark = tmp_path / "mark"
    harmful = harmful_calls(mark)[kind]
    content = {"state_dict": STATE, "x": harmful} if place == "beside" else {"state_dict": {**STATE, "x": harmful}}
    torch.save(content, tmp_path / "a.ckpt")
    if place == "beside":
        assert load_checkpoint(tmp_path / "a.ckpt").keys() == STATE.keys()
    else:
        with pytest.raises(CheckpointError, match=r"Python objects besides tensors in its state dict \('x'\)"):
            load_checkpoint(tmp_path / "a.ckpt")
    assert not mark.exists()


def test_no_module_is_imported_because_a_file_names_it(tmp_path):
    torch.save({"state_dict": STATE, "x": Harmful(functools.partial, int)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
        for name, data in records.items():
            changed = data.replace(b"functools\npartial", b"antigravity\nwhat") if name.endswith("data.pkl") else data
            archive.writestr(name, changed)
    script = (
        "import sys; from freemerge.checkpoints import load_checkpoint\n"
        f"print(len(load_checkpoint({str(tmp_path / 'b.ckpt')!r})), 'antigravity' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(STATE)), "False"]


def test_a_tensor_that_reaches_beyond_its_storage_is_one_line(tmp_path):
    """The file defines offset, sizes and strides."""
    torch.save({"state_dict": {"w": torch.zeros(4)}, "x": pathlib.Path("/")}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(b"K\x04\x85", b"K\x7f\x85") if name.endswith("data.pkl") else data)
    with pytest.raises(CheckpointError, match="truncated or not a torch file"):
        load_checkpoint(tmp_path / "b.ckpt")


def test_old_files_with_objects_are_refused(tmp_path):
    content = {"state_dict": {"w": STATE["w"]}, "x": pathlib.Path("/")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"holds Python objects besides tensors, in the format used before torch 1\.6"
    ):
        open_checkpoint(tmp_path / "a.pt")


def test_any_flipped_bit_of_the_values_is_seen(tmp_path):
    torch.save({"w": torch.randn(64)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        info = next(info for info in archive.infolist() if "/data/" in info.filename)
        begin = whole.index(archive.read(info))
    for position in range(begin, begin + info.file_size, 31):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "b.pt").write_bytes(damaged)
        checkpoint = open_checkpoint(tmp_path / "b.pt")  # names and shapes are right
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"record '.*data/0' is damaged \(its CRC-32 is another\)"):
                checkpoint.tensor("w")
        with pytest.raises(CheckpointError, match="CRC-32"):
            checkpoint.read_range("w", 0, 3)


def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": STATE["w"]}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_checkpoint(tmp_path / "a.pt")["w"], STATE["w"])


def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 1_000_000 + b"N.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError, match=r"record 'archive/data.pkl' is compressed"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_anywhere_is_one_line_or_harmless(tmp_path):
    """Seeded changes of some bytes, and truncated files."""
    torch.save({"state_dict": STATE, "x": pathlib.Path("/")}, tmp_path / "a.ckpt")
    whole, random = (tmp_path / "a.ckpt").read_bytes(), Random(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 1, 2, 8))):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        if random.random() < 0.1:
            del damaged[random.randrange(len(damaged)) :]
        (tmp_path / "b.ckpt").write_bytes(damaged)
        try:
            found = load_checkpoint(tmp_path / "b.ckpt")
        except CheckpointError as error:
            refused.append(str(error))
        else:  # the change was in padding, or in the name of a skipped object
            assert found.keys() == STATE.keys()
            assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in STATE.items())
    assert len(refused) > 100
    assert not [message for message in refused if "\n" in message]
