"""The callbacks in typical projects: objects as hyperparameters, dicts as batches, several optimizers and others."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics import JaccardIndex

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import TaskArithmetic, WeightAverage
from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint, save_base
from tests.callbacks.callbacks_project import make_loader, make_trainer
from tests.callbacks.projects import glue_like, hydra_like, remote_sensing, self_supervised
from tests.callbacks.projects.two_optimizers import TwoOptimizers


def moved(module: nn.Module, seed: int = 5) -> dict[str, torch.Tensor]:
    """A module's weights plus a known task vector."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


def averaged(module: nn.Module, other: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a module with the mean of its weights and the others."""
    twin = copy.deepcopy(module).eval()
    mean = {name: (value + other[name]) / 2 for name, value in module.state_dict().items() if name in other}
    twin.load_state_dict(mean, strict=False)
    return twin


def share(predict, samples) -> float:
    with torch.no_grad():
        return sum(bool(predict(sample)) for sample in samples) / len(samples)


def test_a_hydra_like_project_with_a_data_module_for_each_task(tmp_path):
    net = hydra_like.make_net()
    save_base(hydra_like.make_module(net), tmp_path / "base.safetensors", backbone="net")
    other = moved(hydra_like.make_net())
    save_checkpoint(tmp_path / "other.safetensors", other)
    data = {"a": hydra_like.DigitsData(0), "b": hydra_like.DigitsData(1)}
    module = hydra_like.make_module(net)
    preview = MergePreview(
        WeightAverage(), str(tmp_path / "base.safetensors"), [str(tmp_path / "other.safetensors")], data, backbone="net"
    )
    merge = MergeAtFitEnd(
        WeightAverage(), [str(tmp_path / "other.safetensors")], str(tmp_path / "m.safetensors"), backbone="net"
    )
    trainer = make_trainer(tmp_path, preview, merge, MultiTaskEvaluation(data, backbone="net"))
    trainer.fit(module, datamodule=hydra_like.DigitsData(0))
    expected = averaged(module.net, other)
    for task, own in data.items():
        inputs, labels = map(torch.stack, zip(*own.data_val, strict=True))
        accuracy = float((expected(inputs).argmax(1) == labels).float().mean())
        assert trainer.callbacks[2].results[task] == pytest.approx(accuracy)
        assert preview.results[task] == pytest.approx(accuracy)  # the last validation used the last weights


def test_remote_sensing_classification_with_one_logit(tmp_path):
    data = {"red": remote_sensing.SceneData(0), "green": remote_sensing.SceneData(1)}
    other = moved(remote_sensing.make_encoder())
    save_checkpoint(tmp_path / "other.safetensors", other)
    module = remote_sensing.ClassificationTask(remote_sensing.make_encoder())
    merge = MergeAtFitEnd(
        WeightAverage(), [str(tmp_path / "other.safetensors")], str(tmp_path / "m.safetensors"), backbone="encoder"
    )
    evaluation = MultiTaskEvaluation(data, backbone="encoder", inputs="image", labels="label")
    make_trainer(tmp_path, merge, evaluation).fit(module, datamodule=data["red"])
    expected = nn.Sequential(averaged(module.encoder, other), module.decoder)
    for task, channel in (("red", 0), ("green", 1)):
        scenes = remote_sensing.Scenes(channel)
        wanted = share(lambda s: (expected(s["image"][None]) > 0).item() == s["label"].item(), scenes)
        assert evaluation.results[task] == pytest.approx(wanted)


@pytest.mark.parametrize("metric", ["mean_iou", JaccardIndex("multiclass", num_classes=2)])
def test_segmentation_by_mean_iou(tmp_path, metric):
    module = remote_sensing.SegmentationTask(remote_sensing.make_encoder())
    data = remote_sensing.SceneData(0)
    evaluation = MultiTaskEvaluation(
        {"red": data}, backbone="encoder", inputs="image", labels="mask", metrics={"red": metric}
    )
    trainer = make_trainer(tmp_path, evaluation)
    trainer.fit(module, datamodule=data)
    scenes = remote_sensing.Scenes(0)
    with torch.no_grad():
        found = torch.cat([module(s["image"][None])["out"].argmax(1) for s in scenes])
    masks = torch.stack([s["mask"] for s in scenes])
    ious = [((found == c) & (masks == c)).sum() / ((found == c) | (masks == c)).sum() for c in (0, 1)]
    assert evaluation.results["red"] == pytest.approx(float(sum(ious) / 2))
    label = metric if isinstance(metric, str) else "MulticlassJaccardIndex"
    assert list(evaluation.evaluation.named(evaluation.results, "x")) == [f"x/red/{label}", "x/mean_score"]


def test_two_optimizers_and_manual_optimization(tmp_path):
    module = TwoOptimizers()
    save_base(module, tmp_path / "base.safetensors")
    other = moved(TwoOptimizers().backbone)
    save_checkpoint(tmp_path / "other.safetensors", other)
    merge = MergeAtFitEnd(WeightAverage(), [str(tmp_path / "other.safetensors")], str(tmp_path / "m.safetensors"))
    keep = TaskCheckpoint(str(tmp_path / "task.safetensors"), "a", weights="best")
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="loss")
    make_trainer(tmp_path, merge, keep, best, epochs=3, enable_checkpointing=True).fit(
        module, make_loader(0), make_loader(0)
    )
    expected = averaged(module.backbone, other).state_dict()
    merged = load_checkpoint(tmp_path / "m.safetensors")
    assert all(torch.allclose(merged[name], value) for name, value in expected.items())
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    kept = load_checkpoint(tmp_path / "task.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_glue_like_batches_and_a_head_inside_the_merged_model(tmp_path):
    """If everything except the head is merged, the trained head is evaluated, not the base's."""
    start = glue_like.GLUETransformer()
    start.model.save_pretrained(tmp_path / "base")
    other = moved(start.model)
    save_checkpoint(tmp_path / "other.safetensors", other)
    module = glue_like.GLUETransformer(copy.deepcopy(start.model))
    loaders = {"a": glue_like.loader(10), "b": glue_like.loader(20)}
    arguments = {"base": str(tmp_path / "base"), "backbone": "model", "exclude": ["classifier.*"]}
    others = [str(tmp_path / "other.safetensors")]
    merge = MergeAtFitEnd(WeightAverage(), others, str(tmp_path / "m.safetensors"), **arguments)
    evaluation = MultiTaskEvaluation(loaders, backbone="model")
    preview = MergePreview(WeightAverage(), others=others, loaders=loaders, **arguments)
    make_trainer(tmp_path, preview, merge, evaluation).fit(module, loaders["a"], loaders["a"])
    expected = averaged(module.model, {k: v for k, v in other.items() if not k.startswith("classifier")})
    for task, token in (("a", 10), ("b", 20)):
        wanted = share(
            lambda s: expected(s["input_ids"][None], s["attention_mask"][None]).logits.argmax() == s["labels"],
            glue_like.sentences(token),
        )
        assert evaluation.results[task] == pytest.approx(wanted)
        assert preview.results[task] == pytest.approx(wanted)
    written = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(written["classifier.weight"], start.model.classifier.weight)  # the file has the base's head


def test_an_encoder_that_returns_a_model_output_and_a_head_for_each_task(tmp_path):
    torch.manual_seed(0)
    heads = {"a": nn.Linear(16, 2), "b": nn.Linear(16, 2)}
    loaders = {"a": glue_like.loader(10), "b": glue_like.loader(20)}
    module = glue_like.Encoder()
    by_default = MultiTaskEvaluation(loaders, heads)
    first = MultiTaskEvaluation(loaders, heads, features=lambda output: output.last_hidden_state[:, 0], prefix="first")
    make_trainer(tmp_path, by_default, first).fit(module, loaders["a"])
    module.eval()
    for task, token in (("a", 10), ("b", 20)):
        for evaluation, field in ((by_default, "pooler_output"), (first, "last_hidden_state")):

            def right(sample, field=field, task=task):
                output = module.backbone(sample["input_ids"][None], sample["attention_mask"][None])
                features = output[field] if field == "pooler_output" else output[field][:, 0]
                return heads[task](features).argmax() == sample["labels"]

            assert evaluation.results[task] == pytest.approx(share(right, glue_like.sentences(token)))
    with pytest.raises(
        ValueError, match=r"cannot find .* output \(last_hidden_state \[1, 6, 16\], pooler_output \[1, 16\]\)"
    ):
        make_trainer(tmp_path, MultiTaskEvaluation(loaders, heads, features="pooled")).fit(module, loaders["a"])


def test_self_supervised_training_and_linear_heads_on_triples(tmp_path):
    torch.manual_seed(0)
    heads = {"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)}
    loaders = {"a": self_supervised.loader(0), "b": self_supervised.loader(1)}
    evaluation = MultiTaskEvaluation(loaders, heads, every_n_epochs=1)
    keep = TaskCheckpoint(str(tmp_path / "task.safetensors"), "views", head=None)
    module = self_supervised.SelfSupervised()
    views = torch.utils.data.DataLoader(self_supervised.Views(), batch_size=8)
    make_trainer(tmp_path, evaluation, keep).fit(module, views)
    for task, feature in (("a", 0), ("b", 1)):
        samples = self_supervised.Labelled(feature)
        wanted = share(lambda s, task=task: heads[task](module.backbone(s[0][None])).argmax() == s[1], samples)
        assert evaluation.results[task] == pytest.approx(wanted)
    assert set(load_checkpoint(tmp_path / "task.safetensors")) == {
        f"backbone.{name}" for name in module.backbone.state_dict()
    }


X, Y = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("batch", "arguments", "message"),
    [
        ({"image": X, "label": Y}, {}, r"is a dict with 'image', 'label' and has no 'labels'; is it labels='label'\?"),
        ({"image": X, "z": Y}, {}, r"has no 'labels'; name its parts with inputs=... and labels=..., or adapt=..."),
        ({"image": X, "z": Y}, {"labels": "z", "inputs": "x"}, r"'image', 'z' and has no 'x'"),
        ((X, Y), {"labels": 2}, r"a batch of 'a' is a tuple of 2 and has no 2"),
        (
            (X, Y),
            {"adapt": lambda batch: batch[0]},
            r"adapt must return \(inputs, labels\), and returned a Tensor \[4, 6\]",
        ),
        (
            (X, Y + 5),
            {},
            r"the loader of 'a' yields the label 5, and the model gives logits of 2 classes: labels are 0 to 1",
        ),
        ((X, Y - 1), {}, r"yields the label -1"),
        ((X, torch.rand(4)), {}, r"expected one class for each sample of 'a', got labels float32 \[4\]"),
        ((X, torch.rand(4, 2)), {}, r"got labels float32 \[4, 2\]; pass a torchmetrics metric for such labels"),
        ((X, torch.zeros(4, 8, 8)), {}, r"got labels float32 \[4, 8, 8\]; pass metrics=\{'a': 'mean_iou'\}"),
        (
            (X[:, :3], Y),
            {},
            r"the model fails on a batch of 'a': RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        ((X, Y), {"metrics": {"a": "mean_iou"}}, r"mean_iou needs logits \(B, C, …\) for 'a', got shape \[1, 2\]"),
        ((X, Y), {"metrics": {"a": "pearson"}}, r"the metric of 'a' fails on a batch: pearson needs one number"),
    ],
)
def test_batches_are_checked_before_training(tmp_path, batch, arguments, message):
    module = TwoOptimizers()
    trainer = make_trainer(tmp_path, MultiTaskEvaluation({"a": [batch]}, **arguments))
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, make_loader(0))
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("batch", "arguments"),
    [
        ((X, Y[:, None]), {}),
        ((X, Y.float()), {}),
        ((X, torch.zeros(4), Y), {"inputs": 0, "labels": 2}),
        ({"x": X, "y": Y, "path": ["a", "b", "c", "d"]}, {"inputs": "x", "labels": "y"}),
        ({"inputs": X, "labels": Y}, {}),
        ({"inputs": X, "labels": Y, "id": Y}, {"inputs": ["inputs"]}),
        ({"sample": {"inputs": X}, "labels": Y}, {"adapt": lambda batch: (batch["sample"], batch["labels"])}),
        (((X,), Y), {}),
    ],
)
def test_batches_of_all_formats_give_the_same_result(tmp_path, batch, arguments):
    module = TwoOptimizers()
    evaluation = MultiTaskEvaluation({"a": [batch]}, **arguments)
    make_trainer(tmp_path, evaluation).fit(module, make_loader(0))
    with torch.no_grad():
        assert evaluation.results["a"] == pytest.approx(float((module(X).argmax(1) == Y).float().mean()))


def test_keys_and_adapt_exclude_each_other():
    with pytest.raises(ValueError, match="pass either adapt, or inputs and labels"):
        MultiTaskEvaluation({}, adapt=lambda batch: batch, labels="y")


def test_a_data_module_of_all_tasks(tmp_path):
    class Both(hydra_like.DigitsData):
        def val_dataloader(self):
            return {"a": make_loader(0), "b": make_loader(1)}

    evaluation = MultiTaskEvaluation(Both(0))
    make_trainer(tmp_path, evaluation).fit(TwoOptimizers(), make_loader(0))
    assert list(evaluation.results) == ["a", "b"]
    with pytest.raises(ValueError, match=r"DigitsData.val_dataloader\(\) must return a dict, task → loader"):
        make_trainer(tmp_path, MultiTaskEvaluation(hydra_like.DigitsData(0))).fit(TwoOptimizers(), make_loader(0))


@pytest.mark.parametrize("first", ["average", "preview"])
def test_a_preview_sees_the_weights_that_are_validated(tmp_path, first):
    """A moving average replaces the weights during validation; the order of the callbacks does not matter."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = TwoOptimizers()
    save_base(module, tmp_path / "base.safetensors")
    save_checkpoint(tmp_path / "other.safetensors", moved(module.backbone))
    preview = MergePreview(
        TaskArithmetic(scale=0.5),
        str(tmp_path / "base.safetensors"),
        [str(tmp_path / "other.safetensors")],
        {"a": make_loader(0)},
    )
    seen = []
    module.on_validation_batch_start = lambda *_: seen.append(copy.deepcopy(module.backbone.state_dict()))
    callbacks = [EMAWeightAveraging(decay=0.5), preview]
    trainer = make_trainer(tmp_path, *(callbacks if first == "average" else callbacks[::-1]))
    trainer.fit(module, make_loader(0), make_loader(0))
    base = load_checkpoint(tmp_path / "base.safetensors")
    norm = sum(float((seen[-1][name] - value).square().sum()) for name, value in base.items()) ** 0.5
    assert preview.similarity.norm == pytest.approx(norm, rel=1e-5)
    assert float(trainer.callback_metrics["task_vector/norm"]) == pytest.approx(norm, rel=1e-5)


def test_save_base_writes_the_initial_weights_once(tmp_path):
    module = TwoOptimizers()
    path = save_base(module, str(tmp_path / "new" / "base.safetensors"))
    assert set(load_checkpoint(path)) == set(module.backbone.state_dict())
    assert save_base(module, path) == path
    with torch.no_grad():
        module.backbone[0].weight += 1
    with pytest.raises(ValueError, match="holds other weights"):
        save_base(module, path)
    with pytest.raises(ValueError, match="has no submodule 'encoder'"):
        save_base(module, tmp_path / "x.safetensors", backbone="encoder")


def test_the_same_callbacks_in_a_trainer_of_pytorch_lightning(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, inputs):
            return self.head(self.backbone(inputs))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("quality", -float(self.current_epoch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    other = moved(module.backbone)
    save_checkpoint(tmp_path / "other.safetensors", other)
    best = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", monitor="quality", mode="max")
    merge = MergeAtFitEnd(
        WeightAverage(), [str(tmp_path / "other.safetensors")], str(tmp_path / "m.safetensors"), weights="best"
    )
    keep = TaskCheckpoint(str(tmp_path / "task.safetensors"), "a", weights="best")
    evaluation = MultiTaskEvaluation({"a": make_loader(0)}, merged=None)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[merge, keep, evaluation, best],
    )  # fmt: skip
    trainer.fit(module, make_loader(0), make_loader(0))
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    merged = load_checkpoint(tmp_path / "m.safetensors")
    assert all(
        torch.allclose(value, (state[f"backbone.{name}"] + other[name]) / 2, atol=1e-6)
        for name, value in merged.items()
    )
    assert torch.equal(load_checkpoint(tmp_path / "task.safetensors")["head.weight"], state["head.weight"])
    assert evaluation.results["a"] > 0
