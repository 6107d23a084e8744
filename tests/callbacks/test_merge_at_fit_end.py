"""MergeAtFitEnd in plain Lightning projects, single process."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from freemerge.checkpoints import hash_tensors, load_checkpoint, save_checkpoint
from freemerge.merging import FRMerging, PCBMerging, TaskArithmetic, WeightAverage
from freemerge_callbacks import MergeAtFitEnd
from tests.callbacks.callbacks_project import Nested, Plain, Validated, make_backbone, make_loader, make_trainer


def fit(folder, callback, module=None, *more, val=False, ckpt_path=None, **arguments):
    module = module or Plain()
    loaders = (make_loader(0), make_loader(0)) if val else (make_loader(0),)
    make_trainer(folder, callback, *more, **arguments).fit(module, *loaders, ckpt_path=ckpt_path)
    return module


def expected_mean(trained, other):
    base = make_backbone().state_dict()
    other = load_checkpoint(other)
    return {name: base[name] + ((trained[name] - base[name]) * 0.5 + (other[name] - base[name]) * 0.5) for name in base}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_initial_weights_are_the_base(tmp_path, other):
    merge = MergeAtFitEnd(WeightAverage(), others=[str(other)], output=str(tmp_path / "merged.safetensors"))
    module = fit(tmp_path, merge)
    assert merge.merged_path == tmp_path / "merged.safetensors"
    trained = {name: value.detach() for name, value in module.backbone.state_dict().items()}
    assert not torch.equal(trained["0.weight"], make_backbone()[0].weight)
    assert_equal(load_checkpoint(merge.merged_path), expected_mean(trained, other))
    assert not merge.base.kept.exists()


def test_a_given_base_and_a_dotted_backbone(tmp_path, other):
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    merge = MergeAtFitEnd(
        WeightAverage(),
        others=[str(other)],
        output=str(tmp_path / "merged.safetensors"),
        base=str(tmp_path / "base.safetensors"),
        backbone="model.encoder",
    )
    module = fit(tmp_path, merge, Nested())
    assert_equal(load_checkpoint(merge.merged_path), expected_mean(module.model["encoder"].state_dict(), other))
    assert (tmp_path / "base.safetensors").exists()


def test_the_module_itself_with_an_excluded_head(tmp_path):
    torch.save({"state_dict": Plain().state_dict()}, tmp_path / "other.ckpt")
    merge = MergeAtFitEnd(
        WeightAverage(),
        others=[str(tmp_path / "other.ckpt")],
        output=str(tmp_path / "merged.safetensors"),
        backbone="",
        exclude=["head.*"],
        dtype="float16",
    )
    module = fit(tmp_path, merge)
    merged = load_checkpoint(merge.merged_path)
    start = Plain().state_dict()
    middle = start["backbone.0.weight"] + 0.5 * (module.backbone[0].weight.detach() - start["backbone.0.weight"])
    assert merged.keys() == start.keys()
    assert torch.equal(merged["head.weight"], start["head.weight"].half())
    torch.testing.assert_close(merged["backbone.0.weight"].float(), middle, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", [TaskArithmetic(scale=[1.0, 0.0]), FRMerging(), PCBMerging()])
def test_this_fit_is_the_first_model_of_the_method(tmp_path, other, method):
    merge = MergeAtFitEnd(method, others=[str(other)], output=str(tmp_path / "merged.safetensors"))
    module = fit(tmp_path, merge)
    merged = load_checkpoint(merge.merged_path)
    assert all(bool(torch.isfinite(value).all()) for value in merged.values())
    if isinstance(method, TaskArithmetic):
        assert_equal(merged, {name: value.detach() for name, value in module.backbone.state_dict().items()})


def test_last_and_best(tmp_path, other):
    merged = {}
    for weights in ("last", "best"):
        output = tmp_path / f"{weights}.safetensors"
        merge = MergeAtFitEnd(TaskArithmetic(scale=[1.0, 0.0]), [str(other)], str(output), weights=weights)
        best = ModelCheckpoint(dirpath=tmp_path / weights, monitor="quality", mode="max")
        module = fit(tmp_path, merge, Validated(), best, val=True, epochs=3, enable_checkpointing=True)
        merged[weights] = load_checkpoint(output)
    assert_equal(merged["last"], {name: value.detach() for name, value in module.backbone.state_dict().items()})
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] == 0
    wanted = {name: saved["state_dict"][f"backbone.{name}"] for name in merged["best"]}
    assert_equal(merged["best"], wanted)
    assert (merged["best"]["0.weight"] - merged["last"]["0.weight"]).abs().max() > 1e-4


def test_best_needs_a_monitor(tmp_path, other):
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"), weights="best")
    with pytest.raises(ValueError, match="needs a ModelCheckpoint with a `monitor`"):
        fit(tmp_path, merge, None, ModelCheckpoint(dirpath=tmp_path), enable_checkpointing=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"others": ["{}/nothing.safetensors"]}, "does not exist and matches nothing"),
        ({"others": ["{}/no/*.safetensors"]}, "matches nothing"),
        ({"others": []}, "`others` is empty"),
        ({"others": "other.safetensors"}, "takes a list"),
        ({"others": ["{}/base.safetensors"]}, "the merge's own base"),
        ({"base": "{}/nobase.safetensors"}, "does not exist"),
        ({"output": "{}/merged.ckpt"}, "must be a .safetensors file"),
        ({"output": "{}/other.safetensors"}, "exists already"),
        ({"weights": "first"}, "'last' or 'best'"),
        ({"dtype": "float17"}, "no dtype 'float17'"),
        ({"include": ["re:("]}, "not a valid regular expression"),
        ({"method": TaskArithmetic(scale=[1.0, 1.0, 1.0])}, "3 values in `scale` for 2"),
        ({"backbone": "body"}, "no submodule 'body'.*backbone, head"),
        ({"exclude": ["encoder.*"]}, "'encoder.\\*' matches no tensor"),
        ({"backbone": ""}, "'backbone.0.weight'"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, other, change, message):
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    arguments = {
        "method": WeightAverage(),
        "others": [str(other)],
        "output": "{}/merged.safetensors",
        "base": "{}/base.safetensors",
        **change,
    }
    if change.get("backbone") == "":
        arguments["base"] = None

    def fill(value):
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value.replace("{}", str(tmp_path)) if isinstance(value, str) else value

    module = Plain()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, MergeAtFitEnd(**{key: fill(value) for key, value in arguments.items()}), module)
    assert not (tmp_path / "merged.safetensors").exists()


def test_others_with_other_shapes_are_refused_before_training(tmp_path):
    tensors = make_backbone().state_dict()
    tensors["2.weight"] = torch.zeros(8, 4)
    save_checkpoint(tmp_path / "odd.safetensors", tensors)
    module = Plain()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(
        ValueError, match=r"odd.safetensors: the tensor '2.weight' has shape \[8, 4\], expected \[8, 8\]"
    ):
        fit(
            tmp_path,
            MergeAtFitEnd(WeightAverage(), [str(tmp_path / "odd.safetensors")], str(tmp_path / "m.safetensors")),
            module,
        )


def test_a_glob_skips_the_merges_own_files(tmp_path, other):
    pattern = str(tmp_path / "*.safetensors")
    for _ in range(2):  # the second time, the output of the first is there
        merge = MergeAtFitEnd(WeightAverage(), [pattern, str(other)], str(tmp_path / "m.safetensors"), overwrite=True)
        module = fit(tmp_path, merge)
        assert_equal(load_checkpoint(merge.merged_path), expected_mean(module.backbone.state_dict(), other))


def test_fast_dev_run_merges_nothing(tmp_path):
    merge = MergeAtFitEnd(WeightAverage(), ["nowhere.safetensors"], str(tmp_path / "m.safetensors"))
    fit(tmp_path, merge, fast_dev_run=True)
    assert merge.merged_path is None
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_compiled_backbone_keeps_its_names(tmp_path, other):
    module = Plain(torch.compile(make_backbone(), backend="eager"))
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"))
    fit(tmp_path, merge, module)
    assert_equal(load_checkpoint(merge.merged_path), expected_mean(module.backbone._orig_mod.state_dict(), other))


class Stop(Exception):
    pass


def interrupted(folder, other, base=None):
    """Fit, stopped by an error in the second epoch; returns a checkpoint after the first."""
    module = Plain()
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(folder / "m.safetensors"), base=base)
    checkpoint = ModelCheckpoint(dirpath=folder / "ckpt", save_last=True)

    def stop():
        if module.current_epoch == 1:
            raise Stop

    module.on_train_epoch_start = stop
    with pytest.raises(Stop):
        fit(folder, merge, module, checkpoint, enable_checkpointing=True)
    return folder / "ckpt" / "last.ckpt", merge


def test_a_resumed_fit_keeps_its_base(tmp_path, other):
    whole = fit(tmp_path, MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "whole.safetensors")))
    last, first = interrupted(tmp_path, other)
    assert first.base.kept.exists()
    assert torch.load(last, weights_only=True)["callbacks"][first.state_key] == first.state_dict()
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"))
    fit(tmp_path, merge, ckpt_path=last)
    assert_equal(load_checkpoint(merge.merged_path), load_checkpoint(tmp_path / "whole.safetensors"))
    assert_equal(load_checkpoint(merge.merged_path), expected_mean(whole.backbone.state_dict(), other))
    assert not merge.base.kept.exists()


def test_a_resumed_fit_without_its_base_is_refused(tmp_path, other):
    last, first = interrupted(tmp_path, other)
    save_checkpoint(first.base.kept, {name: value + 1 for name, value in load_checkpoint(first.base.kept).items()})
    with pytest.raises(ValueError, match="does not hold the fit's initial weights"):
        fit(tmp_path, MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors")), ckpt_path=last)
    first.base.kept.unlink()
    with pytest.raises(
        ValueError, match="is missing: it held the fit's initial weights; pass the pretrained model as base="
    ):
        fit(tmp_path, MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors")), ckpt_path=last)
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    merge = MergeAtFitEnd(
        WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"), base=str(tmp_path / "base.safetensors")
    )
    module = fit(tmp_path, merge, ckpt_path=last)
    assert_equal(load_checkpoint(merge.merged_path), expected_mean(module.backbone.state_dict(), other))


def test_a_finished_fit_that_is_resumed(tmp_path, other):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    first = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"))
    module = fit(tmp_path, first, None, checkpoint, enable_checkpointing=True)
    last = tmp_path / "ckpt" / "last.ckpt"
    again = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "n.safetensors"))
    again._generate_state_key = lambda **_: first.state_key
    with pytest.raises(
        ValueError, match="is missing: it held the fit's initial weights; pass the pretrained model as base="
    ):
        fit(tmp_path, again, ckpt_path=last)
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    base = str(tmp_path / "base.safetensors")
    again = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "n.safetensors"), base=base)
    fit(tmp_path, again, ckpt_path=last)
    assert_equal(load_checkpoint(again.merged_path), expected_mean(module.backbone.state_dict(), other))


def test_a_resumed_fit_that_began_without_the_callback_is_refused(tmp_path, other):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    fit(tmp_path, checkpoint, epochs=1, enable_checkpointing=True)
    with pytest.raises(ValueError, match="saved without this callback"):
        fit(
            tmp_path,
            MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors")),
            ckpt_path=tmp_path / "ckpt" / "last.ckpt",
        )


def test_the_state_is_small_and_is_restored(tmp_path):
    merge = MergeAtFitEnd(WeightAverage(), ["a"], str(tmp_path / "m.safetensors"))
    merge.base.hash = "abc"
    again = MergeAtFitEnd(WeightAverage(), ["a"], str(tmp_path / "m.safetensors"))
    again.load_state_dict(merge.state_dict())
    assert again.state_dict() == merge.state_dict() == {"base_hash": "abc"}
    assert again.state_key == merge.state_key
    assert merge.state_key != MergeAtFitEnd(WeightAverage(), ["a"], "n.safetensors").state_key


def test_zero_3_is_refused(tmp_path, other):
    zero3 = object.__new__(DeepSpeedStrategy)
    zero3.config = {"zero_optimization": {"stage": 3}}
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match=r"ZeRO-3.*stage 2.*zero_to_fp32"):
        merge.setup(SimpleNamespace(strategy=zero3, fast_dev_run=False), Plain(), "fit")


def test_the_number_of_models_and_the_time_are_logged(tmp_path, other):
    from lightning.pytorch.loggers import CSVLogger

    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "m.safetensors"))
    fit(tmp_path, merge, logger=CSVLogger(tmp_path, name=None, version="logs"))
    header, *_, last = (tmp_path / "logs" / "metrics.csv").read_text().split()
    logged = dict(zip(header.split(","), last.split(","), strict=True))
    assert float(logged["merge/models"]) == 2
    assert 0 < float(logged["merge/seconds"]) < 60


def test_the_report_records_the_origin_of_the_merge(tmp_path, other):
    merge = MergeAtFitEnd(TaskArithmetic(scale=0.5), [str(other)], str(tmp_path / "m.safetensors"), dtype="bfloat16")
    assert merge.report == {}
    module = fit(tmp_path, merge)
    report = merge.report
    assert report["method"] == {"class_path": "freemerge.merging.TaskArithmetic", "init_args": {"scale": 0.5}}
    assert report["base"]["hash"] == hash_tensors(make_backbone().state_dict())
    assert [model["hash"] for model in report["finetuned"]] == [
        hash_tensors(module.backbone.state_dict()), hash_tensors(load_checkpoint(other)),
    ]  # fmt: skip
    assert report["hash"] == hash_tensors(load_checkpoint(merge.merged_path))
    assert report["tensors"] == {"merged": 4, "kept": [], "tied": {}}
    assert (report["dtype"], report["weights"], report["output"]) == ("bfloat16", "last", str(merge.merged_path))
    assert report["ranks"] == 1
    assert 0 < report["seconds"] < 60
    json.dumps(report)
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], str(tmp_path / "n.safetensors"), hash_inputs=False)
    fit(tmp_path, merge)
    assert merge.report["hash"] is merge.report["base"]["hash"] is None


def test_a_folder_for_hugging_face(tmp_path, other):
    """With the configuration of the base's folder, and freemerge.json as the report."""
    base = tmp_path / "base"
    save_checkpoint(base / "model.safetensors", make_backbone().state_dict())
    (base / "config.json").write_text('{"model_type": "tiny"}')
    output = str(tmp_path / "merged-1.5")
    merge = MergeAtFitEnd(WeightAverage(), [str(other)], output, base=str(base))
    module = fit(tmp_path, merge)
    assert_equal(load_checkpoint(merge.merged_path), expected_mean(module.backbone.state_dict(), other))
    assert sorted(path.name for path in merge.merged_path.iterdir()) == [
        "README.md", "config.json", "freemerge.json", "model.safetensors",
    ]  # fmt: skip
    record = json.loads((merge.merged_path / "freemerge.json").read_text())
    assert {key: merge.report[key] for key in record} == record
    assert merge.report["hash"] == hash_tensors(load_checkpoint(output))
    with pytest.raises(ValueError, match="exists already"):
        fit(tmp_path, MergeAtFitEnd(WeightAverage(), [str(other)], output, base=str(base)))
