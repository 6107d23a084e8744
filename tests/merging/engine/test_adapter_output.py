"""A merge written as a LoRA adapter: loaded by PEFT, it equals the merged model up to the reported error."""

import json
import os

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.adapters.layers import Layer, find_layer
from freemerge.cli.merge import build_parser
from freemerge.cli.run_merge import run
from freemerge.merging import FRMerging, Gaussian, MergeError, TaskArithmetic, Ties, WeightAverage, merge
from tests.merging.test_merging_peft import Vision, bert, gpt2, llama, write


def make(build, seed=0):
    torch.manual_seed(seed)
    model = build()
    return model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def tuned(base, seeds, size=0.1, names=lambda name: True):
    models = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        models.append(
            {
                name: tensor + size * torch.randn(tensor.shape, generator=generator)
                if tensor.is_floating_point() and names(name)
                else tensor
                for name, tensor in base.items()
            }
        )
    return models


def untied():
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=12,
        vocab_size=13, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("build", [untied, gpt2, bert, Vision])
@pytest.mark.parametrize("rank", [2, 20])
def test_peft_loads_it_onto_the_base(tmp_path, build, rank):
    """All tensors differ from the base: matrices of both orientations, embeddings, convolutions, biases, norms."""
    model, base = make(build)
    skip = ("position_ids", "attention.in_proj")
    models = tuned(base, (1, 2), names=lambda name: not any(part in name for part in skip))
    method = FRMerging(Gaussian(0.1), coefficients="uniform")
    exclude = ["*attention.*"] if build is Vision else None
    whole = merge(base, models, method, exclude=exclude)
    output = merge(base, models, method, output=tmp_path / "a", output_format="lora", rank=rank, exclude=exclude)
    loaded = PeftModel.from_pretrained(model, output).merge_and_unload().state_dict()
    record = json.loads((output / "freemerge.json").read_text())
    lost, total = 0.0, 0.0
    for name, tensor in whole.items():
        difference, change = float((loaded[name] - tensor).norm()), float((tensor - base[name]).norm())
        reported = record["truncation"]["tensors"].get(name, 0.0)
        assert abs(difference - reported * change) < 1e-5 * (1 + change), name
        lost, total = lost + difference**2, total + change**2
    assert record["truncation"]["overall"] == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-5)
    if rank == 20:  # larger than any matrix
        assert record["truncation"]["overall"] < 1e-5
    else:
        assert 0.1 < record["truncation"]["overall"] < 1


@pytest.mark.parametrize("build", [bert, gpt2])
def test_the_written_adapter_reads_back(tmp_path, build):
    """freemerge reads the written adapter and merges it into the base: the result is the merged model."""
    _, base = make(build)
    models = tuned(base, (1, 2))
    output = merge(base, models, Ties(), output=tmp_path / "a", output_format="lora", rank=20)
    again = merge(base, [output], TaskArithmetic(1.0))
    expected = merge(base, models, Ties())
    for name, tensor in expected.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5)


def test_adapters_of_small_rank_merge_exactly(tmp_path):
    paths = {}
    for seed, rank in enumerate((2, 3)):
        config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj", "embed_tokens"])
        base, _ = write(tmp_path / f"in{seed}", untied, config, seed)
        paths[f"in{seed}"] = tmp_path / f"in{seed}"
    output = merge(base, paths, TaskArithmetic(0.5), output=tmp_path / "out", output_format="lora", rank=5)
    record = json.loads((output / "freemerge.json").read_text())
    assert record["truncation"]["overall"] < 1e-6
    assert set(record["truncation"]["tensors"]) == set(open_checkpoint(paths["in0"]).names)
    expected = merge(base, paths, TaskArithmetic(0.5))
    found = merge(base, [output], TaskArithmetic(1.0))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    smaller = merge(base, paths, TaskArithmetic(0.5), output=tmp_path / "less", output_format="lora", rank=2)
    assert json.loads((smaller / "freemerge.json").read_text())["truncation"]["overall"] > 0.05


def test_the_folder_its_record_and_its_card(tmp_path):
    _, base = make(untied)
    save_checkpoint(tmp_path / "base.safetensors", base)
    models = tuned(base, (1,), names=lambda name: "self_attn" in name or "norm" in name)
    output = merge(
        tmp_path / "base.safetensors", {"task": models[0]}, WeightAverage(),
        output=tmp_path / "a", output_format="lora", rank=3, dtype="bfloat16",
    )  # fmt: skip
    assert sorted(os.listdir(output)) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "freemerge.json"
    ]  # fmt: skip
    stored = load_checkpoint(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["base_model_name_or_path"] == str(tmp_path / "base.safetensors")
    record = json.loads((output / "freemerge.json").read_text())
    assert record["output_format"] == "lora"
    assert record["tensors"]["factored"] == 8
    assert len(record["tensors"]["whole"]) == 5
    card = (output / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"loses {record['truncation']['overall']:.2e} of the merged task vector" in card
    with pytest.raises(CheckpointError, match="exists already"):
        merge(base, models, WeightAverage(), output=output, output_format="lora", rank=3)
    merge(base, models, WeightAverage(), output=output, output_format="lora", rank=2, overwrite=True)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    assert sorted(os.listdir(tmp_path)) == ["a", "base.safetensors"]


def test_changes_that_an_adapter_cannot_hold_are_refused(tmp_path):
    _, base = make(llama)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    arguments = {"output": tmp_path / "a", "output_format": "lora", "rank": 2}
    model = {name: tensor + 0.1 for name, tensor in base.items()}
    model["lm_head.weight"] = model["model.embed_tokens.weight"]
    with pytest.raises(MergeError, match=r"'model\.embed_tokens\.weight' is input and output embedding at once"):
        merge(base, [model], WeightAverage(), **arguments)
    merge(base, [model], WeightAverage(), exclude=["*embed_tokens*"], **arguments)
    for name, value in (
        ("scale", torch.zeros(3)),
        ("layers.gate", torch.zeros(3)),
        ("experts.up", torch.zeros(2, 3, 3)),
    ):
        plain = {"layers.0.weight": torch.zeros(3, 3), name: value}
        with pytest.raises(MergeError, match=rf"'{name}' has changed, and an adapter can hold neither factors"):
            merge(
                plain,
                [{key: tensor + 1 for key, tensor in plain.items()}],
                WeightAverage(),
                **arguments | {"output": tmp_path / "b"},
            )
    with pytest.raises(MergeError, match="no matrix has changed"):
        merge(plain, [plain], WeightAverage(), **arguments | {"output": tmp_path / "b"})
    assert os.listdir(tmp_path) == ["a"]


def test_tied_embeddings_that_only_the_configuration_tells(tmp_path):
    model, base = make(llama)
    model.save_pretrained(tmp_path / "base")
    changed = {name: tensor + 0.1 for name, tensor in base.items() if name != "lm_head.weight"}
    with pytest.raises(MergeError, match="is input and output embedding at once"):
        merge(tmp_path / "base", [changed], WeightAverage(), output=tmp_path / "a", output_format="lora", rank=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_format": "gguf"}, "output_format must be 'model' or 'lora', got 'gguf'"),
        ({"output_format": "lora"}, "needs the rank of the adapter"),
        ({"rank": 4}, "rank is of an adapter; give output_format='lora' as well"),
        ({"output_format": "lora", "rank": 4, "output": "x.safetensors"}, "an adapter is a folder"),
        ({"output_format": "lora", "rank": 4, "output": None}, "an adapter is a folder"),
        ({"output_format": "lora", "rank": 0}, "rank must be a positive number, got 0"),
    ],
)
def test_arguments(tmp_path, base, models, arguments, message):
    with pytest.raises(MergeError, match=message):
        merge(base, models, WeightAverage(), **{"output": tmp_path / "o"} | arguments)


def test_the_command_reports_the_approximation_error(tmp_path, capsys):
    _, base = make(untied)
    save_checkpoint(tmp_path / "base.safetensors", base)
    save_checkpoint(tmp_path / "tuned.safetensors", tuned(base, (1,))[0])
    arguments = ["--base", str(tmp_path / "base.safetensors"), "--finetuned", f"[{tmp_path / 'tuned.safetensors'}]"]
    arguments += [
        "--method",
        "WeightAverage",
        "--output",
        str(tmp_path / "a"),
        "--output_format",
        "lora",
        "--rank",
        "2",
    ]
    assert run(build_parser().parse_args(arguments)) == 0
    assert ", a LoRA adapter of rank 2 that loses " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"embed_tokens.weight": (9, 4)}, Layer.EMBEDDING),
        ({"wpe.weight": (9, 4)}, Layer.EMBEDDING),
        ({"block.relative_attention_bias.weight": (9, 4)}, Layer.EMBEDDING),
        ({"embed_out.weight": (9, 4)}, Layer.LINEAR),
        ({"lm_head.weight": (9, 4)}, Layer.LINEAR),
        ({"time_embed.weight": (4, 4), "time_embed.bias": (4,)}, Layer.LINEAR),
        ({"h.c_fc.weight": (4, 9), "h.c_fc.bias": (9,)}, Layer.TRANSPOSED),
        ({"h.c_fc.weight": (9, 4), "h.c_fc.bias": (9,)}, Layer.LINEAR),
        (
            {"h.c_proj.weight": (4, 4), "h.c_proj.bias": (4,), "h.c_fc.weight": (4, 9), "h.c_fc.bias": (9,)},
            Layer.TRANSPOSED,
        ),
        (
            {"h.c_proj.weight": (4, 4), "h.c_proj.bias": (4,), "h.c_fc.weight": (9, 4), "h.c_fc.bias": (9,)},
            Layer.LINEAR,
        ),
        ({"conv.weight": (8, 3, 2, 2)}, Layer.CONVOLUTION),
        ({"depthwise.weight": (8, 1, 3, 3)}, None),
        ({"norm.weight": (8,)}, None),
        ({"weight": (8, 8)}, None),
        ({"experts.up": (8, 8)}, None),
    ],
)
def test_kinds_of_layers(tensors, expected):
    base = open_checkpoint({name: torch.zeros(shape) for name, shape in tensors.items()})
    assert find_layer(base, next(iter(tensors))) is expected
