"""freemerge's files that another tool changed and saved with their metadata are read with their new values."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.task_files import TaskRecord, read_record, write_task_file
from freemerge.merging import TaskArithmetic, merge

TENSORS = {
    "b.weight": torch.arange(15.0).view(5, 3),
    "a.weight": torch.arange(4.0),
    "a.bias": torch.full((4,), 0.5, dtype=torch.bfloat16),
}
CHANGES = {
    "as they are": lambda tensors: tensors,
    "some of them": lambda tensors: {"a.bias": tensors["a.bias"]},
    "one more": lambda tensors: tensors | {"z": torch.ones(2)},
    "other names": lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()},
    "one letter of a name": lambda tensors: {name.replace("b.w", "c.w"): tensor for name, tensor in tensors.items()},
    "another dtype": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "another dtype as wide": lambda tensors: tensors | {"a.bias": tensors["a.bias"].half()},
    "other values": lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()},
    "other shapes": lambda tensors: tensors | {"b.weight": tensors["b.weight"].T.contiguous()},
}


def save_again(old, new, change=lambda tensors: tensors):
    """Change the file as a user of safetensors would."""
    with safe_open(old, "pt") as file:
        tensors = change({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        save_file(tensors, new, metadata=file.metadata())
    return tensors


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_files_saved_again_are_read_with_their_new_values(change, tied, tmp_path):
    """For any order of tensors and metadata, which safetensors varies between runs."""
    save_checkpoint(tmp_path / "old.safetensors", TENSORS | ({"head": TENSORS["b.weight"]} if tied else {}))
    for _ in range(3):
        expected = save_again(tmp_path / "old.safetensors", tmp_path / "new.safetensors", change)
        found = load_checkpoint(tmp_path / "new.safetensors")
        left_out = {"head"} if tied and "b.weight" in expected else set()
        assert found.keys() == expected.keys() | left_out
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_a_header_that_a_tool_writes_as_plain_json(tmp_path):
    """With spaces after commas and colons, as `json.dumps` writes them."""
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, TENSORS, {"note": "old"})
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8:start])
    table["__metadata__"]["note"] = "new"
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])
    found = open_checkpoint(path)
    assert found.metadata == {"format": "pt", "note": "new"}
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_saving_with_freemerge_restores_the_checksums(tmp_path):
    save_checkpoint(tmp_path / "old.safetensors", TENSORS, {"note": "x"})
    save_again(tmp_path / "old.safetensors", tmp_path / "new.safetensors", CHANGES["one more"])
    again = open_checkpoint(tmp_path / "new.safetensors")
    save_checkpoint(tmp_path / "again.safetensors", dict(again), again.metadata)
    data = bytearray((tmp_path / "again.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "again.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="are not those that were written"):
        load_checkpoint(tmp_path / "again.safetensors")


def test_a_cut_file_is_truncated_whoever_wrote_it(tmp_path):
    save_checkpoint(tmp_path / "old.safetensors", TENSORS)
    save_again(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    for name in ("old", "new"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: truncated: its header promises"):
            open_checkpoint(path)


@pytest.mark.parametrize("holds", ["weights", "task_vector"])
def test_task_files_saved_again_in_half_precision_merge(holds, tmp_path):
    base = {"z.weight": torch.ones(2, 3), "a.bias": torch.zeros(3)}
    vector = {"z.weight": torch.full((2, 3), 0.5), "a.bias": torch.full((3,), 2.0)}
    kept = vector if holds == "task_vector" else {name: base[name] + vector[name] for name in base}
    record = TaskRecord("digits", holds, "0" * 64, 1, {"acc": 0.5}, dict.fromkeys(base, torch.float32))
    write_task_file(tmp_path / "task.safetensors", record, kept, {"weight": torch.ones(2, 2)})
    save_again(tmp_path / "task.safetensors", tmp_path / "half.safetensors", CHANGES["another dtype"])
    assert read_record(tmp_path / "half.safetensors") == record
    model = open_checkpoint(tmp_path / "half.safetensors", prefix="backbone.").without_metadata()
    merged = merge(base, [model], TaskArithmetic(scale=1.0))
    assert all(torch.equal(merged[name], base[name] + vector[name]) for name in base)


def test_a_task_vector_by_other_names_is_not_taken_for_weights(tmp_path):
    record = TaskRecord("digits", "task_vector", "0" * 64, None, {})
    write_task_file(tmp_path / "task.safetensors", record, {"w": torch.ones(2)}, {})
    save_again(tmp_path / "task.safetensors", tmp_path / "new.safetensors", lambda tensors: {"w": torch.ones(2)})
    with pytest.raises(
        CheckpointError, match=r"new\.safetensors: its metadata say that it holds a task vector, and no"
    ):
        open_checkpoint(tmp_path / "new.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"seed": "?"}, {"metrics": None}, {"dtypes": '{"w": "float33"}'}, {"dtypes": "[]"}, {"holds": "more"},
     {"seed": "[" * 100_000}],
)  # fmt: skip
def test_an_incomplete_record(change, tmp_path):
    path = tmp_path / "task.safetensors"
    write_task_file(path, TaskRecord("digits", "weights", "0" * 64, None, {}), {"w": torch.ones(2)}, {})
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in {**file.metadata(), **change}.items() if value is not None}
    save_file({"backbone.w": torch.ones(2)}, path, metadata)
    for read in (read_record, open_checkpoint):
        with pytest.raises(
            CheckpointError, match=r"task\.safetensors: the metadata of this task file is incomplete or damaged"
        ) as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_task_vector_that_does_not_fit_its_dtype_is_not_written(dtype, tmp_path):
    path, record = tmp_path / "task.safetensors", TaskRecord("digits", "task_vector", "0" * 64, None, {})
    top = torch.finfo(dtype).max
    write_task_file(path, record, {"w": torch.tensor([-top, top])}, {}, dtype)
    with pytest.raises(
        CheckpointError, match=r"task\.safetensors: the tensor 'w' has values that do not fit into float"
    ):
        write_task_file(path, record, {"w": torch.tensor([0.0, 2 * top])}, {}, dtype)
    assert torch.equal(open_checkpoint(path).tensor("backbone.w").float(), torch.tensor([-top, top]))
