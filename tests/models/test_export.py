"""A FREE model as a backbone with LoRA adapters: what PEFT loads from the folder computes as the model does."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from freemerge.cli import main
from freemerge.experts import Expert, extract, extract_low_rank
from freemerge.models import Backbone, FreeModel, TransformersBackbone, export_experts
from tests.configs.test_configs import BERT
from tests.language_models import expert_of, language_model, residual
from tests.tiny import tiny_backbone

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [10, 11, 12, 4, 13, 14]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


def model_of(backbone: Backbone, experts: dict[str, Expert]) -> FreeModel:
    heads = {task: nn.Identity() for task in (*experts, "plain")}
    return FreeModel(backbone, heads, experts).eval()


@pytest.mark.parametrize("kind", AUTO)
def test_peft_loads_what_the_command_writes(kind: str, tmp_path: Path, capsys) -> None:
    backbone = language_model(kind)
    parts = {"llama": "proj", "gpt2": "h.", "t5": "block"}[kind]  # GPT-2 and T5 with biases and norms
    own = [{n: t for n, t in residual(backbone, seed, 0.3).items() if parts in n} for seed in (0, 1)]
    model = model_of(backbone, {t: extract_low_rank(r, rank=n) for t, r, n in zip("ab", own, (2, 3), strict=True)})
    model.save_pretrained(tmp_path / "free")
    assert main(["export-experts", str(tmp_path / "free"), "--output", str(tmp_path / "out")]) == 0
    assert "a: rank 2" in capsys.readouterr().out
    saved = FreeModel.from_pretrained(tmp_path / "free")  # its experts are those of the files
    inputs = {**INPUTS, "labels": IDS} if kind == "t5" else INPUTS
    plain = AUTO[kind].from_pretrained(tmp_path / "out" / "backbone").eval()
    adapted = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapters" / "a", "a").eval()
    adapted.load_adapter(tmp_path / "out" / "adapters" / "b", "b")
    for task in ("b", "a"):
        adapted.set_adapter(task)
        with torch.no_grad():
            expected = saved(inputs, task=task).logits
            torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        prompts = {name: tensor[:, :4] for name, tensor in INPUTS.items()}
        tokens = adapted.generate(**prompts, max_new_tokens=5, do_sample=False)
        answers = saved.generate(prompts, task=task, max_new_tokens=5, do_sample=False).tokens
        assert tokens[:, -answers.shape[1] :].equal(answers)
    with torch.no_grad(), adapted.disable_adapter():
        torch.testing.assert_close(adapted(**inputs).logits, saved(inputs, task="plain").logits, rtol=1e-4, atol=1e-4)


def test_the_folder_says_how_to_serve_it(tmp_path: Path) -> None:
    backbone = language_model("llama")
    served, other = expert_of(backbone, 0), extract_low_rank(residual(backbone, 1), rank=3)
    linear = {name: tensor for name, tensor in residual(backbone, 0).items() if "proj" in name}
    model = model_of(backbone, {"a": extract_low_rank(linear, rank=9), "b": served, "c": other})
    folder = export_experts(model, tmp_path / "out")
    said = json.loads((folder / "adapters.json").read_text())
    assert said["without_expert"] == ["plain"]
    assert {task: facts["only_factors"] for task, facts in said["adapters"].items()} == {
        "a": True,
        "b": False,
        "c": False,
    }
    assert "model.norm" in said["adapters"]["c"]["modules_to_save"]
    for task, facts in said["adapters"].items():
        assert facts["bytes"] == (folder / facts["folder"] / "adapter_model.safetensors").stat().st_size
        config = json.loads((folder / f"adapters/{task}/adapter_config.json").read_text())
        assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", facts["rank"])
    readme = (folder / "README.md").read_text()
    assert "vllm serve backbone --enable-lora --max-lora-rank 16 --lora-modules a=adapters/a\n" in readme
    assert "The adapters of b, c also change norms" in readme
    alone = AutoPeftModelForCausalLM.from_pretrained(folder / "adapters" / "a")  # it finds the backbone
    with torch.no_grad():
        expected = model(INPUTS, task="a").logits
        torch.testing.assert_close(alone(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)


def test_encoders_have_adapters_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = TransformersBackbone(config=BERT).eval()
    parts = {n: 0.1 * torch.randn(t.shape) for n, t in backbone.weights().items() if "query" in n or "LayerNorm" in n}
    model = model_of(backbone, {"a": extract_low_rank(parts, rank=2)})
    export_experts(model, tmp_path / "out")
    plain = AutoModel.from_pretrained(tmp_path / "out" / "backbone").eval()
    adapted = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapters" / "a").eval()
    changed = model.task_model("a").backbone.model
    with torch.no_grad():
        expected = changed(**INPUTS).last_hidden_state
        torch.testing.assert_close(adapted(**INPUTS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_refusals_write_nothing(tmp_path: Path, capsys) -> None:
    backbone = language_model("llama")
    sparse = model_of(backbone, {"a": expert_of(backbone, 0), "b": extract(residual(backbone, 1), 0.1)})
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"the expert of 'b' is of kind sparse.*train the experts with experts.kind"):
        export_experts(sparse, output)
    with pytest.raises(ValueError, match="the model has no experts to export"):
        export_experts(model_of(backbone, {}), output)
    images = tiny_backbone()
    convolution = extract_low_rank(
        {n: torch.randn(t.shape) for n, t in images.weights().items() if t.dim() == 3}, rank=1
    )
    with pytest.raises(ValueError, match=r"the expert of 'a': tensor 'embeddings\.\w+' belongs to a layer with other"):
        export_experts(model_of(images, {"a": convolution}), output)
    own = model_of(language_model("llama"), {"a": expert_of(backbone, 0)})
    own.backbone.__class__ = Backbone
    with pytest.raises(ValueError, match="the backbone is a Backbone; PEFT adapters belong to models of transformers"):
        export_experts(own, output)
    assert not list(tmp_path.iterdir())
    (output / "mine").mkdir(parents=True)
    model_of(backbone, {"a": expert_of(backbone, 0)}).save_pretrained(tmp_path / "free")
    assert main(["export-experts", str(tmp_path / "free"), "--output", str(output)]) == 2
    assert f"error: {output}: exists already" in capsys.readouterr().err
    assert main(["export-experts", str(tmp_path / "missing"), "--output", str(tmp_path / "new")]) == 2
    assert "missing" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free", "out"]
