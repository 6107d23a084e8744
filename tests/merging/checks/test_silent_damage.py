"""What other tools have been seen to do in silence cannot happen here.

Each test names the damage: mergekit 0.1.5 and FusionBench 0.2.33 as we ran them, and what their users report.
"""

import json
import os

import pytest
import torch

from freemerge.checkpoints import Checkpoint, TensorSpec, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.merging import MergeError, PCBMerging, TaskArithmetic, WeightAverage, merge

ODD_NAMES = {
    "vision_tower.blocks.0.attn.qkv.weight": torch.ones(6, 2),
    "model.language_model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 3, 4),
    "model.layers.0.self_attn.q_norm.weight": torch.ones(3),
    "multi_modal_projector": torch.ones(2),
    "a.module.nobody.has.heard.of": torch.ones(()),
    "lm_head.weight": torch.ones(4, 2),
    "position_ids": torch.arange(3),
    "empty": torch.ones(0, 2),
}


def test_no_tensor_is_lost_because_no_list_has_its_name(tmp_path):
    """mergekit wrote 21 of 35 tensors and exit code 0: the architecture's file did not list the others."""
    (tmp_path / "base").mkdir()
    save_checkpoint(tmp_path / "base" / "model.safetensors", ODD_NAMES)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "of_tomorrow", "architectures": ["New"]}))
    tuned = {name: tensor + 1 for name, tensor in ODD_NAMES.items()}
    output = merge(tmp_path / "base", [tuned], WeightAverage(), output=tmp_path / "merged", shard_size="100")
    found = load_checkpoint(output)
    assert set(found) == set(ODD_NAMES)
    for name, tensor in ODD_NAMES.items():
        assert torch.equal(found[name], tensor + tensor.is_floating_point())


@pytest.mark.parametrize("sizes", [("5GB", "300"), ("300", "5GB")])
def test_no_older_weights_stay_in_the_output(tmp_path, base, models, sizes):
    """transformers then loads the older `model.safetensors`, not the new shards."""
    for scale, size in zip((0.0, 1.0), sizes, strict=True):
        output = merge(base, models, TaskArithmetic(scale), output=tmp_path / "merged", shard_size=size, overwrite=True)
    whole, index = (output / name for name in ("model.safetensors", "model.safetensors.index.json"))
    assert whole.exists() != index.exists()
    expected = merge(base, models, TaskArithmetic(1.0))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_checkpoint(output).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whose", ["base", "model"])
@pytest.mark.parametrize("adapter", [False, True])
def test_nan_is_refused(tmp_path, base, models, value, whose, adapter):
    """Both tools accept experts that are NaN."""
    broken = {name: tensor.clone() for name, tensor in (base if whose == "base" else models[0]).items()}
    broken["embed.weight"][3, 2] = value
    inputs = (broken, models) if whose == "base" else (base, [broken, *models[1:]])
    with pytest.raises(MergeError, match=r"'embed\.weight' has 1 values that are NaN or infinite"):
        merge(*inputs, PCBMerging(), output=tmp_path / ("a" if adapter else "a.safetensors"),
              **{"output_format": "lora", "rank": 2} if adapter else {})  # fmt: skip
    assert os.listdir(tmp_path) == []


def test_nothing_of_the_callers_is_changed(base, models, method):
    """FusionBench's task arithmetic changes the given base in place."""
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in (base, *models)]
    merge(base, models, method)
    for model, copy in zip((base, *models), before, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in copy)


def test_transposed_and_renamed_parameters_are_refused(base, models):
    """FusionBench's TIES flattens tensors without comparing names or shapes."""
    transposed = models[0] | {"embed.weight": models[0]["embed.weight"].T.contiguous()}
    for embeddings in ("error", "base", "common"):
        with pytest.raises(MergeError, match=r"'embed.weight' has shape \[6, 20\], expected \[20, 6\]"):
            merge(base, [transposed], WeightAverage(), embeddings=embeddings)
    renamed = {name.replace("embed", "embedding"): tensor for name, tensor in models[0].items()}
    with pytest.raises(MergeError, match=r"the tensor 'embed.weight' is missing"):
        merge(base, [renamed], WeightAverage())


def test_relative_paths_work_to_the_end(tmp_path, base, models, monkeypatch):
    """mergekit failed on them while writing the model card, after the weights."""
    (tmp_path / "in").mkdir()
    save_checkpoint(tmp_path / "in" / "base.safetensors", base)
    save_checkpoint(tmp_path / "in" / "tuned.safetensors", models[0])
    monkeypatch.chdir(tmp_path / "in")
    output = merge("base.safetensors", ["../in/tuned.safetensors"], WeightAverage(), output="../out")
    assert (tmp_path / "out" / "README.md").is_file()
    assert set(load_checkpoint(output)) == set(base)


def unreadable(label, shapes):
    def read(name, run):
        raise AssertionError(f"{label}: '{name}' was read")

    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    return Checkpoint(label, specs, read)


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        ({"a": (2, 2)}, {}, "the tensor 'b' is missing"),
        ({"a": (2, 2), "b": (3,)}, {}, "'b' has shape"),
        ({"a": (2, 2), "b": (2,), "c": (1,)}, {}, "'c' with shape"),
        ({"a": (2, 2), "b": (2,)}, {"include": ["x*"]}, "matches no tensor"),
        ({"a": (2, 2), "b": (2,)}, {"embeddings": "all"}, "embeddings must be one of"),
        ({"a": (2, 2), "b": (2,)}, {"output_format": "lora"}, "needs the rank"),
    ],
)
def test_errors_known_in_advance_come_before_any_work(tmp_path, shapes, arguments, message):
    """These errors must not appear after an hour of work: no value is read before them."""
    base = unreadable("base", {"a": (2, 2), "b": (2,)})
    with pytest.raises(MergeError, match=message):
        merge(base, [unreadable("model", shapes)], PCBMerging(), output=tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_factors_are_never_merged_with_each_other(tmp_path):
    """PEFT's linear, ties and dare merge A and B separately, but a product of means is not the mean of products."""
    generator = torch.Generator().manual_seed(0)
    base = {"q.weight": torch.zeros(8, 6)}
    products, paths = [], []
    for index in range(2):
        a, b = torch.randn(2, 6, generator=generator), torch.randn(8, 2, generator=generator)
        products.append(b @ a)
        paths.append(tmp_path / str(index))
        paths[-1].mkdir()
        save_checkpoint(paths[-1] / "adapter_model.safetensors", {
            "base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b})  # fmt: skip
        (paths[-1] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    for arguments in ({}, {"output_format": "lora", "rank": 4}):
        output = merge(base, paths, WeightAverage(), output=tmp_path / f"out{len(arguments)}", **arguments)
        found = open_checkpoint(output).tensor("q.weight")
        torch.testing.assert_close(found, (products[0] + products[1]) / 2)


def test_trained_complex_tensors_are_not_silently_left_out():
    base = {"w": torch.zeros(2), "wave": torch.tensor([1 + 2j, 3 - 4j])}
    tuned = {"w": torch.ones(2), "wave": base["wave"] + 1j}
    for wave in (tuned["wave"], tuned["wave"].to(torch.complex128), tuned["wave"][:1]):
        with pytest.raises(
            MergeError, match=r"a: the tensor 'wave' is complex and differs from the base's.*view_as_real"
        ):
            merge(base, {"a": {**tuned, "wave": wave}}, TaskArithmetic())
    for models, arguments in (
        ({"a": tuned}, {"exclude": ["wave"]}),
        ({"a": {**tuned, "wave": base["wave"].clone()}}, {}),
    ):
        merged = merge(base, models, TaskArithmetic(0.5), **arguments)
        assert torch.equal(merged["wave"], base["wave"])
        assert merged["w"].tolist() == [0.5, 0.5]
    parts = [{**model, "wave": torch.view_as_real(model["wave"])} for model in (base, tuned)]
    merged = merge(parts[0], [parts[1]], TaskArithmetic(0.5))
    assert torch.view_as_complex(merged["wave"]).tolist() == [1 + 2.5j, 3 - 3.5j]
