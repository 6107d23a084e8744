"""Quantized models are refused, recognized by the layout of their tensors or by their configuration."""

import json

import pytest
import torch

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import MergeError, WeightAverage, merge

ONES = torch.ones(4, 4)
FP8, INT8, UINT8 = ONES.to(torch.float8_e4m3fn), ONES.to(torch.int8), ONES.to(torch.uint8)
INT16, INT32, SCALE = ONES.to(torch.int16), ONES.int(), torch.ones(4, 1)

KINDS = {  # how each method's files look
    "block-wise fp8": {"q.weight": FP8, "q.weight_scale_inv": torch.ones(1, 1)},
    "static fp8": {"q.weight": FP8, "q.weight_scale": torch.ones(1), "q.input_scale": torch.ones(1)},
    "fp8 of torchtitan": {"q.weight": FP8, "q.scale_weight": torch.ones(1)},
    "stacked experts in fp8": {"e.up_proj": FP8[None], "e.up_proj_scale_inv": torch.ones(1, 1, 1)},
    "MXFP4": {"e.up_blocks": UINT8, "e.up_scales": UINT8[0]},
    "NVFP4 of ModelOpt": {"q.weight": UINT8, "q.weight_scale": FP8, "q.weight_scale_2": torch.ones(1)},
    "compressed": {"q.weight_packed": INT32, "q.weight_scale": torch.ones(4)},
    "LLM.int8()": {"q.weight": INT8, "q.SCB": torch.ones(4)},
    "bitsandbytes, 4 bits": {"q.weight": UINT8[:, :1], "q.weight.absmax": torch.ones(1)},
    "GPTQ": {"q.qweight": INT32, "q.qzeros": INT32, "q.scales": torch.ones(1, 4)},
    "EETQ": {"q.weight": INT8, "q.weight_scales": torch.ones(4)},
    "quanto": {"q.weight._data": INT8, "q.weight._scale": SCALE},
    "torchao": {"q._weight_qdata": INT8, "q._weight_scale": SCALE},
    "torchao, fp8": {"q._weight_qdata": FP8, "q._weight_scale": SCALE},
    "HQQ": {"q.W_q": UINT8, "q.scale": SCALE, "q.zero": SCALE},
    "AQLM": {"q.codes": INT16[None], "q.codebooks": torch.ones(1, 4, 1, 8), "q.scales": SCALE},
    "VPTQ": {"q.indices": INT16, "q.centroids.weight": torch.ones(1, 16)},
    "HIGGS": {"q.weight": INT16, "q.scales": SCALE, "q.tables": torch.ones(16, 2)},
    "MLX": {"q.weight": INT32, "q.scales": SCALE, "q.biases": SCALE},
    "EXL2": {"q.q_weight": INT32, "q.q_scale": INT32, "q.q_scale_max": torch.ones(4)},
    "MXFP8": {"e.up_proj": FP8[None], "e.up_proj_scale": torch.ones(1, 4, 1).to(torch.float8_e8m0fnu)},
}
WITHOUT_SCALES = {
    "SpQR": {"q.dense_weights": ONES.long(), "q.row_offsets": torch.arange(4)},
    "Marlin": {"q.B": INT32, "q.s": SCALE},
    "QuIP#": {"q.Qidxs": ONES.long(), "q.SU": torch.ones(4)},
    "integers": {"q.weight": INT8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_models_are_refused(kind):
    """Merging codes and scales separately would give meaningless weights."""
    model = KINDS[kind] | {"norm.weight": torch.ones(4)}
    with pytest.raises(
        MergeError, match=r"base: the tensor '[qe]\..*' is quantized, its scales are in '[qe]\..*'; dequ"
    ):
        merge(model, [model], WeightAverage())
    merge(model, [model], WeightAverage(), exclude=[r"re:[qe]\..*"])


@pytest.mark.parametrize("kind", WITHOUT_SCALES)
def test_integers_by_the_name_of_weights_are_refused(kind):
    model = WITHOUT_SCALES[kind] | {"norm.weight": torch.ones(4)}
    with pytest.raises(MergeError, match=r"base: the tensor 'q\..*' is quantized: it holds int\d+ values; dequantize"):
        merge(model, [model], WeightAverage())


def test_a_quantized_fine_tuned_model_is_refused_too():
    base = {"q.weight": ONES, "norm.weight": torch.ones(4)}
    for kind in ("LLM.int8()", "torchao", "VPTQ"):
        with pytest.raises(MergeError, match=r"model 0: the tensor 'q\..*' is quantized"):
            merge(base, [KINDS[kind] | {"norm.weight": torch.ones(4)}], WeightAverage())


@pytest.mark.parametrize(
    "model",
    [
        {"q.weight": torch.ones(2), "q.weight_scale": torch.ones(1)},
        # CLIP and Swin in fp8 as a whole, whose scales are weights of their own.
        {"text.weight": FP8, "logit_scale": torch.ones(()), "projection": FP8, "block.layer_scale.gamma": FP8},
        {"block.gamma": FP8, "block.scale": FP8[0]},
        # Integers that are not codes: positions, indices, masks.
        {"embeddings.position_ids": torch.arange(4)[None], "embeddings.scale": SCALE},
        {"attn.relative_position_index": INT32, "attn.logit_scale": SCALE, "attn.relative_position_bias_table": ONES},
        {
            "attn.bias": UINT8,
            "attn.scale": SCALE,
            "attn.causal_mask": UINT8,
            "norm.num_batches_tracked": torch.tensor(1),
        },
    ],
    ids=["floats", "CLIP", "fp8", "positions", "Swin", "GPT-2"],
)
def test_what_only_looks_quantized_is_merged(model):
    merge(model, [model], WeightAverage())


# -- by configuration -------------------------------------------------------------------------------------------------


def write(folder, tensors, files):
    save_checkpoint(folder / "model.safetensors", tensors)
    for name, content in {"config.json": {}, **files}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


PLAIN = {"q.weight": ONES, "ids": torch.arange(4)}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": {"quantization_config": {"quant_method": "new"}}}, r"config.json .* \(new\)"),
        ({"config.json": {"text_config": {"quantization_config": {"quant_method": "x"}}}}, r"config.json .* \(x\)"),
        ({"config.json": {"compression_config": {"format": "pack"}}}, r"config.json .* \(pack\)"),
        ({"config.json": {"quantization": {"bits": 4}}}, r"config.json .* \(quantization\)"),
        ({"config.json": {"quantization_config": ["odd"]}}, r"config.json .* \(quantization_config\)"),
        ({"quantize_config.json": {"bits": 4}}, r"quantize_config.json .* \(without the name of a method\)"),
        ({"hf_quant_config.json": {"quant_algo": "FP8"}}, r"hf_quant_config.json .* \(FP8\)"),
    ],
)
def test_a_configuration_that_says_quantized_is_refused(tmp_path, files, says):
    says = says.replace(" .* ", " says that the model is quantized ")
    unknown = write(tmp_path / "unknown", PLAIN | {"q.strange": INT16}, files)
    with pytest.raises(MergeError, match=rf"unknown: {says}, and 'q.strange' holds int16 values: dequantize the model"):
        merge(unknown, [PLAIN], WeightAverage())
    plain = write(tmp_path / "plain", PLAIN, files)
    stale = (
        rf"plain: {says}, though all its tensors are plain numbers: if it was dequantized, remove that from \w+.json"
    )
    for base, model in ((plain, PLAIN), (PLAIN, plain)):
        with pytest.raises(MergeError, match=stale):
            merge(base, [model], WeightAverage())


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {}}, [], {"text_config": 1}])
def test_a_configuration_without_quantization_is_accepted(tmp_path, config):
    merge(write(tmp_path / "m", PLAIN, {"config.json": config}), [PLAIN], WeightAverage())


def test_an_adapter_beside_the_configuration_of_its_quantized_base_is_merged(tmp_path):
    """As QLoRA training saves it: neither the adapter's tensors nor the base of the merge are quantized."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q"]}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(4, 1)}
    tensors = {f"base_model.model.q.{name}.weight": value for name, value in factors.items()}
    save_checkpoint(tmp_path / "a" / "adapter_model.safetensors", tensors)
    merge({"q.weight": ONES}, [tmp_path / "a"], WeightAverage(), output=tmp_path / "o.safetensors")
    assert load_checkpoint(tmp_path / "o.safetensors")["q.weight"].unique().tolist() == [3]  # 1 + alpha/r · B·A
