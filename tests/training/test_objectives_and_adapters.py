"""Objectives against torch and transformers, probes against scikit-learn, adapters against PEFT's own merge."""

import copy
import sys

import lightning as L
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from freemerge.data import SourceSuite, Task, TextTableSource, TokenDataset
from freemerge.data.loaders import evaluation_loader
from freemerge.models import LanguageBackbone, TransformersBackbone
from freemerge.training import FineTuner, Objective, fit_regression_probe
from freemerge.training.adapters import add_adapter, merged_weights, peft_config
from tests.configs import tiny_files
from tests.configs.test_configs import BERT, QWEN, T5, VIT
from tests.tiny import TinySuite, tiny_backbone

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
TOKENS = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), "attention_mask": MASK}


def task(kind: str, metric: str | None = None) -> Task:
    names = ("a", "b", "c") if kind == "classification" else ()
    return Task("t", names, [], [], [], kind=kind, metric=metric)


# ---- objectives


@pytest.mark.parametrize(("config", "kind"), [(T5, "seq2seq"), (QWEN, "causal_lm")])
def test_the_language_model_loss_equals_that_of_transformers(config: dict, kind: str) -> None:
    torch.manual_seed(0)
    backbone = LanguageBackbone(config=config).eval()
    labels = TOKENS["input_ids"].masked_fill(TOKENS["attention_mask"] == 0, -100)
    inputs = {**TOKENS, "labels": labels} if kind == "seq2seq" else TOKENS
    expected = backbone.model(**TOKENS, labels=labels).loss
    objective = Objective.of(task(kind))
    torch.testing.assert_close(objective.loss(backbone(inputs), labels), expected)
    metrics = objective.make_metrics()
    for row in range(2):  # the mean is over all tokens, however they are batched
        part = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        objective.update(metrics, backbone(part), labels[row : row + 1])
    torch.testing.assert_close(metrics["loss"].compute(), expected)
    perplexity = Objective.of(task(kind, "perplexity")).make_metrics()
    Objective.of(task(kind, "perplexity")).update(perplexity, backbone(inputs), labels)
    assert float(perplexity["perplexity"].compute()) == pytest.approx(float(expected.exp()), rel=1e-5)


def test_exact_match_agrees_with_greedy_decoding() -> None:
    torch.manual_seed(0)
    backbone = LanguageBackbone(config=T5).eval()
    inputs = {name: tensor[:1] for name, tensor in TOKENS.items()}
    written = backbone.model.generate(**inputs, do_sample=False, min_new_tokens=3, max_new_tokens=3)[:, 1:]
    objective = Objective.of(task("seq2seq"))
    vocabulary = len(tiny_files.WORDS)
    for labels, right in ((written, 1.0), ((written + 1) % vocabulary, 0.0)):
        metrics = objective.make_metrics()
        objective.update(metrics, backbone({**inputs, "labels": labels}), labels)
        assert metrics["exact_match"].compute() == right


def test_the_losses_of_regression_and_classification() -> None:
    outputs, numbers = torch.randn(5, 1), torch.randn(5)
    squared = Objective.of(task("regression"))
    torch.testing.assert_close(squared.loss(outputs, numbers), F.mse_loss(outputs[:, 0], numbers))
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    smooth = Objective.of(task("classification", "matthews"), label_smoothing=0.1)
    torch.testing.assert_close(smooth.loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1))
    metrics = smooth.make_metrics()
    smooth.update(metrics, logits, labels)
    torch.testing.assert_close(metrics["loss"].compute(), F.cross_entropy(logits, labels))
    assert set(metrics) == {"matthews", "loss"}


def test_the_regression_probe_equals_scikit_learns_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 5, generator=generator) * torch.arange(1, 6) + 3
    labels = features @ torch.tensor([1.0, -2, 0, 0.5, 3]) + torch.randn(100, generator=generator)
    scaled = StandardScaler().fit_transform(features.double().numpy())
    expected = Ridge(alpha=1.0).fit(scaled, labels.double().numpy()).predict(scaled)
    got = fit_regression_probe(features, labels)(features).detach()[:, 0]
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=1e-3, rtol=0)


# ---- the tuner


def test_a_backbone_refuses_tasks_of_other_kinds() -> None:
    encoder, language = FineTuner(TransformersBackbone(config=BERT)), FineTuner(LanguageBackbone(config=T5))
    with pytest.raises(ValueError, match="is for classification and regression, but the task is seq2seq, which needs"):
        encoder.for_task(task("seq2seq"))
    with pytest.raises(ValueError, match="is for seq2seq, but the task is causal_lm"):
        language.for_task(task("causal_lm"))
    with pytest.raises(ValueError, match="needs a text encoder or an ImageTextBackbone, got TransformersBackbone"):
        FineTuner(TransformersBackbone(config=VIT), head="zero_shot")
    assert (language.for_task(task("seq2seq")).monitor, language.for_task(task("seq2seq")).monitor_mode) == (
        "val/exact_match",
        "max",
    )
    assert language.for_task(task("seq2seq", "perplexity")).monitor_mode == "min"


def test_tasks_that_share_a_head_are_probed_together(tmp_path) -> None:
    tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    table = tiny_files.rows(40)
    sources = {}
    for name, part in (("a", table[:20]), ("b", table[20:])):
        path = tiny_files.write_table(tmp_path / f"{name}.csv", ["split", "text", "label"], part)
        sources[name] = TextTableSource(path=path, tokenizer=tokenizer)
    suite = SourceSuite(sources, shared_heads=[["a", "b"]], batch_size=4)
    torch.manual_seed(0)
    template = FineTuner(TransformersBackbone(config=BERT, pooling="mean"))
    heads = []
    for name in suite.names:
        tuner = template.for_task(suite.task(name))
        L.Trainer(max_steps=1, **QUIET).fit(tuner, datamodule=suite.for_task(name))
        heads.append(tuner.head)
    assert torch.equal(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize("schedule", ["polynomial", "inverse_sqrt", lambda o: torch.optim.lr_scheduler.StepLR(o, 2)])
def test_schedules_are_stepped_after_every_batch(schedule) -> None:
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    tuner = FineTuner(tiny_backbone(), num_classes=2, head="linear", schedule=schedule, warmup=0.0)
    L.Trainer(max_epochs=1, callbacks=[Watch()], **QUIET).fit(tuner, datamodule=TinySuite().for_task("bars"))
    assert len(rates) == 4
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]
    with pytest.raises(ValueError, match=r"schedule must be one of constant, .*got 'cosin'"):
        FineTuner(tiny_backbone(), schedule="cosin")


# ---- adapters

ADAPTERS = [
    {"kind": "lora", "r": 2, "target_modules": ["query", "value"]},
    {"kind": "lora", "r": 2, "target_modules": ["query"], "use_dora": True, "modules_to_save": ["LayerNorm"]},
    {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": "all-linear"}},
    {"kind": "ia3", "target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
]


@pytest.mark.parametrize("settings", ADAPTERS, ids=["lora", "dora", "class_path", "ia3"])
def test_merged_weights_equal_pefts_merge(settings: dict) -> None:
    torch.manual_seed(0)
    model = TransformersBackbone(config=BERT).model.eval()
    names = set(model.state_dict())
    adapted = add_adapter(model, peft_config(settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    weights = merged_weights(adapted)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    expected = copy.deepcopy(adapted).merge_and_unload()
    assert set(weights) == names == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    plain = TransformersBackbone(config=BERT).eval()
    plain.load_weights(weights)
    torch.testing.assert_close(plain.model(**TOKENS).last_hidden_state, adapted(**TOKENS).last_hidden_state)


def test_a_fit_with_an_adapter_gives_a_task_vector_and_an_adapter(tmp_path) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    base = TransformersBackbone(config=BERT, pooling="mean")
    base.save_pretrained(tmp_path / "base")
    template = FineTuner(
        TransformersBackbone(str(tmp_path / "base"), pooling="mean"),
        peft={"kind": "lora", "r": 2, "init_lora_weights": False, "target_modules": ["query"]},
        gradient_checkpointing=True,
    )
    before = {name: tensor.clone() for name, tensor in template.backbone.weights().items()}
    ids = [[2, 5 + number % 2, 3] for number in range(16)]
    labels = torch.arange(16) % 2
    data = TokenDataset({"input_ids": ids, "attention_mask": [[1] * 3] * 16}, labels)
    tuner = template.for_task(Task("t", ("a", "b"), data, data, data))

    loader = evaluation_loader(data, 8)
    L.Trainer(max_steps=3, accumulate_grad_batches=2, precision="bf16-mixed", **QUIET).fit(tuner, loader, loader)
    weights = tuner.weights()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"encoder.layer.{i}.attention.self.query.weight" for i in range(2)}
    assert tuner.save_adapter(tmp_path / "adapter")
    plain = TransformersBackbone(str(tmp_path / "base")).model.eval()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    merged = loaded.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in weights.items())
    assert not FineTuner(base).save_adapter(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, "set kind, for instance"),
        ({"kind": "lorra"}, "PEFT has no 'lorra'; did you mean 'lora'"),
        ({"kind": "lora", "rank": 8}, "LoraConfig: .*rank"),
        ({"class_path": "torch.nn.Linear"}, "torch.nn.Linear is not a PEFT configuration"),
    ],
)
def test_errors_of_adapter_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"peft.*{message}"):
        FineTuner(TransformersBackbone(config=BERT), peft=settings)


def test_unsuitable_adapters_are_refused() -> None:
    backbone = TransformersBackbone(config=BERT)
    with pytest.raises(ValueError, match="peft: BertModel: Target modules"):
        FineTuner(backbone, peft={"kind": "lora", "target_modules": ["nothing"]}).for_task(2)
    with pytest.raises(ValueError, match="learns a prompt, which cannot be merged into weights"):
        FineTuner(backbone, peft={"kind": "prefix_tuning", "num_virtual_tokens": 4}).for_task(2)


def test_without_peft_the_error_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs PEFT: pip install 'freemerge\[peft\]'"):
        FineTuner(TransformersBackbone(config=BERT), peft={"kind": "lora"})
