"""`python -m freemerge merge`: YAML and command line, errors in one line."""

import subprocess
import sys

import pytest
import torch
import yaml

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli.merge import build_parser
from freemerge.cli.run_merge import run
from freemerge.merging import Dare, FRMerging, Gaussian, HighPass, PCBMerging, PerPattern, Ties, WeightAverage, merge


@pytest.fixture
def files(tmp_path, base, models):
    paths = {"base": str(tmp_path / "base.safetensors"), "output": str(tmp_path / "out.safetensors")}
    save_checkpoint(paths["base"], base)
    for index, model in enumerate(models):
        paths[str(index)] = str(tmp_path / f"{index}.safetensors")
        save_checkpoint(paths[str(index)], model)
    return paths


def arguments(files, method):
    finetuned = f"[{files['0']}, {files['1']}, {files['2']}]"
    return ["--base", files["base"], "--finetuned", finetuned, "--output", files["output"], "--method", *method]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (["WeightAverage"], WeightAverage()),
        (["FRMerging", "--method.scale", "0.7"], FRMerging(scale=0.7)),
        (["FRMerging", "--method.coefficients", "[1, 2, 3]"], FRMerging(coefficients=[1.0, 2.0, 3.0])),
        (
            ["PCBMerging", "--method.filter", "HighPass", "--method.filter.cutoff", "0.1"],
            PCBMerging(filter=HighPass(0.1)),
        ),
        (["freemerge.merging.PCBMerging", "--method.scale", "[1, 2, 3]"], PCBMerging(scale=[1.0, 2.0, 3.0])),
    ],
)
def test_the_command_line(files, base, models, method, expected, capsys):
    assert run(build_parser().parse_args(arguments(files, method))) == 0
    assert capsys.readouterr().out == f"merged into {files['output']}\n"
    merged = load_checkpoint(files["output"])
    direct = merge(base, models, expected)
    assert all(torch.equal(merged[name], direct[name]) for name in direct)


def test_a_yaml_file_with_names_and_patterns(files, tmp_path, base, models):
    config = {
        "base": files["base"],
        "finetuned": {"digits": files["0"], "signs": files["1"]},
        "method": {
            "class_path": "FRMerging",
            "init_args": {"coefficients": "mean", "filter": {"class_path": "Gaussian", "init_args": {"cutoff": 0.2}}},
        },
        "exclude": ["embed.*"],
        "dtype": "bfloat16",
        "output": files["output"],
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    parsed = build_parser().parse_args(["--config", str(tmp_path / "merge.yaml"), "--overwrite", "true"])
    assert run(parsed) == 0
    merged = load_checkpoint(files["output"])
    assert merged["norm.bias"].dtype == torch.bfloat16
    assert torch.equal(merged["embed.weight"], base["embed.weight"].bfloat16())
    # The parser can read the configuration that it saves.
    (tmp_path / "again.yaml").write_text(build_parser().dump(parsed))
    again = build_parser().parse_args(["--config", str(tmp_path / "again.yaml")])
    assert again.method == parsed.method
    assert again.finetuned == parsed.finetuned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--method.ratio", "3"], "error: PCBMerging: `ratio` must lie in (0, 1], got 3.0\n"),
        (["--base", "nowhere.safetensors"], "error: nowhere.safetensors: does not exist; check the path"),
        (["--exclude", "[heads.*]"], "error: exclude: the pattern 'heads.*' matches no tensor of any model"),
        (["--method.scale", "[1, 2]"], "error: PCBMerging has 2 values in `scale` for 3 fine-tuned models"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(files, capsys, change, message):
    assert run(build_parser().parse_args([*arguments(files, ["PCBMerging"]), *change])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_options_of_what_is_written_arrive(files, tmp_path, capsys):
    """Each option changes the command's result."""

    def command(output, *options):
        start = ["--base", files["base"], "--finetuned", f"[{files['0']}]", "--method", "TaskArithmetic"]
        return run(build_parser().parse_args([*start, "--output", str(tmp_path / output), *options]))

    assert command("one.safetensors") == 0
    assert command("one.safetensors") == 2
    assert "exists already" in capsys.readouterr().err
    assert command("one.safetensors", "--overwrite", "true") == 0
    assert command("folder", "--shard_size", "200B", "--hash_inputs", "false") == 0
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    assert command("adapter", "--output_format", "lora") == 2
    assert "needs the rank of the adapter" in capsys.readouterr().err


def test_misspelt_options_are_refused(files, capsys):
    for wrong in (["--method.ratoi", "0.1"], ["--metod", "PCBMerging"]):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([*arguments(files, ["PCBMerging"]), *wrong])
        assert caught.value.code == 2
    assert "ratoi" in capsys.readouterr().err


def test_help_and_print_config(files, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([*arguments(files, ["PCBMerging"]), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]["ratio"] == 0.1
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--method.help", "PCBMerging"])
    assert "fraction of each task vector's entries that take part" in " ".join(capsys.readouterr().out.split())


def test_a_merge_needs_neither_lightning_nor_transformers():
    code = (
        "import sys, freemerge.merging, freemerge.checkpoints\n"
        "heavy = {'lightning', 'transformers', 'torchvision', 'torchmetrics', 'matplotlib', 'jsonargparse'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["Dare", "--method.method", "Ties"], Dare(Ties())),
        (["PerPattern", "--method.default", "PCBMerging"], PerPattern(PCBMerging())),
        (["FRMerging", "--method.filter", "Gaussian", "--method.filter.cutoff", "0.2"], FRMerging(Gaussian(0.2))),
    ],
)
def test_a_method_behind_another_has_its_own_defaults(options, expected):
    """The parser passes a default object's parameters on to a class chosen instead; no method may receive them."""
    parser = build_parser()
    parsed = parser.parse_args(["--base", "a", "--finetuned", "[b]", "--output", "c", "--method", *options])
    assert parser.instantiate_classes(parsed).method == expected
