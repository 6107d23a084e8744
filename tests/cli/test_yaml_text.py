"""Configuration files in any Unicode encoding; what cannot be read is one line that names the file and the cause."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli.merge import build_parser
from freemerge.cli.yaml_text import read_configuration

ROOT = Path(__file__).parent.parent.parent
TEXT = "# Zusammenführung — слияние λ\r\nbase: b\r\nfinetuned: {ä: x, 日: y}\r\noutput: o\r\nmethod: Ties\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_unicode_encoding_is_read(encoding, tmp_path) -> None:
    (tmp_path / "m.yaml").write_bytes(TEXT.encode(encoding))
    config = build_parser().parse_args(["--config", str(tmp_path / "m.yaml")])
    assert config.finetuned == {"ä": "x", "日": "y"}


@pytest.mark.parametrize("data", [b"\xfe\xff" + TEXT.encode("utf-16-be"), b"\xff\xfe" + TEXT.encode("utf-16-le")])
def test_both_byte_orders(data, tmp_path) -> None:
    (tmp_path / "m.yaml").write_bytes(data)
    assert "слияние" in read_configuration(tmp_path / "m.yaml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("base: a\n# für\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xfc); save the file as UTF-8"),
        (b"\xff\xfea", "line 1 is not UTF-16"),
        ("base: b".encode("utf-16-le"), "is not valid YAML: "),  # without a mark
        (b"\x00\x01\x02", "is not valid YAML: "),
        (b"base: a\ninclude: [*_proj.weight]", '[*_proj.weight] ^; a word that begins with * must be quoted: "*_'),
        (b"include: !x", 'a word that begins with ! must be quoted: "!x"'),
        (b"include:\n  - %x", 'a word that begins with % must be quoted: "%x"'),
        (b"output: @x/y", 'a word that begins with @ must be quoted: "@x/y"'),
        (b"output: a: b", "text with a colon and a space in it must be quoted"),
        (b"method:\n\tclass_path: Ties", "indent with spaces, not with tabs"),
        (b"a: [1\nb: 2", "is not valid YAML: "),
        (b"a: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        (b"finetuned:\n  cars: a\n  cars: b\n", "the key 'cars' is in line 2 and again in line 3"),
        (b"[a, b]", "is not a mapping of options to values"),
        (b"base", "is not a mapping of options to values"),
        (b"a: " + b"[" * 50_000, "is nested too deeply"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(data, message, tmp_path, capsys) -> None:
    file = tmp_path / "m.yaml"
    file.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--config", str(file)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_file_says_nothing(tmp_path) -> None:
    (tmp_path / "m.yaml").write_text("# nothing\n", encoding="utf-8")
    words = ["--base", "b", "--finetuned", "a", "--method", "Ties", "--output", "o"]
    assert build_parser().parse_args(["--config", str(tmp_path / "m.yaml"), *words]).base == "b"


def test_a_merge_key_is_overridden_by_what_stands_beside_it(tmp_path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("a: &a\n  path: x\n  text: y\nb: {<<: *a, path: z}\n", encoding="utf-8")
    assert yaml.safe_load(read_configuration(file))["b"] == {"path": "z", "text": "y"}
    file.write_text("a: &a\n  path: x\nb: {<<: *a, path: z, path: w}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the key 'path' is in line 3 and again in line 3"):
        read_configuration(file)


def test_an_ascii_locale_reads_and_prints_all(tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    save_checkpoint(tmp_path / "base.safetensors", {"a": torch.zeros(2)})
    save_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    text = "# λ\nbase: base.safetensors\nfinetuned: {λ: x.safetensors}\nmethod: WeightAverage\n"
    (home / "m.yaml").write_text(text, encoding="utf-8")
    paths = f"{ROOT}{os.pathsep}{ROOT / 'callbacks'}"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": str(home), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "freemerge", "merge", "--config", "~/m.yaml", "--output"]

    def run(*words: str) -> tuple[int, bytes, bytes]:
        done = subprocess.run([*command, *words], cwd=tmp_path, env={**os.environ, **plain}, capture_output=True)
        return done.returncode, done.stdout, done.stderr

    assert run("~/m.safetensors") == (0, b"merged into " + str(home / "m.safetensors").encode() + b"\n", b"")
    assert torch.equal(load_checkpoint(home / "m.safetensors")["a"], torch.ones(2))
    assert not (tmp_path / "~").exists()
    code, out, error = run("o", "--include", "λ")
    assert (code, out, error.count(b"\n")) == (2, b"", 1)
    assert error.startswith(b"error: ")
