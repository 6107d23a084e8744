"""Folders that are merged into: links, parts with weights of their own, companions, configuration."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from freemerge.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from freemerge.checkpoints.writing import draft as draft_module
from freemerge.merging import MergeError, MergeWarning, PCBMerging, TaskArithmetic, WeightAverage, merge

BASE = {"layer.weight": torch.zeros(2, 2), "layer.bias": torch.zeros(2)}


def write(folder, *, value=0.0, dense=None, config=None):
    """A model of constant values, with or without a dense layer."""
    save_checkpoint(folder / "model.safetensors", {name: tensor + value for name, tensor in BASE.items()})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "own"}))
    if dense is not None:
        save_checkpoint(folder / "2_Dense" / "model.safetensors", {"linear.weight": torch.full((3, 2), dense)})
        (folder / "2_Dense" / "config.json").write_text('{"in_features": 2}')
    return folder


def files_of(folder):
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


@pytest.fixture
def inputs(tmp_path):
    return write(tmp_path / "base"), [write(tmp_path / "a", value=1.0), write(tmp_path / "b", value=3.0)]


# -- links ------------------------------------------------------------------------------------------------------------


def test_a_linked_folder_is_written_where_the_link_leads(tmp_path, inputs):
    (tmp_path / "disk" / "v1").mkdir(parents=True)
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "disk" / "v1")
    for scale in (1.0, 0.5):  # into the empty folder, then over its own result
        assert merge(*inputs, TaskArithmetic(scale), output=link, overwrite=scale < 1) == link
        assert link.is_symlink()
        assert load_checkpoint(tmp_path / "disk" / "v1")["layer.bias"].tolist() == [4 * scale] * 2
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "base", "current", "disk"]
    assert os.listdir(tmp_path / "disk") == ["v1"]
    # Another output in its place leaves the link's former target unchanged.
    link.unlink()
    merge(*inputs, TaskArithmetic(2.0), output=link)
    assert load_checkpoint(tmp_path / "disk" / "v1")["layer.bias"].tolist() == [2, 2]


def test_a_linked_file_and_a_link_to_nothing_yet(tmp_path, inputs):
    (tmp_path / "disk").mkdir()
    for name in ("out.safetensors", "out"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        merge(*inputs, WeightAverage(), output=link)
        assert link.is_symlink()
        assert load_checkpoint(tmp_path / "disk" / name)["layer.bias"].tolist() == [2, 2]
    assert sorted(os.listdir(tmp_path / "disk")) == ["out", "out.safetensors"]


def test_a_linked_draft_is_not_followed(tmp_path, inputs):
    """Left by an older version: clearing it would empty the folder that the link leads to."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.tex").touch()
    (tmp_path / ".merged.partial").symlink_to(tmp_path / "kept")
    merge(*inputs, WeightAverage(), output=tmp_path / "merged")
    assert os.listdir(tmp_path / "kept") == ["thesis.tex"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "base", "kept", "merged"]


def test_inputs_inside_the_output_are_not_overwritten(tmp_path, inputs):
    output = merge(*inputs, WeightAverage(), output=tmp_path / "merged")
    inner = shutil.copytree(inputs[1][0], output / "tuned")
    with pytest.raises(MergeError, match=r"merged: holds the input .*/merged/tuned, which would be lost"):
        merge(inputs[0], [inner], WeightAverage(), output=output, overwrite=True)
    shutil.rmtree(inner)
    merge(output / "model.safetensors", inputs[1], WeightAverage(), output=output, overwrite=True)
    assert load_checkpoint(output)["layer.bias"].tolist() == [2, 2]


# -- parts with weights of their own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["5GB", 20])
def test_weights_in_folders_below_are_merged(tmp_path, shard_size):
    base = write(tmp_path / "base", dense=1.0)
    models = [write(tmp_path / "a", value=1.0, dense=2.0), write(tmp_path / "b", value=3.0, dense=5.0)]
    output = merge(base, models, TaskArithmetic(0.5), output=tmp_path / "o", dtype="bfloat16", shard_size=shard_size)
    merged = load_checkpoint(output)
    assert set(merged) == set(BASE)
    assert merged["layer.weight"].unique().tolist() == [2]
    dense = load_checkpoint(output / "2_Dense")
    assert list(dense) == ["linear.weight"]
    assert dense["linear.weight"].dtype == torch.bfloat16
    assert dense["linear.weight"].unique().tolist() == [3.5]  # 1 + 0.5·((2 − 1) + (5 − 1))
    assert json.loads((output / "2_Dense" / "config.json").read_text()) == {"in_features": 2}
    record = json.loads((output / "freemerge.json").read_text())
    assert record["files"]["modules"] == ["2_Dense"]
    assert record["tensors"]["merged"] == 3


def test_a_part_may_be_left_out_or_untouched(tmp_path):
    base, model = write(tmp_path / "base", dense=1.0), write(tmp_path / "a", value=1.0)
    output = merge(base, [model], TaskArithmetic(), output=tmp_path / "without")
    assert load_checkpoint(output / "2_Dense")["linear.weight"].unique().tolist() == [1]
    tuned = write(tmp_path / "b", value=1.0, dense=7.0)
    output = merge(base, [tuned], TaskArithmetic(), output=tmp_path / "excluded", exclude=["2_Dense/*"])
    assert load_checkpoint(output / "2_Dense")["linear.weight"].unique().tolist() == [1]
    # An adapter, or any other file, changes nothing of it either; global statistics see the part.
    output = merge(base, [model / "model.safetensors", tuned], PCBMerging(1.0, clip=0.0), output=tmp_path / "pcb")
    assert load_checkpoint(output / "2_Dense")["linear.weight"].unique().tolist() == [7]


def test_a_part_that_the_result_cannot_hold_is_reported(tmp_path):
    base, model = write(tmp_path / "base", dense=1.0), write(tmp_path / "a", value=1.0, dense=2.0)
    for output in (None, tmp_path / "o.safetensors"):
        with pytest.warns(MergeWarning, match=r"the weights in 2_Dense/ are not part of the result; write a folder"):
            merge(base, [model], WeightAverage(), output=output)


def test_a_part_missing_from_the_base_is_named(tmp_path, inputs):
    model = write(tmp_path / "c", dense=1.0)
    with pytest.raises(MergeError, match=r"c: the tensor '2_Dense/linear.weight' with shape \[3, 2\] is not in"):
        merge(inputs[0], [model], WeightAverage(), output=tmp_path / "o")
    output = merge(inputs[0], [model], WeightAverage(), output=tmp_path / "o", exclude=["2_Dense/*"])
    assert files_of(output) == ["README.md", "config.json", "freemerge.json", "model.safetensors"]


def test_a_changed_part_is_not_resumed(tmp_path, monkeypatch):
    base, model = write(tmp_path / "base", dense=1.0), write(tmp_path / "a", dense=2.0)

    def fail(*_):
        raise CheckpointError("the disk was pulled out")

    monkeypatch.setattr(draft_module.Draft, "commit", fail)
    with pytest.raises(CheckpointError, match="pulled out"):
        merge(base, [model], WeightAverage(), output=tmp_path / "o", resume=True)
    monkeypatch.undo()
    write(model, dense=3.0)
    with pytest.raises(CheckpointError, match="an interrupted merge with other inputs"):
        merge(base, [model], WeightAverage(), output=tmp_path / "o", resume=True)


# -- companions -------------------------------------------------------------------------------------------------------


def test_companions_are_copied_with_their_folders(tmp_path, inputs):
    base = inputs[0]
    (tmp_path / "blob").write_text("template")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").symlink_to(tmp_path / "blob")
    (base / "vocab.bpe").write_bytes(b"\xff\x00")
    (base / "tf_model.h5").touch()
    (base / "outside").symlink_to(tmp_path)
    output = merge(*inputs, WeightAverage(), output=tmp_path / "o")
    names = ["README.md", "additional_chat_templates/tools.jinja", "config.json", "freemerge.json", "model.safetensors"]
    assert files_of(output) == [*names, "vocab.bpe"]
    copy = output / "additional_chat_templates" / "tools.jinja"
    assert (copy.read_text(), copy.is_symlink()) == ("template", False)
    assert (output / "vocab.bpe").read_bytes() == b"\xff\x00"
    record = json.loads((output / "freemerge.json").read_text())
    assert record["files"] == {
        "from": "base",
        "copied": ["additional_chat_templates/tools.jinja", "config.json", "vocab.bpe"],
        "modules": [],
        "left_out": ["outside/", "tf_model.h5"],
        "note": None,
    }


def test_companions_that_do_not_fit_on_the_disk_are_named_first(tmp_path, inputs, monkeypatch):
    with (inputs[0] / "corpus.txt").open("wb") as file:
        file.truncate(3 * 10**9)  # a hole
    monkeypatch.setattr(draft_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    message = r"o: the files beside the base's weights take 3.0 GB \(.*/corpus.txt 3.0 GB\) and 1.0 GB are free; move"
    with pytest.raises(CheckpointError, match=message):
        merge(*inputs, WeightAverage(), output=tmp_path / "o")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "base"]


def test_home_is_understood(tmp_path, inputs, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert merge("~/base", ["~/a"], WeightAverage(), output="~/o") == tmp_path / "o"
    assert (tmp_path / "o" / "config.json").is_file()


# -- configuration ----------------------------------------------------------------------------------------------------


def test_inner_configurations_have_the_dtype(tmp_path):
    inner = {"hidden_size": 2, "dtype": "float16", "deeper": {"torch_dtype": "float32"}}
    config = {"torch_dtype": "float16", "text_config": inner, "layers": [1]}
    base = write(tmp_path / "base", config=config)
    output = merge(base, [base], WeightAverage(), output=tmp_path / "o", dtype="bfloat16")
    assert json.loads((output / "config.json").read_text()) == {
        "torch_dtype": "bfloat16",
        "text_config": {"hidden_size": 2, "dtype": "bfloat16", "deeper": {"torch_dtype": "bfloat16"}},
        "layers": [1],
    }
    # Without dtype it is the base's, byte for byte.
    same = merge(base, [base], WeightAverage(), output=tmp_path / "same")
    assert (same / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "config.json: holds a list, expected an object; download it again"),
        (b"{", "config.json: is not JSON in UTF-8"),
        (b'{"a": "\xe9"}', "config.json: is not JSON in UTF-8"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "config.json: is nested too deeply"),
        (b"[" * 100_000, "config.json: is nested too deeply"),
    ],
)
def test_a_broken_configuration_is_one_line_before_any_work(tmp_path, inputs, content, message):
    (inputs[0] / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        merge(*inputs, WeightAverage(), output=tmp_path / "o", dtype="bfloat16")
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "base"]


@pytest.mark.parametrize(
    "config", [{"dtype": 5, "text_config": []}, {"dtype": {"a": 1}}, {"text_config": {"dtype": 1}}]
)
def test_odd_types_in_a_configuration_are_ignored(tmp_path, config):
    base = write(tmp_path / "base", config=config)
    output = merge(base, [base], WeightAverage(), output=tmp_path / "o", dtype="bfloat16")
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_loads_weights_of_one_byte(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = load_checkpoint(tmp_path / "base")
    output = merge(
        tmp_path / "base", [tmp_path / "base"], WeightAverage(), output=tmp_path / "o", dtype="float8_e4m3fn"
    )
    assert {tensor.dtype for tensor in load_checkpoint(output).values()} == {torch.float8_e4m3fn}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
    for name, tensor in base.items():
        assert torch.equal(loaded[name], tensor.to(torch.float8_e4m3fn).to(torch.bfloat16))
