"""StatisticsAtFitEnd: the statistics are those of the final weights on the task's data; the fit is unchanged."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import FisherMerging, RegMean, merge
from freemerge_callbacks import StatisticsAtFitEnd, TaskCheckpoint
from tests.callbacks.callbacks_project import (
    Plain,
    Tied,
    Validated,
    make_backbone,
    make_data,
    make_loader,
    make_trainer,
)


def fit(folder, *callbacks, module=None, feature=0, **arguments):
    module = module or Plain()
    loaders = [make_loader(feature)] * (2 if hasattr(module, "validation_step") else 1)
    torch.manual_seed(3)
    make_trainer(folder, *callbacks, **arguments).fit(module, *loaders)
    return module


def test_gram_matrices_of_the_final_weights(tmp_path):
    keep = StatisticsAtFitEnd(str(tmp_path / "a.gram.safetensors"), samples=40)
    module = fit(tmp_path, keep)
    found = load_checkpoint(keep.saved_path)
    inputs = torch.cat([batch for batch, _ in make_loader(0)])[:40]
    hidden = torch.tanh(module.backbone[0](inputs)).detach()
    assert list(found) == ["0.weight", "2.weight"]
    for name, values in (("0.weight", inputs), ("2.weight", hidden)):
        torch.testing.assert_close(found[name].double(), values.double().T @ values.double(), rtol=1e-5, atol=1e-5)


def test_squared_gradients_of_the_final_weights(tmp_path):
    keep = StatisticsAtFitEnd(str(tmp_path / "a.fisher.safetensors"), "squared_gradients", samples=20, seed=4)
    module = fit(tmp_path, keep)
    found = load_checkpoint(keep.saved_path)
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    inputs, generator = torch.cat([batch for batch, _ in make_loader(0)])[:20], torch.Generator().manual_seed(4)
    expected = {name: torch.zeros_like(value) for name, value in module.backbone.named_parameters()}
    for sample in inputs:
        logs = module(sample[None]).log_softmax(-1)
        label = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        module.zero_grad()
        F.nll_loss(logs, label[0]).backward()
        for name, value in module.backbone.named_parameters():
            expected[name] += value.grad.square() / 20
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("statistics", ["gram_matrices", "squared_gradients"])
def test_training_and_the_module_stay_as_they_are(tmp_path, statistics):
    keep = StatisticsAtFitEnd(str(tmp_path / "a.safetensors"), statistics, samples=10)
    plain, watched = fit(tmp_path), fit(tmp_path, keep)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in watched.state_dict().items())
    assert watched.training == plain.training
    assert not any(layer._forward_pre_hooks for layer in watched.modules())


@pytest.mark.parametrize(("statistics", "method"), [("gram_matrices", RegMean), ("squared_gradients", FisherMerging)])
def test_two_fits_and_their_merge(tmp_path, statistics, method):
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    paths = []
    for task, feature in (("a", 0), ("b", 1)):
        keep = TaskCheckpoint(str(tmp_path / f"{task}.safetensors"), task=task, head=None)
        paths.append(str(tmp_path / f"{task}.{statistics}.safetensors"))
        fit(tmp_path, keep, StatisticsAtFitEnd(paths[-1], statistics, samples=32), feature=feature)
    models = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merged = merge(tmp_path / "base.safetensors", models, method(paths))
    base, tuned = load_checkpoint(tmp_path / "base.safetensors"), [load_checkpoint(path) for path in models]
    measured = [load_checkpoint(path)["2.weight"].double() for path in paths]
    name = "2.weight"
    vectors = [model.get(name, model.get(f"backbone.{name}")).double() - base[name].double() for model in tuned]
    if method is RegMean:
        measured = [0.9 * gram + 0.1 * gram.diagonal().diag() for gram in measured]
        above = sum(vector @ gram for vector, gram in zip(vectors, measured, strict=True))
        expected = torch.linalg.solve(sum(measured), above.T).T
    else:
        least = 1e-6 * sum(float(square.mean()) for square in measured) / 2
        above = sum(vector * (square + least) for vector, square in zip(vectors, measured, strict=True))
        expected = above / sum(square + least for square in measured)
    torch.testing.assert_close(merged[name].double() - base[name].double(), expected, rtol=1e-3, atol=1e-4)


class Numbers(L.LightningDataModule):
    """Data other than those of the fit, in dicts."""

    def val_dataloader(self):
        samples = [{"pixels": inputs, "labels": label} for inputs, label in make_data(1, count=24, seed=9)]
        return DataLoader(samples, batch_size=16)


def test_other_data_in_dicts(tmp_path):
    keep = StatisticsAtFitEnd(str(tmp_path / "a.safetensors"), samples=20, loader=Numbers(), inputs="pixels")
    fit(tmp_path, keep)
    inputs = torch.cat([batch for batch, _ in make_loader(1, count=24, seed=9)])[:20]
    torch.testing.assert_close(load_checkpoint(keep.saved_path)["0.weight"], inputs.T @ inputs, rtol=1e-5, atol=1e-4)


def test_the_best_weights(tmp_path):
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="quality", mode="max")
    keep = StatisticsAtFitEnd(str(tmp_path / "a.safetensors"), samples=64, weights="best")
    fit(tmp_path, best, keep, module=Validated(), enable_checkpointing=True)
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    inputs = torch.cat([batch for batch, _ in make_loader(0)])
    hidden = torch.tanh(inputs @ state["backbone.0.weight"].T + state["backbone.0.bias"])
    torch.testing.assert_close(load_checkpoint(keep.saved_path)["2.weight"], hidden.T @ hidden, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("statistics", ["gram_matrices", "squared_gradients"])
def test_tied_layers_have_what_both_get(tmp_path, statistics):
    keep = StatisticsAtFitEnd(str(tmp_path / "a.safetensors"), statistics, samples=16)
    module = fit(tmp_path, keep, module=Plain(Tied()))
    found = load_checkpoint(keep.saved_path)
    if statistics == "squared_gradients":
        assert "second.weight" not in found
        assert found["first.weight"].shape == module.backbone.first.weight.shape
        assert float(found["first.weight"].sum()) > 0
    else:
        inputs = torch.cat([batch for batch, _ in make_loader(0)])[:16]
        between = torch.tanh(module.backbone.first(inputs)).detach()
        assert set(found) == {"first.weight", "last.weight"}
        expected = inputs.T @ inputs + between.T @ between
        torch.testing.assert_close(found["first.weight"], expected, rtol=1e-5, atol=1e-4)


def test_adapters_have_the_gram_matrices_of_the_weights_they_are_fused_into(tmp_path):
    peft = pytest.importorskip("peft")
    backbone = peft.get_peft_model(make_backbone(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    keep = StatisticsAtFitEnd(str(tmp_path / "a.safetensors"), samples=64)
    task = TaskCheckpoint(str(tmp_path / "task.safetensors"), task="a")
    fit(tmp_path, keep, task, module=Plain(backbone))
    found, fused = load_checkpoint(keep.saved_path), load_checkpoint(task.saved_path)
    inputs = torch.cat([batch for batch, _ in make_loader(0)])
    hidden = torch.tanh(inputs @ fused["backbone.0.weight"].T + fused["backbone.0.bias"])
    assert set(found) == {"0.weight", "2.weight"}
    torch.testing.assert_close(found["2.weight"], hidden.T @ hidden, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="has PEFT adapters, beside which the weights have no gradients"):
        fit(tmp_path, StatisticsAtFitEnd(str(tmp_path / "b.safetensors"), "squared_gradients"), module=Plain(backbone))


def test_errors_come_before_training(tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"")
    for arguments, message in [
        ({"output": str(tmp_path / "there.safetensors")}, "exists already"),
        ({"output": "a.pt"}, "must be a .safetensors file"),
        ({"output": "a.safetensors", "samples": 0}, "`samples` must be at least 1, got 0"),
        ({"output": "a.safetensors", "statistics": "grams"}, "`statistics` must be one of"),
        ({"output": "a.safetensors", "statistics": "coefficients"}, "`statistics` must be one of"),
        ({"output": "a.safetensors", "weights": "best"}, "weights='best' needs a ModelCheckpoint"),
        ({"output": "a.safetensors", "backbone": "encoder"}, "has no submodule 'encoder'"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, StatisticsAtFitEnd(**arguments))
    norms = Plain(nn.Sequential(nn.LayerNorm(6), nn.ZeroPad1d((0, 2))))
    with pytest.raises(ValueError, match="no linear layers and no convolutions"):
        fit(tmp_path, StatisticsAtFitEnd(str(tmp_path / "a.safetensors")), module=norms)
