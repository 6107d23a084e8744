"""TaskCheckpoint, and the use of its files by MergeAtFitEnd and MultiTaskEvaluation."""

import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from freemerge.checkpoints import CheckpointError, hash_tensors, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.task_files import TaskRecord, read_record
from freemerge.cli import main
from freemerge.merging import MergeError, TaskArithmetic, WeightAverage, merge
from freemerge_callbacks import MergeAtFitEnd, MultiTaskEvaluation, TaskCheckpoint
from tests.callbacks.callbacks_project import Nested, Plain, Validated, make_backbone, make_loader, make_trainer


def fit(folder, callbacks, module=None, feature=0, ckpt_path=None, **arguments):
    module = module or Plain()
    loaders = [make_loader(feature)] * (2 if hasattr(module, "validation_step") and "val" in arguments else 1)
    arguments.pop("val", None)
    make_trainer(folder, *callbacks, **arguments).fit(module, *loaders, ckpt_path=ckpt_path)
    return module


def weights_of(module):
    return {name: value.detach() for name, value in module.backbone.state_dict().items()}


def test_weights_head_and_record(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    L.seed_everything(11, verbose=False)
    keep = TaskCheckpoint(str(tmp_path / "tasks" / "a.safetensors"), task="a")
    module = fit(tmp_path, [keep], Validated(), val=True)
    assert keep.saved_path == tmp_path / "tasks" / "a.safetensors"
    record = read_record(keep.saved_path)
    assert record == TaskRecord("a", "weights", hash_tensors(make_backbone().state_dict()), 11, {"quality": -1.0})
    saved = load_checkpoint(keep.saved_path)
    assert all(torch.equal(saved[f"backbone.{name}"], value) for name, value in weights_of(module).items())
    assert torch.equal(saved["head.weight"], module.head.weight)
    assert len(saved) == 6
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("given", [False, True])
def test_task_vector_in_bfloat16(tmp_path, given):
    start = make_backbone().state_dict()
    save_checkpoint(tmp_path / "base.safetensors", start)
    keep = TaskCheckpoint(
        str(tmp_path / "a.safetensors"),
        task="a",
        save="task_vector",
        base=str(tmp_path / "base.safetensors") if given else None,
        dtype="bfloat16",
        head=None,
    )
    module = fit(tmp_path, [keep])
    saved = load_file(keep.saved_path)
    assert set(saved) == {f"backbone.{name}.task_vector" for name in start}
    for name, value in weights_of(module).items():
        assert torch.equal(saved[f"backbone.{name}.task_vector"], (value - start[name]).bfloat16())
    assert read_record(keep.saved_path).base_hash == hash_tensors(start)
    assert not keep.base.kept.exists()
    with pytest.raises(CheckpointError, match=r"is a task vector, not a model; merge it with its base"):
        load_checkpoint(keep.saved_path)
    merged = merge(start, [keep.saved_path], TaskArithmetic(scale=2.0))
    for name, value in merged.items():
        assert torch.equal(value, start[name] + 2 * saved[f"backbone.{name}.task_vector"].float())


@pytest.mark.parametrize("save", ["weights", "task_vector"])
def test_its_files_are_merged_and_evaluated(tmp_path, save):
    first = fit(tmp_path, [TaskCheckpoint(str(tmp_path / "tasks" / "a.safetensors"), task="a", save=save)])
    merger = MergeAtFitEnd(TaskArithmetic(scale=1.0), [str(tmp_path / "tasks" / "*")], str(tmp_path / "m.safetensors"))
    loaders = {"a": make_loader(0, 50, seed=2), "b": make_loader(1, 50, seed=2)}
    evaluation = MultiTaskEvaluation(loaders, heads={"a": str(tmp_path / "tasks" / "a.safetensors")})
    second = fit(tmp_path, [merger, evaluation], feature=1)
    start, merged = make_backbone().state_dict(), load_checkpoint(merger.merged_path)
    for name, value in merged.items():
        expected = weights_of(first)[name] + weights_of(second)[name] - start[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    backbone = make_backbone()
    backbone.load_state_dict(merged)
    for task, module in (("a", first), ("b", second)):
        right = sum(int((module.head(backbone(x)).argmax(1) == y).sum()) for x, y in loaders[task])
        assert evaluation.results[task] == pytest.approx(right / 50)


def test_a_task_vector_is_added_to_a_given_base(tmp_path):
    """The base's names are one level deeper than the backbone's, like those of a Hugging Face folder in a wrapper."""
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    base = str(tmp_path / "base.safetensors")
    keep = TaskCheckpoint(
        str(tmp_path / "a.safetensors"), task="a", save="task_vector", base=base, backbone="model", head=None
    )
    merger = MergeAtFitEnd(
        TaskArithmetic(scale=[0.0, 1.0]),
        [str(tmp_path / "a.safetensors")],
        str(tmp_path / "m.safetensors"),
        base=base,
        backbone="model",
    )
    first = fit(tmp_path, [keep], Nested())
    fit(tmp_path, [merger], Nested(), feature=1)
    merged = load_checkpoint(merger.merged_path)
    for name, value in first.model["encoder"].state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    assert read_record(tmp_path / "a.safetensors").base_hash == hash_tensors(
        {f"encoder.{name}": value for name, value in make_backbone().state_dict().items()}
    )


@pytest.mark.parametrize("given", [False, True])
def test_another_base_is_refused_before_training(tmp_path, given):
    torch.manual_seed(99)
    other = Plain(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()))
    fit(tmp_path, [TaskCheckpoint(str(tmp_path / "a.safetensors"), task="a")], other)
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    merger = MergeAtFitEnd(
        WeightAverage(),
        [str(tmp_path / "a.safetensors")],
        str(tmp_path / "m.safetensors"),
        base=str(tmp_path / "base.safetensors") if given else None,
    )
    module = Plain()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(ValueError, match=r"a.safetensors was fine-tuned from another base than this fit"):
        fit(tmp_path, [merger], module)


@pytest.mark.parametrize("save", ["weights", "task_vector"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_any_later_merge_refuses_another_base(tmp_path, save, dtype, capsys):
    """`python -m freemerge merge` refuses it too; the base can have another wrapper or precision, or a head."""
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict() | {"score.weight": torch.ones(2, 8)})
    other = {name: value + 1e-3 for name, value in make_backbone().state_dict().items()}
    save_checkpoint(tmp_path / "other.safetensors", other)
    path = str(tmp_path / "a.safetensors")
    keep = TaskCheckpoint(path, task="a", save=save, dtype=dtype, backbone="model", head=None)  # model.encoder, .head
    base_of_all = {name: value.clone() for name, value in Nested().model.state_dict().items()}
    torch.manual_seed(1)
    fit(tmp_path, [keep], Nested())
    record = read_record(path)
    assert set(record.dtypes) == set(base_of_all)
    with pytest.raises(MergeError, match=r"the task 'a' was fine-tuned from another base than .*base \(hash"):
        merge(base_of_all, [path], WeightAverage())  # its head has another random initialisation

    keep = TaskCheckpoint(path, task="a", save=save, dtype=dtype, overwrite=True)
    module = fit(tmp_path, [keep])
    merged = merge(tmp_path / "base.safetensors", [path], TaskArithmetic(scale=1.0), exclude=["score.*", "head.*"])
    for name, value in weights_of(module).items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6 if dtype is None else 1e-2)
    arguments = ["--method", "WeightAverage", "--exclude", "[head.*]", "--output", str(tmp_path / "m.safetensors")]
    run = ["merge", "--base", str(tmp_path / "other.safetensors"), "--finetuned", f"[{path}]", *arguments]
    assert main(run) == 2
    assert "a.safetensors: the task 'a' was fine-tuned from another base than" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_a_base_in_another_precision_has_the_same_hash(tmp_path):
    rounded = {name: value.bfloat16() for name, value in make_backbone().state_dict().items()}
    save_checkpoint(tmp_path / "base.safetensors", rounded)

    def module():
        made = make_backbone()
        made.load_state_dict({name: value.float() for name, value in rounded.items()})
        return Plain(made)

    fit(tmp_path, [TaskCheckpoint(str(tmp_path / "a.safetensors"), task="a")], module())
    merger = MergeAtFitEnd(
        WeightAverage(),
        [str(tmp_path / "a.safetensors")],
        str(tmp_path / "m.safetensors"),
        base=str(tmp_path / "base.safetensors"),
    )
    fit(tmp_path, [merger], module(), feature=1)
    assert merger.merged_path.exists()


def test_best_weights_and_their_score(tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, monitor="quality", mode="max")
    keep = TaskCheckpoint(str(tmp_path / "a.safetensors"), task="a", weights="best")
    fit(tmp_path, [keep, best], Validated(), val=True, epochs=3, enable_checkpointing=True)
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    kept = load_checkpoint(keep.saved_path)
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert read_record(keep.saved_path).metrics == {"quality": 0.0}


def test_a_resumed_fit_keeps_its_record(tmp_path):
    vector = str(tmp_path / "vector.safetensors")
    callbacks = [
        TaskCheckpoint(vector, task="a", save="task_vector"),
        TaskCheckpoint(str(tmp_path / "weights.safetensors"), task="a"),
        ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True),
    ]
    module = Plain()

    def stop():
        if module.current_epoch == 1:
            raise KeyError("power cut")

    module.on_train_epoch_start = stop
    with pytest.raises(KeyError, match="power cut"):
        fit(tmp_path, callbacks, module, enable_checkpointing=True)
    again = [
        TaskCheckpoint(vector, task="a", save="task_vector"),
        TaskCheckpoint(str(tmp_path / "weights.safetensors"), task="a"),
    ]
    module = fit(tmp_path, again, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    start = make_backbone().state_dict()
    for callback in again:
        assert read_record(callback.saved_path).base_hash == hash_tensors(start)
    saved = load_file(vector)
    for name, value in weights_of(module).items():
        assert torch.equal(saved[f"backbone.{name}.task_vector"], value - start[name])


def test_fast_dev_run_writes_nothing(tmp_path):
    keep = TaskCheckpoint(str(tmp_path / "a.safetensors"), task="a")
    fit(tmp_path, [keep], fast_dev_run=True)
    assert keep.saved_path is None
    assert not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save": "delta"}, "'weights' or 'task_vector'"),
        ({"weights": "first"}, "'last' or 'best'"),
        ({"weights": "best"}, "TaskCheckpoint: weights='best' needs a ModelCheckpoint"),
        ({"output": "a.ckpt"}, "must be a .safetensors file"),
        ({"output": "{}/other.safetensors"}, "exists already"),
        ({"base": "{}/base.safetensors"}, "does not exist"),
        ({"dtype": "half-precision"}, "no dtype"),
        ({"backbone": "body"}, "no submodule 'body'"),
        ({"head": "classifier"}, "attribute that holds the head with head="),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, other, change, message):
    arguments = {"output": "{}/a.safetensors", "task": "a", **change}
    arguments = {name: value.replace("{}", str(tmp_path)) for name, value in arguments.items()}
    module = Plain()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [TaskCheckpoint(**arguments)], module)


def test_metadata_are_plain_json_and_other_files_have_none(tmp_path, other):
    keep = TaskCheckpoint(str(tmp_path / "a.safetensors"), task="a")
    fit(tmp_path, [keep])
    from safetensors import safe_open

    with safe_open(keep.saved_path, "pt") as file:
        metadata = file.metadata()
    assert metadata["kind"] == "freemerge-task-1"
    assert json.loads(metadata["metrics"]) == {}
    assert read_record(other) is None
    assert read_record(tmp_path) is None
    assert math.prod(open_checkpoint(keep.saved_path).spec("head.weight").shape) == 16
