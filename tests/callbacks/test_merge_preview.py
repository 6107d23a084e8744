"""MergePreview: its logged values are right, can be monitored, and do not change the training."""

import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import HighPass, NyquistDisc, TaskArithmetic, Vectors, WeightAverage
from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint
from freemerge_callbacks._similarity import similarity
from freemerge_callbacks.merge_preview import distinct_names
from tests.callbacks.callbacks_project import Plain, Validated, make_backbone, make_loader, make_trainer

LOADERS = {"a": make_loader(0, 50, seed=5), "b": make_loader(1, 37, seed=6)}


@pytest.fixture
def base(tmp_path):
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    return str(tmp_path / "base.safetensors")


def fit(folder, callbacks, module=None, **arguments):
    module = module or Validated(lr=0.5)
    make_trainer(folder, *callbacks, **arguments).fit(module, make_loader(0), make_loader(0))
    return module


def test_a_checkpoint_is_chosen_by_the_accuracy_of_its_merge(tmp_path, base, other):
    torch.manual_seed(4)
    heads = {"b": nn.Linear(8, 2)}
    preview = MergePreview(WeightAverage(), base, [str(other)], LOADERS, heads=heads)
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="merged/mean_acc", mode="max")
    merger = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"), base=base, weights="best")
    evaluation = MultiTaskEvaluation(LOADERS, heads=heads, merged=merger)
    logger = CSVLogger(tmp_path, name=None, version="logs")
    callbacks = [preview, merger, evaluation, best, EarlyStopping("merged/mean_acc", mode="max", patience=9)]
    fit(tmp_path, callbacks, epochs=6, logger=logger, enable_checkpointing=True)

    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    curve = [float(row["merged/mean_acc"]) for row in rows if row.get("merged/mean_acc")]
    assert len(curve) == 6
    assert len(set(curve)) > 1
    assert float(best.best_model_score) == pytest.approx(max(curve))
    # The merged file of the best epoch has the accuracy of its preview. The module's own head is from another epoch.
    assert evaluation.results["b"] == pytest.approx(
        [float(row["merged/b/acc"]) for row in rows if row.get("merged/mean_acc")][curve.index(max(curve))]
    )


def test_results_are_those_of_the_merged_backbone(tmp_path, base, other):
    preview = MergePreview(TaskArithmetic(scale=[0.5, 1.0]), base, [str(other)], LOADERS)
    module = fit(tmp_path, [preview], epochs=2).eval()
    start, added = make_backbone().state_dict(), load_checkpoint(other)
    trained = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    tau = {name: trained[name] - start[name] for name in start}
    others = {name: added[name] - start[name] for name in start}
    merged = make_backbone()
    merged.load_state_dict({name: start[name] + 0.5 * tau[name] + others[name] for name in start})
    for task, loader in LOADERS.items():
        right = sum(int((module.head(merged(x)).argmax(1) == y).sum()) for x, y in loader)
        assert preview.results[task] == pytest.approx(right / len(loader.dataset))

    flat, other_flat = (torch.cat([v.flatten() for v in vectors.values()]).double() for vectors in (tau, others))
    assert preview.similarity.norm == pytest.approx(float(flat.norm()), rel=1e-5)
    cosine = float(torch.nn.functional.cosine_similarity(flat, other_flat, dim=0))
    assert preview.similarity.cosine == pytest.approx([cosine], rel=1e-4)
    assert preview.similarity.sign_agreement == pytest.approx(
        [float((flat.sign() == other_flat.sign()).double().mean())]
    )


@pytest.fixture
def finished(tmp_path):
    """Task b, fine-tuned and kept with its head."""
    keep = TaskCheckpoint(str(tmp_path / "tasks" / "b.safetensors"), task="b")
    module = Validated(lr=0.5)
    make_trainer(tmp_path, keep, epochs=4).fit(module, make_loader(1), make_loader(1))
    return module.eval(), str(keep.output)


def test_normalized_results(tmp_path, base, finished):
    """Merged ÷ individual, by hand; ModelCheckpoint and EarlyStopping follow it."""
    alone, path = finished
    preview = MergePreview(TaskArithmetic(scale=0.4), base, [path], LOADERS, heads={"b": path})
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="merged/mean_normalized_acc", mode="max")
    stop = EarlyStopping("merged/mean_normalized_acc", mode="max", patience=2)
    logger = CSVLogger(tmp_path, name=None, version="logs")
    module = fit(tmp_path, [preview, best, stop], epochs=12, logger=logger, enable_checkpointing=True).eval()

    start = make_backbone().state_dict()
    merged = make_backbone()
    models = [each.backbone.state_dict() for each in (module, alone)]
    merged.load_state_dict({n: v + 0.4 * sum(model[n] - v for model in models) for n, v in start.items()})

    def accuracy(backbone, head, task):
        right = sum(int((head(backbone(x)).argmax(1) == y).sum()) for x, y in LOADERS[task])
        return right / len(LOADERS[task].dataset)

    individual = {"a": accuracy(module.backbone, module.head, "a"), "b": accuracy(alone.backbone, alone.head, "b")}
    assert preview.individual == pytest.approx(individual)
    shares = [accuracy(merged, m.head, task) / individual[task] for task, m in (("a", module), ("b", alone))]
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    curve = [float(row["merged/mean_normalized_acc"]) for row in rows if row.get("merged/mean_normalized_acc")]
    assert curve[-1] == pytest.approx(sum(shares) / 2)
    assert float(best.best_model_score) == pytest.approx(max(curve))
    assert stop.stopped_epoch == len(curve) - 1 == curve.index(max(curve)) + 2 < 11  # two epochs later, not the last


def test_given_individual_results_are_not_measured(tmp_path, base, other):
    preview = MergePreview(WeightAverage(), base, [str(other)], LOADERS, individual={"a": 0.5, "b": 0.8})
    logger = CSVLogger(tmp_path, name=None, version="logs")
    fit(tmp_path, [preview], epochs=1, logger=logger)
    assert preview.individual == {"a": 0.5, "b": 0.8}
    (row,) = csv.DictReader((tmp_path / "logs" / "metrics.csv").open())
    expected = (preview.results["a"] / 0.5 + preview.results["b"] / 0.8) / 2
    assert float(row["merged/mean_normalized_acc"]) == pytest.approx(expected)


def test_unknown_individual_results_give_one_warning(tmp_path, base, other):
    preview = MergePreview(WeightAverage(), base, [str(other)], LOADERS)
    with pytest.warns(UserWarning, match="the individual results of a, b are unknown; pass individual=") as found:
        fit(tmp_path, [preview], epochs=3)
    assert sum("the individual results" in str(each.message) for each in found) == 1
    assert preview.results


def test_an_adapter_among_the_others(tmp_path, base):
    """Its own accuracy is that of the base with the adapter."""
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    folder = tmp_path / "b"
    save_checkpoint(
        folder / "adapter_model.safetensors",
        {"base_model.model.2.lora_A.weight": down, "base_model.model.2.lora_B.weight": up},
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    preview = MergePreview(WeightAverage(), base, [str(folder)], LOADERS)
    module = fit(tmp_path, [preview], epochs=1).eval()
    backbone = make_backbone()
    backbone[2].weight.data += up @ down
    right = sum(int((module.head(backbone(x)).argmax(1) == y).sum()) for x, y in LOADERS["b"])
    assert preview.individual["b"] == pytest.approx(right / 37)


def test_training_is_bit_identical_with_a_preview(tmp_path, base, other):
    def module():
        torch.manual_seed(1)
        made = Validated()
        made.backbone.append(nn.Dropout(0.5))
        return made

    preview = MergePreview(WeightAverage(), base, [str(other)], LOADERS)
    with_it, without = fit(tmp_path, [preview], module()), fit(tmp_path, [], module())
    assert preview.results
    for name, value in without.state_dict().items():
        assert torch.equal(with_it.state_dict()[name], value), name


def test_every_n_epochs_merges_but_compares_after_each_validation(tmp_path, base, other):
    preview = MergePreview(WeightAverage(), base, [str(other)], LOADERS, every_n_epochs=2, prefix="average")
    fit(tmp_path, [preview], epochs=5, logger=CSVLogger(tmp_path, name=None, version="logs"))
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    assert sum(bool(row["average/a/acc"]) for row in rows) == 2
    assert sum(bool(row["task_vector/cosine/other"]) for row in rows) == 5
    norms = [float(row["task_vector/norm"]) for row in rows if row["task_vector/norm"]]
    assert norms == sorted(norms)
    assert norms[0] > 0


def test_fast_dev_run_merges_nothing(tmp_path, base):
    preview = MergePreview(WeightAverage(), base, ["nowhere"], LOADERS)
    fit(tmp_path, [preview], fast_dev_run=True)
    assert preview.results == {}
    assert preview.similarity is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every_n_epochs": 0}, "at least 1"),
        ({"others": ["{}/nothing"]}, "matches nothing"),
        ({"others": ["{}/base.safetensors"]}, "own base"),
        ({"base": "{}/nothing"}, "does not exist"),
        ({"exclude": ["encoder.*"]}, "matches no tensor"),
        ({"split": "train"}, "'val' or 'test'"),
        ({"backbone": "body"}, "no submodule 'body'"),
        ({"individual": {"c": 0.5}}, "`individual` names 'c', a task without a loader"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, base, other, change, message):
    def fill(value):
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value.replace("{}", str(tmp_path)) if isinstance(value, str) else value

    arguments = {"base": base, "others": [str(other)], **{name: fill(value) for name, value in change.items()}}
    module = Validated()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [MergePreview(WeightAverage(), loaders=LOADERS, **arguments)], module)


def test_it_needs_a_validation(tmp_path, base, other):
    with pytest.raises(ValueError, match="this fit has none; add validation data"):
        make_trainer(tmp_path, MergePreview(WeightAverage(), base, [str(other)], LOADERS)).fit(Plain(), make_loader(0))


def test_another_base_is_refused(tmp_path, base):
    torch.manual_seed(99)
    module = Plain(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()))
    keep = TaskCheckpoint(str(tmp_path / "a.safetensors"), task="a")
    make_trainer(tmp_path, keep).fit(module, make_loader(0))
    with pytest.raises(ValueError, match=r"MergePreview: .*a.safetensors was fine-tuned from another base"):
        fit(tmp_path, [MergePreview(WeightAverage(), base, [str(keep.output)], LOADERS)])


def test_similarity_equals_the_formulas():
    deltas = torch.tensor([[3.0, 4.0, 0.0], [4.0, 3.0, 1.0], [-3.0, 4.0, 5.0], [0.0, 0.0, 0.0]])
    found = similarity(Vectors(list("abcd"), {"w": (3,)}, lambda name: deltas), NyquistDisc())
    assert found.norm == 5.0
    assert found.cosine == pytest.approx((24 / (5 * math.sqrt(26)), 7 / (5 * math.sqrt(50)), 0.0))
    assert found.sign_agreement == (1.0, 0.5, 0.0)
    assert found.low_frequency_energy == 0.0  # filters do not change one-dimensional tensors


def test_low_frequency_energy_equals_the_formula():
    """A constant with energy 9 and the finest checkerboard with energy 1; a bias is not filtered."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    weight = 3.0 + (-1.0) ** (rows + columns)
    vectors = {"w": weight[None], "b": torch.ones(1, 4)}
    for filter in (HighPass(0.5), NyquistDisc()):
        found = similarity(Vectors(["a"], {n: v.shape[1:] for n, v in vectors.items()}, vectors.__getitem__), filter)
        assert found.low_frequency_energy == pytest.approx(0.9)


def test_names_of_checkpoints_are_distinct(tmp_path, other):
    for folder in ("cars", "dogs"):
        save_checkpoint(tmp_path / folder / "backbone.safetensors", make_backbone().state_dict())
    keep = TaskCheckpoint(str(tmp_path / "x.safetensors"), task="birds")
    make_trainer(tmp_path, keep).fit(Plain(), make_loader(0))
    paths = [tmp_path / "cars/backbone.safetensors", tmp_path / "dogs/backbone.safetensors", keep.output, other]
    assert distinct_names(paths) == ["cars", "dogs", "birds", "other"]
