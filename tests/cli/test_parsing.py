"""Where settings come from: environment, layered files, options; and whose arguments a class gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli import main
from freemerge.cli.merge import build_parser
from freemerge.merging import FRMerging, PCBMerging, TaskArithmetic

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'callbacks'}"}


def settings(capsys, arguments: list[str]) -> dict:
    """What a command would run with."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "tune"])
def test_the_environment_sets_options_of_every_command(command, monkeypatch, capsys) -> None:
    prefix = f"FREEMERGE_{command.upper()}__"
    monkeypatch.setenv(f"{prefix}TRAINER__MAX_TIME", "00:01:00:00")
    monkeypatch.setenv(f"{prefix}EXPERTS__DENSITY", "0.5")
    monkeypatch.setenv(f"{prefix}RUN__STAGES", "[merge, evaluate]")
    config = settings(capsys, [command, "--config", TINY])
    assert config["trainer"]["max_time"] == "00:01:00:00"
    assert config["run"]["stages"] == ["merge", "evaluate"]
    assert config["experts"]["density"] == 0.05  # a file counts more
    assert settings(capsys, [command, "--config", TINY, "--run.stages", "[merge]"])["run"]["stages"] == ["merge"]


def test_the_environment_can_name_the_file_and_the_classes(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FREEMERGE_FIT__CONFIG", TINY)
    assert settings(capsys, ["fit"])["data"]["class_path"] == "tests.tiny.TinySuite"


def test_the_environment_of_merge(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FREEMERGE_MERGE__BASE", "base")
    monkeypatch.setenv("FREEMERGE_MERGE__FINETUNED", "[a, b]")
    monkeypatch.setenv("FREEMERGE_MERGE__METHOD", "Ties")
    config = settings(capsys, ["merge", "--output", "c", "--base", "mine"])
    assert (config["base"], config["finetuned"]) == ("mine", ["a", "b"])
    assert config["method"]["class_path"] == "freemerge.merging.Ties"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("FREEMERGE_FIT__TRAINER__MAX_EPOCH", ["validate", "--config", TINY], None),  # another command's own affair
        (
            "FREEMERGE_FIT__TRAINER__MAX_EPOCH",
            ["fit", "--config", TINY, "--run.stages", "[]"],
            "did you mean 'FREEMERGE_FIT__TRAINER__MAX_EPOCHS'?",
        ),
        (
            "FREEMERGE_MERGE__BASIS",
            ["merge", "--base", "a", "--finetuned", "[b]", "--method", "Ties", "--output", "c"],
            "FREEMERGE_MERGE__BASIS names no option",
        ),
    ],
)
def test_a_misspelt_variable_is_an_error(name, arguments, message, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(arguments))
    assert stop.value.code == 2
    assert (message or "no freemerge.json") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_replaces_another_inherits_none_of_its_arguments(tmp_path, capsys) -> None:
    """AdamW's learning rate of one file is not the one that SGD of the next should get."""
    first = write(tmp_path / "a.yaml", "experts: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.5}}}")
    second = write(tmp_path / "b.yaml", "experts: {optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 1}}}")
    base = ["fit", "--config", TINY]
    own = settings(capsys, [*base, "--config", second])["experts"]["optimizer"]
    assert settings(capsys, [*base, "--config", first, "--config", second])["experts"]["optimizer"] == own
    assert own["init_args"]["momentum"] == 1
    assert own["init_args"]["lr"] == 0.001  # SGD's own default
    chosen = settings(capsys, [*base, "--config", first, "--experts.optimizer", "torch.optim.SGD"])
    assert chosen["experts"]["optimizer"]["init_args"]["lr"] == 0.001
    same = settings(capsys, [*base, "--config", first, "--experts.optimizer", "Adam"])  # by another name: no change
    assert same["experts"]["optimizer"]["init_args"]["lr"] == 0.5


def test_a_nested_class_that_replaces_another_inherits_no_arguments(tmp_path, capsys) -> None:
    layer = write(
        tmp_path / "a.yaml",
        "model: {class_path: FineTuner, init_args: {optimizer: {class_path: SGD, init_args: {momentum: 0.9}}}}",
    )
    config = settings(capsys, ["fit", "--config", TINY, "--config", layer])
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.001
    assert config["model"]["init_args"]["backbone"]["init_args"]["pooling"] == "mean"  # the same class: kept


def test_a_method_that_replaces_another_inherits_no_arguments(tmp_path) -> None:
    text = "{base: a, finetuned: [b], output: c, method: {class_path: PCBMerging, init_args: {scale: 5.0}}}"
    file = write(tmp_path / "m.yaml", text)
    parser = build_parser()
    for options, expected in (
        (["--method", "FRMerging"], FRMerging()),
        (["--method", "PCBMerging", "--method.ratio", "0.5"], PCBMerging(0.5, 5.0)),
        (["--method", "TaskArithmetic", "--method.scale", "2"], TaskArithmetic(2.0)),
    ):
        assert parser.instantiate_classes(parser.parse_args(["--config", file, *options])).method == expected


def test_a_user_defined_method_is_given_by_its_import_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = '''
from dataclasses import dataclass

from freemerge.merging import MergeMethod


@dataclass(frozen=True)
class Median(MergeMethod):
    """The median of the task vectors, entry by entry.

    Args:
        scale: multiplies the result.
    """

    scale: float = 1.0

    def combine(self, name, deltas, statistics):
        return deltas.median(0).values * self.scale
'''
    (tmp_path / "methods_of_my_own.py").write_text(source)
    base = {"weight": torch.zeros(2, 2)}
    save_checkpoint("base.safetensors", base)
    for value in (1.0, 2.0, 6.0):
        save_checkpoint(f"{value:g}.safetensors", {"weight": torch.full((2, 2), value)})
    finetuned = "[1.safetensors, 2.safetensors, 6.safetensors]"
    arguments = ["merge", "--base", "base.safetensors", "--finetuned", finetuned, "--output", "m.safetensors"]
    assert main([*arguments, "--method", "methods_of_my_own.Median", "--method.scale", "0.5"]) == 0
    assert torch.equal(load_checkpoint("m.safetensors")["weight"], torch.full((2, 2), 1.0))


def test_overrides_on_the_command_line_and_in_a_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint("base.safetensors", {"a.weight": torch.zeros(4), "b.weight": torch.zeros(4)})
    save_checkpoint("one.safetensors", {"a.weight": torch.ones(4), "b.weight": torch.ones(4)})
    arguments = [
        "merge",
        "--base",
        "base.safetensors",
        "--finetuned",
        "[one.safetensors]",
        "--method",
        "TaskArithmetic",
    ]
    overrides = "[{match: 'b.*', scale: 0.25}]"
    assert main([*arguments, "--overrides", overrides, "--output", "1.safetensors"]) == 0
    write(tmp_path / "m.yaml", f"overrides: {overrides}")
    assert main([*arguments, "--config", "m.yaml", "--output", "2.safetensors", "--method.scale", "1"]) == 0
    for name, a in (("1", 0.3), ("2", 1.0)):
        merged = load_checkpoint(f"{name}.safetensors")
        torch.testing.assert_close(merged["a.weight"], torch.full((4,), a))
        torch.testing.assert_close(merged["b.weight"], torch.full((4,), 0.25))
    for wrong, message in (
        ("[{match: b, scal: 1}]", "overrides[0]: TaskArithmetic has no parameter 'scal'; did you mean 'scale'?"),
        ("[{scale: 1}]", "overrides[0]: needs a pattern of tensor names, match: '*.mlp.*'"),
        (
            "[{match: 'c.*', scale: 1}]",
            "overrides: the pattern 'c.*' matches no tensor that is left by earlier patterns",
        ),
    ):
        capsys.readouterr()
        assert main([*arguments, "--overrides", wrong, "--output", "3.safetensors"]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "3.safetensors").exists()


def test_an_override_can_choose_another_filter(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    save_checkpoint("base.safetensors", {"a": torch.zeros(8, 8), "b": torch.zeros(8, 8)})
    save_checkpoint("one.safetensors", {name: torch.randn(8, 8, generator=generator) for name in "ab"})
    arguments = ["merge", "--base", "base.safetensors", "--finetuned", "[one.safetensors]", "--method", "FRMerging"]
    overrides = "[{match: b, filter: {class_path: HighPass, init_args: {cutoff: 0.0}}}]"  # which lets all pass
    assert main([*arguments, "--overrides", overrides, "--output", "m.safetensors"]) == 0
    merged, one = load_checkpoint("m.safetensors"), load_checkpoint("one.safetensors")
    torch.testing.assert_close(merged["b"], one["b"])
    assert not torch.allclose(merged["a"], one["a"])


def test_every_method_is_in_the_help_of_merge_with_one_line(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    out = capsys.readouterr().out
    lines = out[out.index("\nmethods:") : out.index("\nexample:")].splitlines()
    for name in ("FRMerging", "PCBMerging", "Ties", "Dare", "TSVMerge", "IsoC", "IsoCTS", "ACEMerging", "PerPattern"):
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert not any(line.split()[:1] == ["MatrixMethod"] for line in lines)  # nothing to merge with
    assert max(map(len, out[: out.index("\nmethods:")].splitlines())) <= 120
    assert "ENV:" not in out


def test_the_help_of_fit_has_a_group_for_each_part(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m freemerge fit --config FILE [options]\n\nFine-tune on every task")
    for title in ("The run's folder, its stages", "The stage that merges", "The stage that trains the router"):
        assert f"\n{title}" in out
    assert "FREEMERGE_FIT__TRAINER__MAX_EPOCHS=3" in out


def test_a_merge_by_two_processes_writes_the_same_file_and_one_line(tmp_path) -> None:
    """torchrun starts two processes."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {f"{layer}.weight": torch.randn(16, 16, generator=generator) for layer in range(4)}
        save_checkpoint(tmp_path / f"{name}.safetensors", tensors)
    arguments = ["merge", "--base", "base.safetensors", "--finetuned", "[a.safetensors, b.safetensors]"]
    arguments += ["--method", "PCBMerging", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    one, two = (
        subprocess.run([*start, "freemerge", *arguments, name], cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
        for start, name in (([sys.executable, "-m"], "one.safetensors"), (torchrun, "two.safetensors"))
    )
    assert (one.returncode, one.stdout) == (0, b"merged into one.safetensors\n"), one.stderr
    assert (two.returncode, two.stdout) == (0, b"merged into two.safetensors\n"), two.stderr
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_the_bar_of_a_merge_goes_to_a_terminal_only(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a"):
        save_checkpoint(f"{name}.safetensors", {"weight": torch.ones(3)})
    arguments = ["merge", "--base", "base.safetensors", "--finetuned", "[a.safetensors]", "--method", "WeightAverage"]
    assert main([*arguments, "--output", "1.safetensors"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main([*arguments, "--output", "2.safetensors", "--resume", "true", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "merged into 2.safetensors\n"
