"""A module whose backbone has a PEFT adapter: the weights with the fused adapter are saved, merged and evaluated."""

import copy

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import BertConfig, BertModel

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import TaskArithmetic, WeightAverage
from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint, save_base
from freemerge_callbacks._adapters import without_adapters
from tests.callbacks.callbacks_project import make_trainer
from tests.callbacks.projects import glue_like

KINDS = {
    "lora": peft.LoraConfig(r=2, target_modules=["query", "value"], lora_alpha=7),
    "saved": peft.LoraConfig(r=2, target_modules=["query"], use_rslora=True, modules_to_save=["pooler"]),
    "dora": peft.LoraConfig(r=2, target_modules=["query"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
}


def make_encoder() -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return BertModel(BertConfig(**glue_like.CONFIG))


class Adapted(L.LightningModule):
    """The adapter trains, and the head.

    Args:
        config: PEFT's.
        wrapped: whether a PeftModel is around the backbone, or its layers are in it.
    """

    def __init__(self, config: peft.PeftConfig, wrapped: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        encoder, config = make_encoder(), copy.deepcopy(config)
        make = peft.get_peft_model if wrapped else lambda model, config: peft.inject_adapter_in_model(config, model)
        self.backbone, self.head = make(encoder, config), nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch["input_ids"], batch["attention_mask"]).pooler_output
        return nn.functional.cross_entropy(self.head(features), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("quality", -float(self.current_epoch), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.03)


def fused(module: Adapted, state: dict | None = None) -> dict[str, torch.Tensor]:
    """PEFT's own merge."""
    twin = copy.deepcopy(module)
    twin.load_state_dict(state or module.state_dict())
    found = twin.backbone.merge_and_unload() if hasattr(twin.backbone, "merge_and_unload") else None
    if found is None:  # injected: PEFT has no merge for it, so its layers are merged one by one
        for layer in [part for part in twin.backbone.modules() if hasattr(part, "merge")]:
            layer.merge()
        return {name.replace(".base_layer", ""): value for name, value in twin.backbone.state_dict().items()
                if "lora_" not in name}  # fmt: skip
    return found.state_dict()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_weights_are_saved_merged_and_evaluated(tmp_path, kind, wrapped):
    if not wrapped and kind in ("saved", "ia3"):
        pytest.skip("the expectation needs a PeftModel")
    module, start = Adapted(KINDS[kind], wrapped), make_encoder()
    save_base(module, tmp_path / "base.safetensors")
    base = load_checkpoint(tmp_path / "base.safetensors")
    assert set(base) == set(start.state_dict())
    assert all(
        torch.equal(base[name], value) for name, value in start.state_dict().items()
    )  # a new adapter does not change the outputs
    other = {name: value + 0.1 * torch.randn(value.shape) for name, value in base.items() if value.is_floating_point()}
    save_checkpoint(tmp_path / "other.safetensors", other)
    others, loader = [str(tmp_path / "other.safetensors")], glue_like.loader(10)
    keep = TaskCheckpoint(str(tmp_path / "task.safetensors"), "a")
    merge = MergeAtFitEnd(WeightAverage(), others, str(tmp_path / "m.safetensors"))
    preview = MergePreview(
        TaskArithmetic(scale=[1.0, 0.0]), str(tmp_path / "base.safetensors"), others, {"a": loader}, {}
    )
    evaluation = MultiTaskEvaluation({"a": loader}, {})
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    trainer = make_trainer(tmp_path, preview, keep, merge, evaluation)
    trainer.fit(module, loader, loader)

    wanted = fused(module)
    kept, merged = load_checkpoint(tmp_path / "task.safetensors"), load_checkpoint(tmp_path / "m.safetensors")
    for name, value in wanted.items():
        torch.testing.assert_close(kept[f"backbone.{name}"], value, rtol=0, atol=1e-6)
        if name in other:
            torch.testing.assert_close(merged[name], (value + other[name]) / 2, rtol=0, atol=1e-6)
    assert any(not torch.equal(value, base[name]) for name, value in wanted.items())
    plain = make_encoder().eval()
    plain.load_state_dict(merged, strict=False)
    samples = glue_like.sentences(10)
    right = [
        bool(module.head(plain(s["input_ids"][None], s["attention_mask"][None]).pooler_output).argmax() == s["labels"])
        for s in samples
    ]
    assert evaluation.results["a"] == pytest.approx(sum(right) / len(right))
    # With λ = 1 for this fit and 0 for the other, the preview evaluates the model itself.
    assert preview.results["a"] == pytest.approx(preview.individual["a"])
    assert preview.similarity.norm == pytest.approx(
        sum(float((value - base[name]).square().sum()) for name, value in wanted.items() if name in other) ** 0.5,
        rel=1e-4,
    )
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == trained


def test_the_best_weights_are_fused_with_the_adapter_of_their_epoch(tmp_path):
    module = Adapted(KINDS["lora"])
    other = {name: value + 0.1 for name, value in make_encoder().state_dict().items() if value.is_floating_point()}
    save_checkpoint(tmp_path / "other.safetensors", other)
    keep = TaskCheckpoint(str(tmp_path / "task.safetensors"), "a", weights="best")
    others = [str(tmp_path / "other.safetensors")]
    merge = MergeAtFitEnd(WeightAverage(), others, str(tmp_path / "m.safetensors"), weights="best")
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="quality", mode="max")
    trainer = make_trainer(tmp_path, keep, merge, best, enable_checkpointing=True)
    trainer.fit(module, glue_like.loader(10), glue_like.loader(10))
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    after = {name: value.clone() for name, value in module.state_dict().items()}
    assert any(not torch.equal(after[name], value) for name, value in state.items())  # the best epoch is an earlier one
    kept, merged = load_checkpoint(tmp_path / "task.safetensors"), load_checkpoint(tmp_path / "m.safetensors")
    for name, value in fused(module, state).items():
        torch.testing.assert_close(kept[f"backbone.{name}"], value, rtol=0, atol=1e-6)
        if name in other:
            torch.testing.assert_close(merged[name], (value + other[name]) / 2, rtol=0, atol=1e-6)
    assert all(torch.equal(after[name], value) for name, value in module.state_dict().items())
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_disabled_adapters_are_restored():
    module = Adapted(KINDS["saved"])
    frozen = next(parameter for name, parameter in module.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    sample = glue_like.sentences(10)[0]
    run = lambda: module.eval().backbone(sample["input_ids"][None], sample["attention_mask"][None]).pooler_output  # noqa: E731
    before, trained = run(), [parameter.requires_grad for parameter in module.parameters()]
    with without_adapters(module):
        assert torch.equal(run(), make_encoder().eval()(sample["input_ids"][None], sample["attention_mask"][None])[1])
    assert torch.equal(run(), before)
    assert [parameter.requires_grad for parameter in module.parameters()] == trained
