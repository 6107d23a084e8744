"""Advice of the library in the command line's syntax."""

import pytest
import torch
import yaml

from freemerge.checkpoints import save_checkpoint
from freemerge.cli import main
from freemerge.cli.syntax import as_options
from freemerge.merging import MergeError, TaskArithmetic, merge

NAMES = ["include", "exclude", "embeddings", "overwrite", "dtype", "rank", "output", "output_format", "hash_inputs"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("keep it: exclude=['head.weight']", "keep it: --exclude '[head.weight]'"),
        ('exclude=["a", \'b.*\', "re:c.*"] keeps', "--exclude '[a, b.*, re:c.*]' keeps"),
        ("use exclude=['*.bias'].", "use --exclude '[\"*.bias\"]'."),
        ("exclude=['a', …]", "--exclude '[a, …]'"),
        ("exclude=[…] or include=[…]", "--exclude '[…]' or --include '[…]'"),
        ("embeddings='base' merges", "--embeddings base merges"),
        ("overwrite it with overwrite=True", "overwrite it with --overwrite"),
        ("hash_inputs=False", "--hash_inputs false"),
        ("such as rank=16", "such as --rank 16"),
        ("give output= a path", "give --output a path"),
        ("write dtype='bfloat16' or 'float32'", "write --dtype bfloat16 or 'float32'"),
        # What is no advice, or no option, stays.
        ("scale=0.5, lora_rank=3, 'rank=3', /x/rank=3/y", "scale=0.5, lora_rank=3, 'rank=3', /x/rank=3/y"),
        ("dtype=torch.float16", "dtype=torch.float16"),
    ],
)
def test_keyword_arguments_become_options(message, expected) -> None:
    assert as_options(message, NAMES) == expected


def test_lists_of_any_names_come_back_from_yaml() -> None:
    names = ["a.*", "*_proj", "re:x: y", "no", "3", "a, b", "[x]", "λ", 'quo"te', "null", "#"]
    text = as_options(f"exclude={names!r}", NAMES).removeprefix("--exclude '").removesuffix("'")
    assert yaml.safe_load(text) == names


def test_the_library_speaks_python_and_the_command_line_its_own_language(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint("base.safetensors", {"a": torch.zeros(3)})
    save_checkpoint("x.safetensors", {"a": torch.ones(3)})
    with pytest.raises(MergeError, match="overwrite=True"):
        merge("base.safetensors", ["x.safetensors"], TaskArithmetic(), output="x.safetensors")
    words = ["merge", "--base", "base.safetensors", "--finetuned", "x.safetensors", "--method", "TaskArithmetic"]
    assert main([*words, "--output", "x.safetensors"]) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error
    assert "overwrite=True" not in error
