"""What is wrong with a configuration is one line, with the right name where one is close."""

import copy
from pathlib import Path

import pytest
import yaml

from freemerge.cli import main
from freemerge.cli.merge import build_parser
from freemerge.cli.problems import Problems, innermost

ROOT = Path(__file__).parent.parent.parent
TINY = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())


def fails(capsys, arguments: list[str]) -> str:
    """The one line that a command fails with."""
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(arguments))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modle", "x"], "there is no option '--modle'; did you mean '--model'?"),
        (["--trainer.max_epoch", "3"], "no option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'?"),
        (["--experts.densty=0.1"], "there is no option '--experts.densty'; did you mean '--experts.density'?"),
        (["--run.stage", "[merge]"], "there is no option '--run.stage'; did you mean '--run.stages'?"),
        (["--model.hed", "linear"], "model: FineTuner has no parameter 'hed'; did you mean 'head'?"),
        (["--model.backbone.poling", "cls"], "TransformersBackbone has no parameter 'poling'; did you mean 'pooling'?"),
        (["--model", "FineTunr"], "model: there is no class 'FineTunr'; did you mean 'FineTuner'?"),
        (["--model", "torch.optim.SGD"], "model: torch.optim.SGD is not a FineTuner"),
        (["--data", "tests.tiny.TinySuit"], "data: the module tests.tiny has no 'TinySuit'; did you mean 'TinySuite'?"),
        (["--data", "nowhere.TinySuite"], "data: there is no module 'nowhere'; is it misspelt"),
        (["--trainer.callbacks+=MergeAtFitEn"], "there is no class 'MergeAtFitEn'; did you mean 'MergeAtFitEnd'?"),
        (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected int or null, got 'many'"),
        (["--experts.density", "much"], "experts.density: expected float, got 'much'"),
        (["--finetune.weights", "lst"], "weights: expected one of last, best, got 'lst'; did you mean 'last'?"),
        (["--router.fraction=0"], "router.fraction: must be in (0, 1], got 0"),
        (["--router.hidden=-1"], "router.hidden: must be at least 0, got -1"),
        (["--router.directions=-3"], "router.directions: must be at least 0, got -3"),
        (["bars"], "unexpected argument 'bars'; options begin with --"),
        (["--merge.free"], "--merge.free needs a value"),
        (["--run.stages", "merge", "evalute"], "run.stages[1]: expected one of pretrain, finetune, merge, experts"),
        (["--experts.kind", "lowrank"], "got 'lowrank'; did you mean 'low_rank'?"),
        (["--experts.schedule", "cosin"], "got 'cosin'; did you mean 'cosine'?"),
        (["--trainer.callbacks+=EarlyStopping"], "trainer.callbacks: EarlyStopping needs monitor"),
        (["--finetune.trainer", "{max_epoch: 3}"], "'finetune.trainer.max_epoch'; did you mean 'finetune.trainer.max"),
        (["--tune.space", "{scale: {lo: 1, high: 2}}"], "tune.space.scale: Range has no parameter 'lo'; did you mean"),
        (["--tune.space", "{scale: 3}"], "tune.space.scale: expected Range, got '3'"),
        # Classes that refuse their arguments
        (["--model.warmup=3"], "of the steps, in [0, 1], got 3.0"),
        (["--merge.methods", "{a: {class_path: Ties, init_args: {density: 7}}}"], "must lie in (0, 1], got 7.0"),
        (["--data.tasks", "[nope]"], "TinySuite has no task 'nope'"),
        (["--model.backbone.config.hidden_size", "x"], "'hidden_size' expected int, got str"),
        (["--config", "nowhere.yaml"], "config: there is no file nowhere.yaml"),
    ],
)  # fmt: skip
def test_on_the_command_line(options: list[str], message: str, capsys) -> None:
    assert message in fails(capsys, ["fit", "--config", str(ROOT / "tests" / "tiny.yaml"), *options])


def _edit(config: dict, path: str, value: object) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modle", 1, "there is no key 'modle'; did you mean 'model'?"),
        ("trainer/max_epoch", 1, "there is no key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        ("experts/densty", 1, "there is no key 'experts.densty'; did you mean 'experts.density'?"),
        ("model/init_args/lrr", 1, "model: FineTuner has no parameter 'lrr'; it has backbone, "),
        ("model/init_args/backbone/init_args/poolin", "x", "TransformersBackbone has no parameter 'poolin'; did you"),
        ("model/init_args/backbone/class_path", "TransformerBackbone", "did you mean 'TransformersBackbone'?"),
        ("model/init_args/optimizer/init_args/lrr", 1, "model.optimizer: AdamW has no parameter 'lrr'; did you"),
        ("experts/optimizer/init_args/lrr", 1, "experts.optimizer: Adam has no parameter 'lrr'; did you mean 'lr'?"),
        ("model/class_path", "FineTunr", "model: there is no class 'FineTunr'; did you mean 'FineTuner'?"),
        ("model/init_arg", {}, "not by 'init_arg'; did you mean 'init_args'?"),
        ("merge/methods", {"x": {"class_path": "pcb-merging"}}, "no class 'pcb-merging'; did you mean 'PCBMerging'?"),
        ("merge/methods", {"x": {"class_path": "Ties", "init_args": {"densty": 1}}}, "did you mean 'density'?"),
        ("merge/scales", ["a", 1], "merge.scales[0]: expected float, got 'a'"),
        ("router", 3, "wrong.yaml: router: expected a mapping of its options, got '3'"),
        ("router", None, "wrong.yaml: router: expected a mapping of its options, got 'null'"),
        ("trainer/callbacks", [{"class_path": "ModelCheckpoint", "init_args": {"monitr": "x"}}], "mean 'monitor'?"),
    ],
)  # fmt: skip
def test_in_a_file(path: str, value: object, message: str, capsys, tmp_path) -> None:
    config = copy.deepcopy(TINY)
    _edit(config, path, value)
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(config))
    assert message in fails(capsys, ["fit", "--config", str(file)])


def test_a_file_with_invalid_yaml_is_named(capsys, tmp_path) -> None:
    (tmp_path / "wrong.yaml").write_text("a: [1\nb: 2")
    for arguments in (["-c", str(tmp_path / "wrong.yaml")], [f"--config={tmp_path / 'wrong.yaml'}"]):
        assert f"{tmp_path / 'wrong.yaml'}: is not valid YAML: " in fails(capsys, ["fit", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a command: fit, validate, test, predict"),
        (["fitt"], "there is no command 'fitt'; did you mean 'fit'?"),
        (["fit"], "missing: data, model; give them as --data … or in a --config file"),
        (["merge", "--base", "a"], "missing: finetuned, method, output; give them as --finetuned … or in a --config"),
        (["merge", "--bas", "a"], "there is no option '--bas'; did you mean '--base'?"),
        (["merge", "--method", "FRMergin"], "method: there is no class 'FRMergin'; did you mean 'FRMerging'?"),
        (["merge", "--method", "Ties", "--method.densty", "1"], "method: Ties has no parameter 'densty'; did you mean"),
        (["merge", "--method", "PCBMerging", "--method.filter", "Gausian"], "'Gausian'; did you mean 'Gaussian'?"),
        (["merge", "--method", "PCBMerging", "--method.inter", "summ"], "got 'summ'; did you mean 'sum'?"),
        (["merge", "--method", "PCBMerging", "--method.ratio", "x"], "method.ratio: expected float, got 'x'"),
        (["merge", "--method", "Dare", "--base", "a", "--finetuned", "[b]", "--output", "c"], "Dare needs method"),
        (["merge", "--finetuned", "3"], "finetuned: expected "),
        (["merge", "--dtype"], "--dtype needs a value"),
        (["merge", "--shard_size", "--base", "a"], "--shard_size needs a value"),
        (["merge", "--config", "no.yaml"], "config: there is no file no.yaml"),
        (["merge", "--method", "dare_ties"], "did you mean --method Dare --method.method Ties?"),
    ],
)  # fmt: skip
def test_of_commands_and_methods(arguments: list[str], message: str, capsys) -> None:
    assert message in fails(capsys, arguments)


def test_a_wrong_value_in_the_environment_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FREEMERGE_MERGE__EMBEDDINGS", "bse")
    arguments = ["merge", "--base", "a", "--finetuned", "b", "--method", "Ties", "--output", "c"]
    assert "embeddings: expected one of error, base, common, got 'bse'; did you mean 'base'?" in fails(
        capsys, arguments
    )


def test_an_error_that_is_not_found_in_the_options_is_its_innermost_message() -> None:
    problems = Problems(build_parser(), [])
    problems.required = []
    wrapper = TypeError("wrapped")
    wrapper.__cause__ = ValueError("the cause\n  in two lines")
    assert problems.explain(wrapper) == "the cause in two lines"
    assert problems.explain("two\n  lines") == "two lines"
    assert len(innermost("x" * 999)) == 300


def test_an_error_in_third_party_code_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr("freemerge.cli.suite.FreemergeCLI", lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):  # int is called from here, not from freemerge
        main(["fit"])
