"""A model's companions: every file that belongs to it is copied, and files left behind are named."""

import json
import os

import pytest

from freemerge.checkpoints import CheckpointError
from freemerge.checkpoints.companions import find_companions, top_companions

TAKEN = [
    "config.json", "generation_config.json", "tokenizer.json", "vocab.txt", "merges.txt", "spiece.model", "vocab.bpe",
    "bpe.codes", "tokenizer.model.v3", "chat_template.jinja", "modeling_own.py", "LICENSE", "USE_POLICY.md",
    "special_tokens_map.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/README.md",
    "additional_chat_templates/tools.jinja", "custom_generate/generate.py", "deep/er/table.tsv",
]  # fmt: skip
WEIGHTS = ["colbert_linear.pt", "mm_projector.bin", "codec/model.pt", "speech-lora/adapter_model.safetensors"]
OWN = ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "model-00001-of-00002.safetensors"]
OWN += ["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"]
LEFT = ["README.md", "freemerge.json", "trainer_state.json", "optimizer.pt", "adapter_config.json", "training_args.bin"]
LEFT += ["tf_model.h5", "flax_model.msgpack", "model.onnx", "model.q4.gguf", "consolidated.00.pth", ".gitattributes"]
LEFT += ["rng_state_0.pth", "eval_results.json", "events.out.tfevents.17"]
FOLDERS = [".git/config", "__pycache__/x.pyc", "onnx/model.onnx", "checkpoint-500/config.json", "original/params.json"]


def make(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_all_files_but_weights_caches_and_leftovers_of_training_are_companions(tmp_path):
    make(tmp_path, [*TAKEN, *WEIGHTS, *OWN, *LEFT, *FOLDERS])
    found = find_companions(tmp_path)
    assert sorted(found.files) == sorted([*TAKEN, *WEIGHTS])
    assert all(found.files[name] == tmp_path / name for name in found.files)
    assert sorted(found.weights) == sorted(WEIGHTS)
    assert found.modules == ["2_Dense"]
    assert found.left_out == sorted([*LEFT, *(name.split("/")[0] + "/" for name in FOLDERS)])


def test_beside_one_of_many_files_nothing_below_and_no_other_weights(tmp_path):
    make(tmp_path, ["config.json", "a.safetensors", "b.safetensors", "data/image.png"])
    assert list(top_companions(tmp_path).files) == ["config.json"]


def test_shards_of_any_name_are_the_models_own(tmp_path):
    make(tmp_path, ["part-one.safetensors", "head.safetensors"])
    index = {"weight_map": {"w": "part-one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(find_companions(tmp_path).files) == ["head.safetensors"]


def test_other_models_in_subfolders_are_left_out(tmp_path):
    make(tmp_path, ["config.json", "tuned/model.safetensors", "b.safetensors", "merged/freemerge.json", "merged/a.py"])
    found = find_companions(tmp_path, [tmp_path / "tuned", tmp_path / "b.safetensors"])
    assert (list(found.files), found.modules, found.left_out) == (["config.json"], [], ["merged/"])


def test_links_to_files_are_files_and_links_to_folders_are_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "model"
    make(outside, ["blob", "secret/key"])
    make(folder, ["config.json"])
    (folder / "vocab.txt").symlink_to(outside / "blob")
    (folder / "secret").symlink_to(outside / "secret")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(outside / "gone")
    os.mkfifo(folder / "pipe.json")
    found = find_companions(folder)
    assert sorted(found.files) == ["config.json", "vocab.txt"]
    assert found.left_out == ["gone.txt", "loop/", "pipe.json", "secret/"]


def test_folders_nested_without_end_stay_behind(tmp_path):
    make(tmp_path, ["a/" * 200 + "x.json"])
    found = find_companions(tmp_path)
    assert (found.files, found.left_out) == ({}, ["a/" * 33])


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(CheckpointError, match="closed: cannot be read: Permission denied"):
        find_companions(tmp_path)
