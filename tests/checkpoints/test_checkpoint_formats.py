"""Every format opens lazily to the same tensors, and errors of broken files name the problem."""

import json
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(5, 3, generator=generator),
        "layer.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
        "norm.half": torch.randn(2, 2, generator=generator).half(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


def assert_same(checkpoint, tensors):
    assert set(checkpoint.names) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.spec(name) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint.tensor(name), tensor)


def write(path, tensors, kind):
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path / "m.safetensors")
        return path / "m.safetensors"
    if kind == "ours":
        save_checkpoint(path / "o.safetensors", tensors)
        return path / "o.safetensors"
    if kind in ("pt", "pth", "bin"):
        torch.save(tensors, path / f"m.{kind}")
        return path / f"m.{kind}"
    if kind == "legacy":
        torch.save(tensors, path / "legacy.pt", _use_new_zipfile_serialization=False)
        return path / "legacy.pt"
    if kind == "ckpt":
        torch.save({"state_dict": tensors, "epoch": 3, "loops": {}, "hyper_parameters": {"lr": 0.1}}, path / "m.ckpt")
        return path / "m.ckpt"
    if kind == "folder":
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        return path
    if kind == "folder-bin":
        torch.save(tensors, path / "pytorch_model.bin")
        return path
    save, suffix = (safetensors.torch.save_file, "safetensors") if kind == "sharded" else (torch.save, "bin")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        save({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


KINDS = ["safetensors", "ours", "pt", "pth", "bin", "legacy", "ckpt", "folder", "folder-bin", "sharded", "sharded-bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_opens_to_the_same_tensors(tmp_path, tensors, kind):
    path = write(tmp_path, tensors, kind)
    assert_same(open_checkpoint(path), tensors)
    assert_same(open_checkpoint(str(path), label="mine"), tensors)
    assert open_checkpoint(path).label == str(path)
    loaded = load_checkpoint(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_is_a_mapping(tensors):
    checkpoint = open_checkpoint(tensors, label="base")
    assert len(checkpoint) == 6
    assert "steps" in checkpoint
    assert "stepz" not in checkpoint
    assert torch.equal(dict(checkpoint)["steps"], tensors["steps"])
    assert checkpoint.get("nothing") is None
    assert repr(checkpoint) == "Checkpoint('base', 6 tensors)"
    assert open_checkpoint(checkpoint) is checkpoint
    assert open_checkpoint(checkpoint, label="other").label == "other"
    assert checkpoint.label == "base"


def test_a_module_opens_without_copies_and_without_gradients():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    checkpoint = open_checkpoint(module)
    assert checkpoint.label == "Sequential"
    assert checkpoint.tensor("0.weight").data_ptr() == module[0].weight.data_ptr()
    assert not checkpoint.tensor("0.weight").requires_grad
    assert checkpoint.spec("1.num_batches_tracked") == ((), torch.int64)


def test_lightning_prefixes_are_given_or_found(tmp_path):
    backbone = {"a.weight": torch.ones(2), "a.bias": torch.ones(1), "model.c": torch.ones(3)}
    state = {f"backbone.model.{name}": tensor for name, tensor in backbone.items()}
    state |= {"heads.a.weight": torch.ones(9), "criterion.weight": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    given = open_checkpoint(tmp_path / "x.ckpt", prefix="backbone.model.")
    found = open_checkpoint(tmp_path / "x.ckpt").relative_to(backbone)
    for checkpoint in (given, found):
        assert_same(checkpoint, backbone)
        assert checkpoint.outside == ("heads.a.weight", "criterion.weight")
    assert open_checkpoint(backbone).relative_to(backbone).names == tuple(backbone)
    assert open_checkpoint(state).relative_to(["nothing.of.it"]).names == tuple(state)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: no tensor's name starts with the prefix 'bert\.'; its first"):
        open_checkpoint(tmp_path / "x.ckpt", prefix="bert.")


def test_an_ambiguous_prefix_is_an_error():
    state = {f"{model}.{name}": torch.ones(1) for model in ("net", "ema") for name in ("a.weight", "a.bias")}
    with pytest.raises(
        CheckpointError, match=r"c: holds the base's tensors under 'ema\.' and under 'net\.'; say which"
    ):
        open_checkpoint(state, label="c").relative_to(["a.weight", "a.bias"])
    # An additional name decides, and so do names without a prefix.
    assert open_checkpoint(state | {"net.c": torch.ones(1)}).relative_to(["a.weight", "a.bias", "c"]).names[-1] == "c"
    assert (
        len(open_checkpoint(state | {"a.weight": torch.ones(1), "a.bias": torch.ones(1)}).relative_to(["a.bias"])) == 6
    )


def test_ties_are_seen_and_survive_a_file(tmp_path):
    shared = torch.randn(4, 2)
    fused = torch.randn(6, 2)
    state = {"wte": shared, "q": fused[:3], "k": fused[3:], "transposed": fused.T, "head": shared}
    assert open_checkpoint(state).tied == {"head": "wte"}
    save_checkpoint(tmp_path / "t.safetensors", state, {"note": "wte"})
    with safetensors.safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["k", "q", "transposed", "wte"]
        metadata = dict(file.metadata())
        assert len(metadata.pop("freemerge.table")) == 16
        assert len(metadata.pop("freemerge.sums")) == 4 * 16
        assert metadata == {"note": "wte", "head": "wte", "format": "pt", "freemerge.tied": "head"}
    loaded = load_checkpoint(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert set(loaded) == set(state)
    assert loaded["head"] is loaded["wte"]
    assert loaded["q"].untyped_storage().data_ptr() != loaded["k"].untyped_storage().data_ptr()
    # The left-out name can be read, though it is not listed; and the prefix goes from both names.
    assert torch.equal(open_checkpoint(tmp_path / "t.safetensors").tensor("head"), shared)
    prefixed = open_checkpoint({f"m.{name}": tensor for name, tensor in state.items()}, prefix="m.")
    assert prefixed.tied == {"head": "wte"}


def test_ties_of_safetensors_own_files_are_seen(tmp_path):
    module = nn.ModuleDict({"wte": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3, bias=False)})
    module["head"].weight = module["wte"].weight
    safetensors.torch.save_model(module, str(tmp_path / "m.safetensors"))
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert set(loaded) == {"wte.weight", "head.weight"}
    assert loaded["wte.weight"] is loaded["head.weight"]


def test_a_tensor_called_like_metadata_is_not_tied(tmp_path):
    for save in (safetensors.torch.save_file, lambda tensors, path: save_checkpoint(path, tensors)):
        save({"pt": torch.zeros(1)}, tmp_path / "m.safetensors")
        assert set(load_checkpoint(tmp_path / "m.safetensors")) == {"pt"}


def test_a_loaded_checkpoint_owns_its_memory(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
    load_checkpoint(tmp_path / "w.pt")["w"].fill_(1)
    assert load_checkpoint(tmp_path / "w.pt")["w"].tolist() == [0, 0, 0]


def test_only_what_is_read_is_opened(tmp_path, tensors):
    """Opening reads only the header; the data may even be garbage."""
    path = write(tmp_path, tensors, "safetensors")
    size = path.stat().st_size
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    path.write_bytes(path.read_bytes()[:header] + b"\xff" * (size - header))
    assert set(open_checkpoint(path).names) == set(tensors)


class Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_code_in_a_pickle_never_runs(tmp_path, capsys):
    torch.save({"w": torch.zeros(1), "x": Code()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt: holds Python objects besides tensors.*save its state dict"):
        open_checkpoint(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["ours", "pt", "legacy", "ckpt", "folder", "sharded"])
@pytest.mark.parametrize("left", [0, 5, 0.1, 0.5, 0.95, -1])
def test_truncated_files_are_one_line_that_names_them(tmp_path, tensors, kind, left):
    tensors["layer.weight"] = torch.randn(64, 64)
    path = write(tmp_path, tensors, kind)
    file = path if path.is_file() else sorted(path.glob("*.safetensors"))[0]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * left) if isinstance(left, float) else left])
    with pytest.raises(CheckpointError, match=r"truncated.*(copy or download it again)") as caught:
        load_checkpoint(path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def header(path, table, data=b""):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


BROKEN_HEADERS = [
    (b"{not json", "its header is not JSON"),
    ([1, 2], "its header is not a table"),
    ({"w": {"dtype": "F32", "shape": [2]}}, "malformed"),
    ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "another length than its shape"),
    ({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "dtype F4, which is not supported"),
    ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "truncated: its header promises"),
    ({"w": 3}, "malformed"),
]


@pytest.mark.parametrize(("table", "message"), BROKEN_HEADERS)
def test_broken_headers(tmp_path, table, message):
    header(tmp_path / "b.safetensors", table)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "b.safetensors")
    assert "b.safetensors" in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"no\.safetensors: does not exist; check the path"):
        open_checkpoint(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights in this folder; expected one of model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match=r"x\.gguf: unknown kind of file; expected a folder"):
        open_checkpoint(tmp_path / "x.gguf")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: missing, though model.safetensors.index.json"):
        open_checkpoint(tmp_path)
    for text in ("{}", "[", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="not an index of shards"):
            open_checkpoint(tmp_path)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="lists no shards"):
        open_checkpoint(tmp_path)


def test_the_same_tensor_in_two_shards(tmp_path):
    for file in ("a.safetensors", "b.safetensors"):
        save_checkpoint(tmp_path / file, {"w": torch.zeros(1)})
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"b\.safetensors: the tensor 'w' is also in .*a\.safetensors"):
        open_checkpoint(tmp_path)


def test_invalid_models(tmp_path):
    with pytest.raises(TypeError, match="a model is a state dict, a module or a path, not a int"):
        open_checkpoint(3)
    with pytest.raises(CheckpointError, match="mine: the entry 'lr' is a float, not a tensor"):
        open_checkpoint({"lr": 0.1}, label="mine")
    with pytest.raises(CheckpointError, match="'w' is on the meta device and has no data"):
        open_checkpoint({"w": torch.empty(1, device="meta")})
    with pytest.raises(CheckpointError, match="'w' is sparse"):
        open_checkpoint({"w": torch.zeros(2, 2).to_sparse()})
    with pytest.raises(CheckpointError, match="m: there is no tensor 'v' among its 1"):
        open_checkpoint({"w": torch.zeros(1)}, label="m").tensor("v")
    for content, found in (({"epoch": 3}, "epoch"), ([torch.zeros(1)], "a list"), ({}, "nothing")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=rf"x\.pt: holds no state dict \(found: {found}\)"):
            open_checkpoint(tmp_path / "x.pt")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_checkpoint(tmp_path / "w.safetensors", {"w": torch.zeros(100)})
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ended inside the tensor 'w': the file changed"):
        checkpoint.tensor("w")
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.tensor("w")
