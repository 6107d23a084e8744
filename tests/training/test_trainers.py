"""The three trainers on tiny real data, and the probe against scikit-learn."""

import copy

import lightning as L
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.func import functional_call

from freemerge.experts import extract, extract_low_rank, load_expert, save_expert
from freemerge.merging import task_vector
from freemerge.models import Backbone, ConvRouter
from freemerge.training import ExpertTrainer, FineTuner, RouterTrainer, fit_probe
from freemerge.training.experts import mixup_batch
from tests.tiny import TinySuite, tiny_backbone


def adam(lr: float):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def trainer(tmp_path, **arguments) -> L.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 3}
    return L.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **{**defaults, **arguments})


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_probe_equals_scikit_learns_logistic_regression(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (200,), generator=generator)
    features = torch.randn(200, 6, generator=generator) * torch.arange(1, 7) + 2 * torch.eye(6)[labels] + 5
    head = fit_probe(features, labels, num_classes)
    scaled = StandardScaler().fit_transform(features.double().numpy())
    expected = LogisticRegression(C=1.0, max_iter=200).fit(scaled, labels.numpy()).predict_proba(scaled)
    got = head(features).softmax(dim=1).detach()
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=2e-3, rtol=0)


def test_probe_never_predicts_a_class_without_samples() -> None:
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    head = fit_probe(features, torch.tensor([0, 3, 4] * 20), num_classes=6)
    assert set(head(features).argmax(dim=1).tolist()) <= {0, 3, 4}


def test_probe_gives_constant_features_zero_weight() -> None:
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 3.0 + 1e-9 * torch.arange(60)
    head = fit_probe(features, (features[:, 0] > 0).long(), num_classes=2)
    assert head.weight[:, 2].abs().max() == 0
    assert head.weight[:, 0].abs().min() > 0.1


def test_finetuner_with_a_probe_trains_only_the_backbone(tmp_path) -> None:
    suite = TinySuite()
    template = FineTuner(tiny_backbone(), optimizer=adam(3e-3))
    tuner = template.for_task(4)
    loop = trainer(tmp_path, max_epochs=12, enable_checkpointing=False)
    loop.fit(tuner, datamodule=suite.for_task("corners"))
    fitted = {name: tensor.clone() for name, tensor in tuner.head.state_dict().items()}
    assert bool(tuner.head_ready)
    assert not any(parameter.requires_grad for parameter in tuner.head.parameters())
    assert loop.callback_metrics["val/acc"] > 0.9
    vector = task_vector(template.backbone.weights(), tuner.backbone.weights())
    assert all(tensor.abs().max() > 0 for tensor in vector.values() if tensor.dim() >= 2)
    again = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    again.fit(tuner, datamodule=suite.for_task("corners"))  # the head comes from the checkpoint and is not fitted again
    assert all(torch.equal(fitted[name], tensor) for name, tensor in tuner.head.state_dict().items())


def test_finetuner_trains_a_linear_head(tmp_path) -> None:
    tuner = FineTuner(tiny_backbone(), head="linear", num_classes=2, optimizer=adam(1e-3), schedule="constant")
    before = tuner.head.weight.detach().clone()
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(tuner, datamodule=TinySuite().for_task("bars"))
    assert not torch.equal(before, tuner.head.weight)


def test_finetuner_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="head must be one of probe, linear, zero_shot, prototypes, got 'mlp'"):
        FineTuner(tiny_backbone(), head="mlp")
    with pytest.raises(ValueError, match="pass `num_classes`"):
        trainer(tmp_path, max_epochs=1).fit(FineTuner(tiny_backbone()), datamodule=TinySuite())


def test_schedule_warms_up_then_falls_to_zero(tmp_path) -> None:
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    tuner = FineTuner(tiny_backbone(), head="linear", num_classes=2, optimizer=adam(1.0e-3), warmup=0.25)
    loop = trainer(tmp_path, max_epochs=2, callbacks=[Watch()], enable_checkpointing=False)
    loop.fit(tuner, datamodule=TinySuite().for_task("bars"))
    assert len(rates) == 8  # 64 samples in batches of 16, 2 epochs
    assert max(rates) == rates[1] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


@pytest.fixture(scope="module")
def teacher_and_merged() -> tuple:
    """A fine-tuned teacher with its head, and the base standing in for a merged backbone."""
    tuner = FineTuner(tiny_backbone(), optimizer=adam(3e-3)).for_task(4)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    loop = L.Trainer(accelerator="cpu", max_epochs=12, **quiet)
    loop.fit(tuner, datamodule=TinySuite().for_task("corners"))
    return tuner, tiny_backbone()


def test_expert_training_improves_the_student_and_changes_nothing_else(tmp_path, teacher_and_merged) -> None:
    tuner, backbone = teacher_and_merged
    teacher = {name: tensor.clone() for name, tensor in tuner.backbone.weights().items()}
    merged = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    start = extract(task_vector(merged, teacher), 0.05)
    module = ExpertTrainer(copy.deepcopy(backbone), copy.deepcopy(tuner.head), teacher, start, optimizer=adam(1e-2))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["values"]
    assert not any("teacher" in name for name in module.state_dict())
    images = torch.cat([images for images, _ in TinySuite().test_dataloader()["corners"]])

    def distance(expert) -> float:
        dense = expert.dense()
        weights = {f"model.{name}": t + dense.get(name, 0) for name, t in merged.items()}
        module.backbone.eval()
        student = functional_call(module.backbone, weights, (images,))
        target = functional_call(module.backbone, {f"model.{n}": t for n, t in teacher.items()}, (images,))
        return float((student - target).square().mean().detach())

    before = distance(start)
    trainer(tmp_path, max_epochs=30, enable_checkpointing=False).fit(module, datamodule=TinySuite().for_task("corners"))
    trained = module.expert
    assert distance(trained) < 0.5 * before
    assert all(torch.equal(trained.indices[name], start.indices[name]) for name in start.indices)
    assert all(torch.equal(merged[name], tensor) for name, tensor in module.backbone.weights().items())


class _Normalised(Backbone):
    """A backbone that behaves differently in training mode: batch norm and dropout."""

    def __init__(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 6, 3))
        super().__init__(model, feature_dim=6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).mean(dim=(2, 3))


def test_experts_are_trained_without_dropout_and_batch_statistics(tmp_path) -> None:
    backbone = _Normalised()  # in training mode, as in a fit
    teacher = {name: tensor + 0.1 * (name == "3.weight") for name, tensor in backbone.weights().items()}
    start = extract(task_vector(backbone.weights(), teacher), 0.2)
    module = ExpertTrainer(backbone, nn.Linear(6, 4), teacher, start, adam(1e-2))
    images = torch.cat([images for images, _ in TinySuite().test_dataloader()["corners"]])
    before = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    modes = set()
    module.register_forward_hook(lambda module, *_: modes.add(module.backbone.training))
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(module, datamodule=TinySuite().for_task("corners"))
    assert modes == {False}
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.weights().items())
    assert torch.equal(module(images), module(images))


def test_expert_forward_equals_the_attached_expert(teacher_and_merged) -> None:
    tuner, backbone = teacher_and_merged
    start = extract(task_vector(backbone.weights(), tuner.backbone.weights()), 0.1)
    module = ExpertTrainer(copy.deepcopy(backbone), tuner.head, tuner.backbone.weights(), start).eval()
    images = torch.randn(5, 1, 8, 8)
    dense = start.dense()
    summed = copy.deepcopy(backbone).eval()
    summed.load_weights({name: t + dense[name] if name in dense else t for name, t in backbone.weights().items()})
    torch.testing.assert_close(module(images), summed(images))


def test_training_compensates_for_int4_rounding(tmp_path, teacher_and_merged) -> None:
    tuner, backbone = teacher_and_merged
    teacher, merged = tuner.backbone.weights(), backbone.weights()
    images = torch.cat([images for images, _ in TinySuite().test_dataloader()["corners"]])
    target = tuner.backbone.eval()(images).detach()
    distances = {}
    for encoding in ("int8", "int4"):
        start = extract_low_rank(task_vector(merged, teacher), rank=1)
        heads = copy.deepcopy(tuner.head)
        module = ExpertTrainer(copy.deepcopy(backbone), heads, teacher, start, adam(1e-2), encoding=encoding)
        loop = trainer(tmp_path, max_epochs=30, enable_checkpointing=False)
        loop.fit(module, datamodule=TinySuite().for_task("corners"))
        stored = load_expert(save_expert(tmp_path / "e.safetensors", module.expert, "int4"))
        reader = ExpertTrainer(copy.deepcopy(backbone), heads, teacher, stored).eval()
        distances[encoding] = float((reader(images) - target).square().mean().detach())
        if encoding == "int4":  # the trained values are those in the file
            torch.testing.assert_close(module.eval()(images), reader(images))
    assert distances["int4"] < distances["int8"]


def test_teacher_and_student_see_the_same_mixup(tmp_path, teacher_and_merged) -> None:
    tuner, backbone = teacher_and_merged
    start = extract(task_vector(backbone.weights(), tuner.backbone.weights()), 0.05)
    module = ExpertTrainer(
        copy.deepcopy(backbone), copy.deepcopy(tuner.head), tuner.backbone.weights(), start, adam(1e-2), mixup=1.0
    )
    seen = []
    module.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    loop = trainer(tmp_path, max_epochs=2, limit_val_batches=0, enable_checkpointing=False)
    loop.fit(module, datamodule=TinySuite().for_task("corners"))
    assert len(seen) == 2 * 2 * 4  # epochs, teacher and student, batches
    assert all(torch.equal(first, second) for first, second in zip(seen[::2], seen[1::2], strict=True))
    own = torch.stack([image for image, _ in TinySuite().build("corners").train])
    assert not any(torch.equal(image, other) for image in torch.cat(seen) for other in own)
    assert not torch.equal(module.expert.flat_values(), start.flat_values())


def test_mixup_interpolates_two_inputs_of_the_batch() -> None:
    inputs = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = mixup_batch(inputs, 0.5)
    other = inputs.roll(1, dims=0)
    shares = ((mixed - inputs) * (other - inputs)).sum(dim=(1, 2, 3)) / (other - inputs).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(mixed, inputs + shares[:, None, None, None] * (other - inputs))
    assert shares.min() >= 0
    assert shares.max() <= 0.5
    assert len(shares.unique()) == 6
    assert torch.equal(mixup_batch(inputs, 0.0), inputs)
    assert mixup_batch(inputs[:0], 1.0).shape == (0, 3, 4, 4)


def test_mixup_refusals(teacher_and_merged) -> None:
    tuner, backbone = teacher_and_merged
    start = extract(task_vector(backbone.weights(), tuner.backbone.weights()), 0.1)
    for arguments, message in (
        ({"mixup": 1.5}, r"mixup must be in \[0, 1\], got 1.5"),
        ({"mixup": 0.5, "cache_teacher": True}, "set cache_teacher to false"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertTrainer(backbone, tuner.head, tuner.backbone.weights(), start, **arguments)
    with pytest.raises(ValueError, match="a dict of attention_mask, input_ids: set mixup to 0"):
        mixup_batch({"attention_mask": torch.ones(2, 3), "input_ids": torch.ones(2, 3)}, 1.0)
    with pytest.raises(ValueError, match=r"inputs are torch\.int64"):
        mixup_batch(torch.ones(2, 3, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_experts_train_in_mixed_precision_with_a_cached_bfloat16_teacher(
    tmp_path, teacher_and_merged, kind: str
) -> None:
    tuner, backbone = teacher_and_merged
    teacher = {name: tensor.bfloat16() for name, tensor in tuner.backbone.weights().items()}
    residual = task_vector(backbone.weights(), tuner.backbone.weights())
    start = extract(residual, 0.05) if kind == "sparse" else extract_low_rank(residual, rank=1)
    module = ExpertTrainer(
        copy.deepcopy(backbone),
        copy.deepcopy(tuner.head),
        teacher,
        start,
        optimizer=adam(1e-2),
        feature_loss="cosine",
        cache_teacher=True,
    )
    agreements = []

    class Watch(L.Callback):
        def on_validation_epoch_end(self, trainer, *_):
            agreements.append(float(trainer.callback_metrics["val/agreement"]))

    loop = trainer(tmp_path, max_epochs=25, precision="bf16-mixed", callbacks=[Watch()], enable_checkpointing=False)
    loop.fit(module, datamodule=TinySuite().for_task("corners"))
    assert module.values.dtype == torch.float32
    assert agreements[-1] >= agreements[0]
    assert agreements[-1] > 0.8
    assert module.expert.num_values == start.num_values


def test_expert_checkpoints_contain_only_the_values_and_resume(tmp_path, teacher_and_merged) -> None:
    tuner, backbone = teacher_and_merged
    start = extract(task_vector(backbone.weights(), tuner.backbone.weights()), 0.05)

    def fresh() -> ExpertTrainer:
        return ExpertTrainer(copy.deepcopy(backbone), copy.deepcopy(tuner.head), tuner.backbone.weights(), start)

    first, loop = fresh(), trainer(tmp_path, max_epochs=1)
    loop.fit(first, datamodule=TinySuite().for_task("corners"))
    path = loop.checkpoint_callback.best_model_path
    assert list(torch.load(path, weights_only=True)["state_dict"]) == ["values"]
    resumed = fresh()
    trainer(tmp_path, max_epochs=1).fit(resumed, datamodule=TinySuite().for_task("corners"), ckpt_path=path)
    assert torch.equal(resumed.values, first.values)


def test_router_trainer_distinguishes_the_tiny_tasks(tmp_path) -> None:
    suite = TinySuite()
    module = RouterTrainer(ConvRouter(2, channels=1, width=4), optimizer=adam(1e-2))
    loop = trainer(tmp_path, max_epochs=5, enable_checkpointing=False)
    loop.fit(module, datamodule=suite.mixture())
    assert loop.callback_metrics["val/acc"] == 1.0
    data = suite.mixture()
    data.setup()
    threshold = module.calibrate(data.train_dataloader(), data.val_dataloader(), fraction=0.9)
    logits, scores = module.judge(data.val_dataloader())
    kept = (logits.softmax(dim=1).amax(dim=1) >= threshold) & (scores >= module.router.out_of_distribution.threshold)
    assert torch.equal(module.router.abstains(logits, scores, threshold), ~kept)
    assert 0.9 <= float(kept.float().mean()) < 1.0
    noise = torch.randn(50, 1, 8, 8)  # no task's
    _, scores = module.judge([(noise, torch.zeros(50))])
    assert float((scores < module.router.out_of_distribution.threshold).float().mean()) > 0.9
