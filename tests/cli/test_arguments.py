"""Options as people type them: bare flags, several values after one option, names that are not YAML."""

import pytest
import torch

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli import main
from freemerge.cli.merge import build_parser

PARSER = build_parser()
REST = ["--base", "base", "--method", "Ties", "--output", "o"]


def parsed(*arguments: str, option: str):
    return PARSER.parse_args([*REST, *(["--finetuned", "m"] if option != "finetuned" else []), *arguments])[option]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--finetuned", "a"], ["a"]),
        (["--finetuned", "a", "b"], ["a", "b"]),
        (["--finetuned=a", "b"], ["a", "b"]),
        (["--finetuned", "a", "--finetuned", "b"], ["a", "b"]),
        (["--finetuned", "a", "--overwrite", "--finetuned", "b", "c"], ["a", "b", "c"]),
        (["--finetuned", "[a, b]"], ["a", "b"]),
        (["--finetuned", "[a,", "b]"], ["a", "b"]),  # what the shell makes of brackets without quotes
        (["--finetuned", '["a", "b"]', "c"], ["a", "b", "c"]),
        (["--finetuned", "[a]", "--finetuned", "[b]"], ["b"]),
        (["--finetuned", "a", "--finetuned+=b"], ["a", "b"]),
        (["--finetuned", "{cars: a, birds: b}"], {"cars": "a", "birds": "b"}),
        (["--finetuned", "{cars:", "a,", "birds:", "b}"], {"cars": "a", "birds": "b"}),
        (["--finetuned", "a: b", "*c", "#d", "é, f", "мой [x] #1", "no", "1e3", 'quo"te'],
         ["a: b", "*c", "#d", "é, f", "мой [x] #1", "no", "1e3", 'quo"te']),
        (["--finetuned", "~/a", "2024", "null"], ["~/a", "2024", "null"]),
    ],
)  # fmt: skip
def test_models(arguments, expected) -> None:
    assert parsed(*arguments, option="finetuned") == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--include", "null"], None),
        (["--include", "*_proj.weight"], ["*_proj.weight"]),
        (["--include", "*.bias", "re:.*[0-9]{1,2}: x"], ["*.bias", "re:.*[0-9]{1,2}: x"]),
        (["--include", "[ab]*.weight"], ["[ab]*.weight"]),
        (["--include", "[layers.*, re:head.*]"], ["layers.*", "re:head.*"]),
    ],
)
def test_patterns(arguments, expected) -> None:
    assert parsed(*arguments, option="include") == expected


@pytest.mark.parametrize("option", ["overwrite", "resume", "hash_inputs", "dry_run"])
@pytest.mark.parametrize(
    ("value", "expected"), [([], True), (["true"], True), (["false"], False), (["True"], True), (["no"], False)]
)
def test_flags(option, value, expected) -> None:
    assert parsed(f"--{option}", *value, option=option) is expected  # at the end
    assert parsed(f"--{option}", *value, "--rank", "3", option=option) is expected  # before another option
    if value:
        assert parsed(f"--{option}={value[0]}", option=option) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include", "[*_proj.weight]"],
         "--include '[*_proj.weight]': YAML reads * at the beginning of a word as syntax; quote it, "
         "--include '[\"*_proj.weight\"]', or omit the brackets, --include '*_proj.weight'"),
        (["--exclude", "[a, !b]"], "! at the beginning of a word as syntax; quote it, --exclude '[a, \"!b\"]'"),
        (["--exclude", "[%b]"], "--exclude '%b'"),
        (["--exclude", "[@b]"], "--exclude '@b'"),
        (["--exclude", "[&b]"], "--exclude '[&b]': YAML reads one of these as null; quote it, --exclude '[\"&b\"]'"),
        (["--exclude", "[re:a: b]"], "text with a colon and a space in it as a mapping, not as a name; quote it"),
        (["--exclude", "[a, #b]"], "is not YAML: expected the node content, but found '<stream end>'; quote it, "),
        (["--finetuned", "{a: *b}"], "* at the beginning of a word as syntax; put the values in double quotes"),
        (["--overwrite", "o.safetensors"], "overwrite: expected bool, got 'o.safetensors'"),
        (["--finetuned"], "finetuned"),
        (["left", "right"], "unexpected argument 'left'"),
    ],
)  # fmt: skip
def test_ambiguous_values_are_refused_in_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        PARSER.parse_args([*REST, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dare_ties", "did you mean --method Dare --method.method Ties? In a file: method: {class_path: Dare, "),
        ("dare-linear", "did you mean --method Dare --method.method TaskArithmetic?"),
        ("breadcrumbs_ties", "there is no class 'breadcrumbs_ties'; Breadcrumbs and Ties are two separate methods"),
        ("task_arithmetic", "did you mean 'TaskArithmetic'?"),
        ("slerp", "did you mean 'Slerp'?"),
        ("passthrough", "there is no class 'passthrough'; known: ACEMerging, "),
    ],
)  # fmt: skip
def test_names_of_methods_in_other_tools_are_translated(name, message, capsys) -> None:
    with pytest.raises(SystemExit):
        PARSER.parse_args(["--base", "b", "--finetuned", "a", "--output", "o", "--method", name])
    assert message in capsys.readouterr().err


def test_the_suggested_options_for_dare_with_ties_work(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint("base.safetensors", {"a": torch.zeros(3)})
    for name, value in (("x", 1.0), ("y", 3.0)):
        save_checkpoint(f"{name}.safetensors", {"a": torch.full((3,), value)})
    rest = ["merge", "--base", "base.safetensors", "--finetuned", "x.safetensors", "y.safetensors"]
    rest += ["--method", "Dare", "--method.method", "Ties", "--method.method.density", "1", "--method.drop", "0"]
    assert main([*rest, "--output", "m.safetensors"]) == 0
    assert torch.equal(load_checkpoint("m.safetensors")["a"], torch.full((3,), 2.0))  # the mean of those that agree
