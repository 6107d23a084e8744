"""MultiTaskEvaluation in plain Lightning projects, single process."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

from freemerge.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.data import Task, TaskSuite
from freemerge.merging import TaskArithmetic, WeightAverage
from freemerge_callbacks import MergeAtFitEnd, MultiTaskEvaluation
from tests.callbacks.callbacks_project import (
    Nested,
    Plain,
    Tied,
    Wrapped,
    make_backbone,
    make_data,
    make_loader,
    make_trainer,
)

LOADERS = {"a": make_loader(0, 50, seed=5), "b": make_loader(1, 37, seed=6)}


class Signs(TaskSuite):
    """Task k: the sign of input k; validation and test data have different sizes."""

    TASKS = ("a", "b")

    def build(self, name):
        feature = self.TASKS.index(name)
        return Task(name, ("minus", "plus"), *(make_data(feature, size, seed=5 + feature) for size in (64, 50, 37)))


def accuracy(predict, loader):
    pairs = [(predict(inputs).argmax(1), labels) for inputs, labels in loader]
    found, true = (torch.cat(part) for part in zip(*pairs, strict=True))
    return float((found == true).float().mean())


def make_heads():
    torch.manual_seed(9)
    return {"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)}


def fit(folder, module, *callbacks, **arguments):
    make_trainer(folder, *callbacks, **arguments).fit(module, make_loader(0))
    return module


def test_current_weights_with_heads(tmp_path):
    heads = make_heads()
    evaluation = MultiTaskEvaluation(LOADERS, heads=heads)
    module = fit(tmp_path, Plain(), evaluation)
    module.eval()
    assert evaluation.results == {
        task: pytest.approx(accuracy(lambda x, task=task: heads[task](module.backbone(x)), LOADERS[task]))
        for task in LOADERS
    }
    assert evaluation.results["a"] != evaluation.results["b"]


def test_the_modules_own_forward_gives_the_logits(tmp_path):
    evaluation = MultiTaskEvaluation(LOADERS)
    module = fit(tmp_path, Plain(), evaluation, epochs=20)
    assert evaluation.results["a"] == pytest.approx(accuracy(module, LOADERS["a"]))
    assert evaluation.results["a"] > 0.9 > evaluation.results["b"]


def test_merged_weights_and_the_modules_own_head(tmp_path, other):
    heads = make_heads()
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"))
    evaluation = MultiTaskEvaluation(LOADERS, heads={"b": heads["b"]})
    module = fit(tmp_path, Plain(), merge, evaluation)
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    backbone = make_backbone()
    backbone.load_state_dict(load_checkpoint(merge.merged_path))
    assert evaluation.results == {
        "a": pytest.approx(accuracy(lambda x: module.head(backbone(x)), LOADERS["a"])),
        "b": pytest.approx(accuracy(lambda x: heads["b"](backbone(x)), LOADERS["b"])),
    }
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in trained.items())
    current = MultiTaskEvaluation(LOADERS, heads={"b": heads["b"]}, merged=None)
    fit(tmp_path, Plain(), current)
    assert current.results["b"] == pytest.approx(
        accuracy(lambda x: heads["b"](module.backbone(x)), LOADERS["b"])
    )  # the same fit, but not merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_file_in_a_nested_backbone_with_heads_from_files(tmp_path, dtype):
    heads = make_heads()
    for task, head in heads.items():
        save_checkpoint(tmp_path / f"{task}.safetensors", head.state_dict())
    weights = {name: (value * 1.5).to(dtype) for name, value in make_backbone().state_dict().items()}
    save_checkpoint(tmp_path / "merged.safetensors", weights)
    evaluation = MultiTaskEvaluation(
        Signs(),
        heads={task: str(tmp_path / f"{task}.safetensors") for task in heads},
        backbone="model.encoder",
        merged=str(tmp_path / "merged.safetensors"),
        split="test",
    )
    fit(tmp_path, Nested(), evaluation)
    backbone = make_backbone()
    backbone.load_state_dict({name: value.float() for name, value in weights.items()})
    for task in ("a", "b"):
        loader = DataLoader(Signs().task(task).test, batch_size=8)
        assert evaluation.results[task] == pytest.approx(accuracy(lambda x, t=task: heads[t](backbone(x)), loader))


def test_every_n_epochs_is_logged_and_can_be_monitored(tmp_path):
    evaluation = MultiTaskEvaluation(LOADERS, every_n_epochs=2, prefix="all")
    seen = []
    evaluation.on_train_epoch_end = lambda trainer, module: (
        MultiTaskEvaluation.on_train_epoch_end(evaluation, trainer, module),
        seen.append((dict(evaluation.results), module.training)),
    )
    stop = EarlyStopping("all/mean_acc", patience=50, check_on_train_epoch_end=True, strict=False)
    logger = CSVLogger(tmp_path, name=None, version="logs")
    fit(tmp_path, Plain(), evaluation, stop, epochs=5, logger=logger)
    assert [bool(results) for results, _ in seen] == [False, True, True, True, True]
    assert all(training for _, training in seen)
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    logged = [float(row["all/a/acc"]) for row in rows if row.get("all/a/acc")]
    assert logged == pytest.approx([seen[1][0]["a"], seen[3][0]["a"], evaluation.results["a"]])
    last = rows[-1]
    assert float(last["all/mean_acc"]) == pytest.approx((float(last["all/a/acc"]) + float(last["all/b/acc"])) / 2)
    assert float(stop.best_score) > 0


def test_training_is_unchanged_by_the_evaluation(tmp_path):
    def module():
        torch.manual_seed(1)
        made = Plain(
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))
        )
        made.on_train_epoch_start = lambda: made.backbone[1].eval()  # frozen in evaluation mode by its owner
        return made

    modes = []
    evaluation = MultiTaskEvaluation(LOADERS, every_n_epochs=1)
    watched = module()
    watched.on_train_epoch_end = lambda: modes.append([part.training for part in watched.backbone])
    with_it = fit(tmp_path, watched, evaluation, epochs=3)
    without = fit(tmp_path, module(), epochs=3)
    for name, value in without.state_dict().items():
        assert torch.equal(with_it.state_dict()[name], value), name
    assert modes == [[True, False, True, True, True]] * 3
    assert not any(parameter.grad is not None and not parameter.requires_grad for parameter in with_it.parameters())


def test_precision_of_the_trainer(tmp_path):
    evaluation = MultiTaskEvaluation(LOADERS, heads={"b": nn.Linear(8, 2, dtype=torch.bfloat16)})
    module = fit(tmp_path, Plain(), evaluation, precision="bf16-true")
    assert module.head.weight.dtype == torch.bfloat16
    assert set(evaluation.results) == {"a", "b"}


def test_fast_dev_run_evaluates_nothing(tmp_path):
    evaluation = MultiTaskEvaluation({"a": None}, every_n_epochs=1)
    fit(tmp_path, Plain(), evaluation, fast_dev_run=True)
    assert evaluation.results == {}


def test_the_state_is_restored():
    evaluation = MultiTaskEvaluation(LOADERS, prefix="x")
    evaluation.results = {"a": 0.5}
    again = MultiTaskEvaluation(LOADERS, prefix="x")
    again.load_state_dict(evaluation.state_dict())
    assert again.results == {"a": 0.5}
    assert again.state_key == evaluation.state_key != MultiTaskEvaluation(LOADERS).state_key


SHUFFLED = DataLoader(make_data(0), batch_size=8, sampler=DistributedSampler(make_data(0), num_replicas=2, rank=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loaders": {}}, "no task to evaluate on"),
        ({"loaders": {"a": SHUFFLED}}, "has a DistributedSampler"),
        ({"heads": {"c": nn.Linear(8, 2)}}, "`heads` names 'c'"),
        ({"heads": {}}, "no heads for a, b"),
        ({"heads": {"a": nn.Linear(8, 2)}, "head": "classifier"}, "no submodule 'classifier'"),
        ({"heads": {"a": nn.Linear(8, 2), "b": "{}/other.safetensors"}}, "expected a linear head"),
        ({"heads": {"a": nn.Linear(8, 2), "b": "{}/no.safetensors"}}, "does not exist"),
        ({"backbone": "body"}, "no submodule 'body'"),
        ({"every_n_epochs": 0}, "at least 1, got 0"),
        ({"metrics": {"c": "accuracy"}}, "`metrics` names 'c'"),
        ({"metrics": {"a": "f1"}}, "there is no metric 'f1'; choose one of accuracy"),
        ({"batch_norm": 3}, "must be a dict of loaders"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, other, arguments, message):
    arguments = {"loaders": LOADERS, **arguments}
    if heads := arguments.get("heads"):
        arguments["heads"] = {
            task: head.replace("{}", str(tmp_path)) if isinstance(head, str) else head for task, head in heads.items()
        }
    module = Plain()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, MultiTaskEvaluation(**arguments))


def test_each_task_has_its_own_metric(tmp_path):
    """Regression, macro-F1, the module's own head, and a torchmetrics metric, which gets unchanged outputs."""
    torch.manual_seed(3)
    numbers = TensorDataset(torch.randn(23, 6), torch.randn(23))
    loaders = {"a": LOADERS["a"], "b": LOADERS["b"], "n": DataLoader(numbers, batch_size=8), "m": LOADERS["b"]}
    heads = {"b": nn.Linear(8, 2), "n": nn.Linear(8, 1), "m": nn.Linear(8, 2)}
    metrics = {"b": "f1_macro", "n": "spearman", "m": MulticlassCalibrationError(2)}
    evaluation = MultiTaskEvaluation(loaders, heads=heads, metrics=metrics)
    logger = CSVLogger(tmp_path, name=None, version="logs")
    module = fit(tmp_path, Plain(), evaluation, logger=logger).eval()
    features = {task: torch.cat([module.backbone(x) for x, _ in loader]).detach() for task, loader in loaders.items()}
    labels = {task: torch.cat([y for _, y in loader]) for task, loader in loaders.items()}
    predicted = {task: head(features[task]).detach() for task, head in heads.items()}
    assert evaluation.results == {
        "a": pytest.approx(accuracy(lambda x: module.head(module.backbone(x)), LOADERS["a"])),
        "b": pytest.approx(f1_score(labels["b"], predicted["b"].argmax(1), average="macro")),
        "n": pytest.approx(spearmanr(predicted["n"][:, 0], labels["n"]).statistic),
        "m": pytest.approx(float(MulticlassCalibrationError(2)(predicted["m"], labels["m"]))),
    }
    header = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"a/acc", "b/f1_macro", "n/spearman", "m/MulticlassCalibrationError"}
    assert {f"multitask/{name}" for name in wanted} <= set(header)
    assert "multitask/mean_score" not in header  # a smaller calibration error is better


class Texts(nn.Module):
    """A tiny encoder that takes a tokenizer's output by name."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.table, self.last = nn.Embedding(9, 6), nn.Linear(6, 8)

    def forward(self, input_ids, attention_mask=None):
        states = self.table(input_ids)
        return self.last((states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


class TextClassifier(Plain):
    """Batches are dicts, as from Hugging Face's collators; the forward takes a dict and returns a dict."""

    def __init__(self):
        super().__init__(Texts())

    def forward(self, batch):
        return {"logits": self.head(self.backbone(batch["input_ids"], batch["attention_mask"]))}

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch)["logits"], batch["labels"])


@pytest.mark.parametrize("heads", [None, {}])
def test_batches_that_are_dicts(tmp_path, heads):
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(9, (30, 4), generator=generator), torch.ones(30, 4)
    samples = [{"input_ids": i, "attention_mask": m, "labels": i[0] % 2} for i, m in zip(ids, mask, strict=True)]
    loader = DataLoader(samples, batch_size=8)
    evaluation = MultiTaskEvaluation({"a": loader}, heads=heads)
    module = TextClassifier()
    make_trainer(tmp_path, evaluation, epochs=3).fit(module, loader)
    right = module({"input_ids": ids, "attention_mask": mask})["logits"].argmax(1) == ids[:, 0] % 2
    assert evaluation.results == {"a": pytest.approx(float(right.float().mean()))}


def test_batch_norm_is_measured_again_with_the_merged_weights(tmp_path):
    def module():
        torch.manual_seed(1)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8)]
        return Plain(nn.Sequential(*layers))

    weights = {name: value.clone() for name, value in module().backbone.state_dict().items()}
    for name in ("0.weight", "4.weight"):
        weights[name] *= 3  # activations unlike the stored statistics, as after a merge
    save_checkpoint(tmp_path / "m.safetensors", weights)
    train = {"a": make_loader(0, 40, seed=7), "b": make_loader(1, 24, seed=8)}
    heads = make_heads()
    results = {}
    for batch_norm in (None, train):
        arguments = {"heads": heads, "merged": str(tmp_path / "m.safetensors"), "batch_norm": batch_norm}
        evaluation = MultiTaskEvaluation(LOADERS, every_n_epochs=1, **arguments)
        trained = fit(tmp_path, module(), evaluation)
        results[batch_norm is None] = evaluation.results
    plain = fit(tmp_path, module())
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in plain.state_dict().items())

    backbone = module().backbone
    backbone.load_state_dict(weights)
    first = backbone[0](torch.cat([x for loader in train.values() for x, _ in loader])).detach()
    backbone.eval()
    backbone[1].running_mean, backbone[1].running_var = first.mean(0), first.var(0)
    batches = [x for loader in train.values() for x, _ in loader]
    second = []
    for x in batches:  # during the measurement, layers normalise by the batch, as in training
        backbone[1].train()
        backbone[1].momentum = 0.0
        second.append(backbone[4](backbone[2](backbone[1](backbone[0](x)))).detach())
    backbone[1].eval()
    backbone[5].running_mean, backbone[5].running_var = torch.cat(second).mean(0), torch.cat(second).var(0)
    assert results[False] == {
        task: pytest.approx(accuracy(lambda x, t=task: heads[t](backbone(x)), LOADERS[task])) for task in LOADERS
    }
    assert results[False] != results[True]


def test_a_suite_measures_batch_norm_on_its_training_data(tmp_path):
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    save_checkpoint(tmp_path / "m.safetensors", {n: v * 2 for n, v in backbone.state_dict().items() if "num" not in n})
    merged = str(tmp_path / "m.safetensors")
    few = MultiTaskEvaluation(Signs(batch_size=16), make_heads(), merged=merged, batch_norm=1)
    many = MultiTaskEvaluation(Signs(batch_size=16), make_heads(), merged=merged, batch_norm=99, prefix="many")
    fit(tmp_path, Plain(backbone), few, many)
    assert set(few.results) == set(many.results) == {"a", "b"}
    assert few.results != many.results


def test_order_and_ambiguity_of_merges(tmp_path, other):
    merges = [MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / f"{i}.safetensors")) for i in range(2)]
    with pytest.raises(ValueError, match="put its MergeAtFitEnd before it"):
        fit(tmp_path, Plain(), MultiTaskEvaluation(LOADERS), merges[0])
    with pytest.raises(ValueError, match="several MergeAtFitEnd"):
        fit(tmp_path, Plain(), *merges, MultiTaskEvaluation(LOADERS))
    heads = make_heads()
    merges[1].method = TaskArithmetic(scale=[0.0, 1.0])
    both = [MultiTaskEvaluation(LOADERS, heads=heads, merged=merge, prefix=str(i)) for i, merge in enumerate(merges)]
    fit(tmp_path, Plain(), *merges, *both)
    backbone = make_backbone()
    backbone.load_state_dict(load_checkpoint(other))
    assert both[1].results["a"] == pytest.approx(accuracy(lambda x: heads["a"](backbone(x)), LOADERS["a"]))


def test_a_merged_file_of_another_model(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", {"conv.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"m.safetensors: its tensors are not those of the backbone 'backbone' of Plain"
    ):
        fit(tmp_path, Plain(), MultiTaskEvaluation(LOADERS, merged=str(tmp_path / "m.safetensors")))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([torch.zeros(4, 6)], "must yield pairs .* yields a Tensor"),
        ([], "but it is empty"),
    ],
)
def test_loaders_of_another_kind(tmp_path, loader, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Plain(), MultiTaskEvaluation({"a": loader}))


def test_a_forward_that_gives_no_logits(tmp_path):
    module = Nested()
    module.forward = lambda inputs: module.model["encoder"](inputs).mean(1)
    with pytest.raises(ValueError, match=r"expected logits \(B, C\) for 'a', got shape \[1\]; does it need heads"):
        fit(tmp_path, module, MultiTaskEvaluation(LOADERS, backbone="model.encoder"))


def test_a_compiled_backbone(tmp_path, other):
    module = Plain(torch.compile(make_backbone(), backend="eager"))
    heads = make_heads()
    evaluation = MultiTaskEvaluation(LOADERS, heads=heads, merged=str(other))
    fit(tmp_path, module, evaluation)
    backbone = make_backbone()
    backbone.load_state_dict(load_checkpoint(other))
    for task, loader in LOADERS.items():
        assert evaluation.results[task] == pytest.approx(accuracy(lambda x, t=task: heads[t](backbone(x)), loader))


def test_a_wrapped_backbone_with_tied_weights(tmp_path):
    """The base's file has the names of the wrapped model and tied tensors once, like a Hugging Face folder."""
    start, changed = Tied(), Tied()
    save_checkpoint(tmp_path / "base.safetensors", start.state_dict())
    changed.load_state_dict({name: value * 1.1 for name, value in start.state_dict().items()})
    save_checkpoint(tmp_path / "other.safetensors", changed.state_dict())
    assert "second.weight" not in open_checkpoint(tmp_path / "base.safetensors").names
    merge = MergeAtFitEnd(
        TaskArithmetic(scale=0.5),
        [str(tmp_path / "other.safetensors")],
        str(tmp_path / "m.safetensors"),
        base=str(tmp_path / "base.safetensors"),
    )
    evaluation = MultiTaskEvaluation(LOADERS, every_n_epochs=1)
    module = fit(tmp_path, Plain(Wrapped(Tied())), merge, evaluation)
    merged = load_checkpoint(merge.merged_path)
    assert merged["first.weight"].data_ptr() == merged["second.weight"].data_ptr()
    expected = Tied()
    parts = zip(start.state_dict().items(), module.backbone.model.state_dict().values(), strict=True)
    expected.load_state_dict(
        {
            name: base + 0.5 * (trained - base) + 0.5 * (changed.state_dict()[name] - base)
            for (name, base), trained in parts
        }
    )
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    for task, loader in LOADERS.items():
        assert evaluation.results[task] == pytest.approx(accuracy(lambda x: module.head(expected(x)), loader))


def test_tied_initial_weights_and_a_resumed_fit(tmp_path):
    save_checkpoint(tmp_path / "other.safetensors", Tied().state_dict())
    last = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    merge = MergeAtFitEnd(
        TaskArithmetic(scale=[1.0, 0.0]), [str(tmp_path / "other.safetensors")], str(tmp_path / "m.safetensors")
    )
    fit(tmp_path, Plain(Tied()), merge, last, epochs=1, enable_checkpointing=True)
    save_checkpoint(merge.base.kept, Tied().state_dict())  # the state of a fit that was interrupted before its merge
    merge.overwrite = True
    resumed = Plain(Tied())
    make_trainer(tmp_path, merge).fit(resumed, make_loader(0), ckpt_path=tmp_path / "last.ckpt")
    merged = load_checkpoint(merge.merged_path)
    for name, value in resumed.backbone.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
