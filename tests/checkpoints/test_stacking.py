"""Stacks of layers: names, values, companions, and what does not fit."""

import json

import pytest
import torch

from freemerge.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from freemerge.checkpoints.naming.layers import count_layers, is_before, split_layer
from freemerge.checkpoints.stacking import parse_stack, with_layers
from freemerge.merging import TaskArithmetic, WeightAverage, merge, merge_to


def test_names_of_layers():
    assert split_layer("model.layers.3.mlp.experts.7.w1") == ("model.layers.", 3, ".mlp.experts.7.w1")
    assert split_layer("3.weight") == ("", 3, ".weight")
    assert split_layer("layer2.weight") is None
    assert split_layer("encoder.layer.11.output.dense.bias").at(4) == "encoder.layer.4.output.dense.bias"
    assert count_layers(["h.0.a", "h.2.a", "v.0.x", "head"]) == {"h.": 3, "v.": 1}
    assert is_before("transformer.wte.weight")
    assert not is_before("model.norm.weight")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a[0:4]", [("a", 0, 4)]),
        ("org/a@v2[0:16]+b/c d[8:24]", [("org/a@v2", 0, 16), ("b/c d", 8, 24)]),
        ("a[0:1] + a[0:1]", [("a", 0, 1), ("a", 0, 1)]),
        ("a", None),
        ("a[0:4]b", None),
        ("a[0:4]+b", None),
        ("[0:4]", None),
    ],
)
def test_how_a_stack_is_written(text, pieces):
    assert parse_stack(text) == pieces


def test_a_path_that_exists_is_a_path(tmp_path):
    path = tmp_path / "a[0:4]"
    path.mkdir()
    assert parse_stack(str(path)) is None


@pytest.fixture
def folder(tmp_path):
    tensors = {f"h.{layer}.w": torch.full((2, 3), float(layer)) for layer in range(3)}
    tensors |= {"wte.weight": torch.ones(5, 3), "head.weight": torch.full((5, 3), 9.0)}
    (tmp_path / "m").mkdir()
    save_checkpoint(tmp_path / "m" / "model.safetensors", tensors)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "x", "n_layer": 3}))
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    return tmp_path / "m"


def test_values_parts_and_a_merge_in_memory(folder):
    stack = open_checkpoint(f"{folder}[2:3]+{folder}[0:2]+{folder}[2:3]")
    assert stack.layers == (2, 0, 1, 2)
    assert [float(stack.tensor(f"h.{layer}.w")[0, 0]) for layer in range(4)] == [2.0, 0.0, 1.0, 2.0]
    assert stack.read_range("h.3.w", 1, 3).tolist() == [2.0, 2.0]
    assert set(stack.names) == {"wte.weight", "head.weight", *(f"h.{layer}.w" for layer in range(4))}
    merged = merge(stack, [{name: stack.tensor(name) + 1 for name in stack.names}], TaskArithmetic(0.5))
    assert float(merged["h.0.w"][0, 0]) == 2.5


def test_a_folder_with_its_companions(folder, tmp_path):
    text = f"{folder}[0:2]+{folder}[1:3]"
    merge_to(text, [text], WeightAverage(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 4
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    record = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    assert record["base"]["name"] == text
    with pytest.raises(Exception, match="lies in the folder of an input"):
        merge_to(text, [text], WeightAverage(), folder / "out")


def test_the_whole_model_is_the_model_itself(folder):
    whole = open_checkpoint(f"{folder}[0:3]")
    assert whole.layers is None
    assert whole.names == open_checkpoint(folder).names


def test_per_layer_settings_of_the_language_model():
    config = {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 2, "layer_types": "ab"}}
    config["text_config"]["layer_types"] = ["a", "b"]
    changed = with_layers(config, [0, 1, 1])
    assert changed["vision_config"] == config["vision_config"]
    assert changed["text_config"] == {"num_hidden_layers": 3, "layer_types": ["a", "b", "b"]}


@pytest.mark.parametrize(
    ("layers", "message"),
    [("[0:4]", r"m has the layers 0 to 2, not \[0:4\]"), ("[2:1]", r"m has the layers 0 to 2, not \[2:1\]")],
)
def test_layers_that_are_not_there(folder, layers, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(f"{folder}{layers}")


def test_models_without_layers_or_with_several_stacks(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    save_checkpoint(tmp_path / "b.safetensors", {"enc.0.w": torch.ones(2), "dec.0.w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="no tensor's name has the number of a layer"):
        open_checkpoint(f"{tmp_path / 'a.safetensors'}[0:1]")
    with pytest.raises(
        CheckpointError, match=r"several stacks of layers, and it is unclear which is meant: enc\.0 to 0"
    ):
        open_checkpoint(f"{tmp_path / 'b.safetensors'}[0:1]")
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        open_checkpoint(f"{tmp_path / 'nowhere'}[0:1]")
