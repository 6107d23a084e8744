"""Loaders of real projects: batch hooks, shared generators, persistent workers, several loaders."""

import collections
import dataclasses

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import Accuracy, ConfusionMatrix, MeanSquaredError, MetricCollection

from freemerge.checkpoints import save_checkpoint
from freemerge.merging import WeightAverage
from freemerge_callbacks import MergePreview, MultiTaskEvaluation, save_base
from tests.callbacks.callbacks_project import Plain, Validated, make_backbone, make_data, make_loader, make_trainer

X, Y = make_data(0).tensors


def accuracy(module, inputs=X, labels=Y):
    with torch.no_grad():
        return pytest.approx(float((module(inputs).argmax(1) == labels).float().mean()))


class Data(L.LightningDataModule):
    """Normalises in a hook, and augments there in training."""

    def train_dataloader(self):
        return make_loader(0)

    def val_dataloader(self):
        return make_loader(0)

    def test_dataloader(self):
        return make_loader(0)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        inputs, labels = batch
        return (inputs.flip(0) if self.trainer.training else 3 * inputs - 1), labels


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    "loaders", [{"a": Data()}, {"a": make_loader(0)}], ids=["data module", "loader of the Trainer's"]
)
def test_batches_pass_the_hooks_of_the_data_module(tmp_path, loaders, split):
    module, evaluation = Plain(), MultiTaskEvaluation(loaders, split=split, every_n_epochs=1)
    stages = []
    module.on_train_epoch_end = lambda: stages.append(module.trainer.training)
    make_trainer(tmp_path, evaluation).fit(module, datamodule=Data())
    assert evaluation.results["a"] == accuracy(module, 3 * X - 1)
    assert stages == [True, True]  # the Trainer continues to train


def test_batches_pass_the_hooks_of_the_module(tmp_path):
    class Normalises(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch["x"] * 3 - 1, batch["y"]

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return {"x": batch[0].to(device), "y": batch[1].to(device)}

    module, evaluation = Normalises(), MultiTaskEvaluation({"a": make_loader(0)})
    make_trainer(tmp_path, evaluation).fit(module, make_loader(0))
    assert evaluation.results["a"] == accuracy(module, 3 * X - 1)


def test_batch_norm_is_measured_on_batches_after_the_hooks(tmp_path):
    """Dicts by the same keys, after the same hooks."""

    class Normalises(Plain):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["image"]), batch["label"])

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch | {"image": batch["image"] * 3 - 1}

    module = Normalises()
    save_checkpoint(tmp_path / "other.safetensors", module.backbone.state_dict())
    loader = DataLoader([{"image": x, "label": y, "path": "p"} for x, y in make_data(0)], batch_size=16)
    evaluation = MultiTaskEvaluation(
        {"a": loader},
        merged=str(tmp_path / "other.safetensors"),
        batch_norm={"a": loader},
        inputs="image",
        labels="label",
    )
    start = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    make_trainer(tmp_path, evaluation).fit(module, loader)
    hidden = F.linear(3 * X - 1, start["0.weight"], start["0.bias"])
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0) + 1e-5).sqrt()
    assert evaluation.results["a"] == accuracy(module.head, hidden)


def test_training_is_unchanged_if_loaders_share_a_generator(tmp_path):
    def trained(with_evaluation):
        generator = torch.Generator().manual_seed(3)
        train = DataLoader(make_data(0), 8, shuffle=True, generator=generator)
        val = DataLoader(make_data(0), 8, generator=generator)
        module = Validated()
        callbacks = [MultiTaskEvaluation({"a": val}, every_n_epochs=1)] if with_evaluation else []
        make_trainer(tmp_path, *callbacks).fit(module, train, val)
        return module.state_dict()

    without, beside = trained(False), trained(True)
    assert all(torch.equal(without[name], beside[name]) for name in without)


def test_a_preview_does_not_disturb_a_validation_on_the_same_loader(tmp_path):
    """With persistent workers, a second iteration over a loader would reset the first."""
    module, seen = Validated(), []
    module.on_validation_batch_end = lambda *_: seen.append(1)
    val = DataLoader(make_data(0), 16, num_workers=1, persistent_workers=True)
    base = save_base(module, tmp_path / "base.safetensors")
    save_checkpoint(tmp_path / "other.safetensors", make_backbone().state_dict())
    preview = MergePreview(WeightAverage(), str(base), [str(tmp_path / "other.safetensors")], {"a": val})
    make_trainer(tmp_path, preview, num_sanity_val_steps=0).fit(module, make_loader(0), val)
    assert len(seen) == 2 * 4  # epochs × batches


class Several(L.LightningDataModule):
    def __init__(self, loaders):
        super().__init__()
        self.loaders = loaders

    def val_dataloader(self):
        return self.loaders


def test_a_combined_loader_is_unpacked(tmp_path):
    combined = CombinedLoader({"a": make_loader(0), "b": make_loader(1)}, "sequential")
    for loaders in (combined, Several(combined)):
        module, evaluation = Plain(), MultiTaskEvaluation(loaders)
        make_trainer(tmp_path, evaluation).fit(module, make_loader(0))
        assert evaluation.results == {"a": accuracy(module), "b": accuracy(module, *make_data(1).tensors)}


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        (
            {"a": Several([make_loader(0), make_loader(1)])},
            r"found 2 in Several.val_dataloader\(\); name a task for each",
        ),
        ({"a": [make_loader(0), make_loader(1)]}, r"expected one loader for 'a', found 2 in a list"),
        ({"a": CombinedLoader({"x": make_loader(0)})}, r"found 1 in a CombinedLoader \('x'\)"),
        (make_loader(0), r"`loaders` must be a dict, task → loader, but is a DataLoader"),
    ],
)
def test_several_loaders_for_one_task_are_refused(tmp_path, loaders, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, MultiTaskEvaluation(loaders)).fit(Plain(), make_loader(0))


def test_one_loader_in_a_list_and_a_stream(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_data(0))

    module = Plain()
    evaluation = MultiTaskEvaluation({"a": Several([make_loader(0)]), "b": DataLoader(Stream(), 10)})
    make_trainer(tmp_path, evaluation).fit(module, make_loader(0))
    assert evaluation.results == {"a": accuracy(module), "b": accuracy(module)}


Named = collections.namedtuple("Named", ["image", "label"])


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize("kind", [Named, Sample])
def test_batches_with_attributes(tmp_path, kind):
    module, evaluation = Plain(), MultiTaskEvaluation({"a": [kind(X, Y)]}, inputs="image", labels="label")
    make_trainer(tmp_path, evaluation).fit(module, make_loader(0))
    assert evaluation.results["a"] == accuracy(module)


def test_several_positions_are_several_arguments(tmp_path):
    class Scaled(Plain):
        def forward(self, inputs, scale):
            return super().forward(inputs * scale[:, None])

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0], batch[1]), batch[2])

    module, evaluation = Scaled(), MultiTaskEvaluation({"a": [(X, Y.float(), Y)]}, inputs=[0, 1], labels=2)
    make_trainer(tmp_path, evaluation).fit(module, DataLoader(TensorDataset(X, Y.float(), Y), 16))
    with torch.no_grad():
        assert evaluation.results["a"] == pytest.approx(float((module(X, Y.float()).argmax(1) == Y).float().mean()))


@pytest.mark.parametrize("labels", [X[:, 0], X[:, :1]], ids=["(B,)", "(B, 1)"])
def test_outputs_and_labels_whose_shapes_differ_by_a_dimension_of_one(tmp_path, labels):
    class Regression(Plain):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]).flatten(), batch[1].flatten())

    loader = DataLoader(TensorDataset(X, labels), 10)
    module, evaluation = Regression(), MultiTaskEvaluation({"a": loader}, metrics={"a": MeanSquaredError()})
    make_trainer(tmp_path, evaluation).fit(module, loader)
    with torch.no_grad():
        expected = float((module(X)[:, 0] - X[:, 0]).square().mean())
    assert evaluation.results["a"] == pytest.approx(expected, rel=1e-5)


class Segments(L.LightningModule):
    def __init__(self, classes):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, classes, 1)

    def forward(self, images):
        return self.head(torch.relu(self.backbone(images)))

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("keepdim", [False, True])
def test_masks_with_and_without_a_channel(tmp_path, classes, keepdim):
    masks = IMAGES.argmax(1, keepdim=keepdim) if classes > 1 else (IMAGES[:, :1] if keepdim else IMAGES[:, 0]) > 0
    loader = DataLoader(TensorDataset(IMAGES, masks), 4)
    module, evaluation = Segments(classes), MultiTaskEvaluation({"a": loader}, metrics={"a": "mean_iou"})
    make_trainer(tmp_path, evaluation).fit(module, loader)
    with torch.no_grad():
        found = module(IMAGES).argmax(1) if classes > 1 else (module(IMAGES)[:, 0] > 0).long()
    masks = masks[:, 0].long() if keepdim else masks.long()
    counted = [1] if classes == 1 else range(classes)
    ious = [((found == c) & (masks == c)).sum() / ((found == c) | (masks == c)).sum() for c in counted]
    assert evaluation.results["a"] == pytest.approx(float(sum(ious) / len(ious)), rel=1e-5)


def test_token_classes_in_the_last_dimension(tmp_path):
    class Tags(Segments):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.backbone, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

    tokens = torch.arange(40).view(8, 5) % 10
    tags = torch.where(tokens == 4, -100, tokens % 3)
    loader = DataLoader(TensorDataset(tokens, tags), 3)
    metric = Accuracy("multiclass", num_classes=3, average="micro", ignore_index=-100)
    module, evaluation = Tags(), MultiTaskEvaluation({"a": loader}, metrics={"a": metric})
    make_trainer(tmp_path, evaluation).fit(module, loader)
    with torch.no_grad():
        right = module(tokens).argmax(2) == tags
    assert evaluation.results["a"] == pytest.approx(float(right[tags >= 0].float().mean()))


def late(value, count=20):
    """Labels of which one within the first batch, but not the first, is no class."""
    labels = Y.clone()
    labels[count] = value
    return labels


@pytest.mark.parametrize(
    ("module", "batch", "metrics", "message"),
    [
        (Plain, (X, late(7)), None, r"the loader of 'a' yields the label 7, and the model gives logits of 2 classes"),
        (
            lambda: Segments(3),
            (IMAGES, torch.where(IMAGES[:, 0] > 2, 255, IMAGES.argmax(1))),
            {"a": "mean_iou"},
            r"the label 255, .* labels are 0 to 2; to ignore this label, pass metrics=\{'a': Jaccard"
            r"Index\('multiclass', num_classes=3, ignore_index=255\)\}",
        ),
        (
            Plain,
            (X, [{"boxes": X}]),
            None,
            r"expected one class for each sample of 'a', got a list of 1; pass a torchmetrics metric",
        ),
        (
            Plain,
            (X, Y),
            {"a": MetricCollection([Accuracy("multiclass", num_classes=2)])},
            "the metric of 'a' is a MetricCollection; pass the name of a metric, or one torchmetrics metric",
        ),
        (
            Plain,
            (X, Y),
            {"a": ConfusionMatrix("multiclass", num_classes=2)},
            r"MulticlassConfusionMatrix, the metric of 'a', must give one number, got shape \[2, 2\]",
        ),
    ],
)
def test_a_whole_batch_is_checked_before_training(tmp_path, module, batch, metrics, message):
    trainer = make_trainer(tmp_path, MultiTaskEvaluation({"a": [batch]}, metrics=metrics))
    with pytest.raises(ValueError, match=message) as error:
        trainer.fit(module(), [(IMAGES, Y)] if module is not Plain else make_loader(0))
    assert trainer.global_step == 0
    assert "\n" not in str(error.value)
