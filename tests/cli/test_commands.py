"""Help, version and a missing command need nothing large; the list of methods is that of the classes."""

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import freemerge
from freemerge import merging
from freemerge.cli import advise, commands, main
from freemerge.cli.commands import COMMANDS, OF_CHECKPOINTS, methods
from freemerge.cli.merge import build_parser, described
from freemerge.cli.options import options

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("arguments", "code", "out", "error"),
    [
        (["--help"], 0, "\n  merge           Merge finished checkpoints", ""),
        (["merge", "--help"], 0, "\n  --finetuned FINETUNED …", ""),
        (["merge", "--base", "x", "-h"], 0, "\n  TSVMerge  ", ""),
        (["--version"], 0, f"freemerge {freemerge.__version__}\n", ""),
        (["advise", "--help"], 0, "\n  --json [true|false]", ""),
        (["advise", "--bse", "x"], 2, "", "error: there is no option '--bse'; did you mean '--base'?\n"),
        (["merge", "--version"], 0, f"freemerge {freemerge.__version__}\n", ""),
        ([], 2, "", f"error: name a command: {', '.join(COMMANDS)}\n"),
        (["--base", "a"], 2, "", f"error: name a command: {', '.join(COMMANDS)}\n"),
        (["fitt"], 2, "", "error: there is no command 'fitt'; did you mean 'fit'?\n"),
        (["merge", "--bas", "x"], 2, "", "error: there is no option '--bas'; did you mean '--base'?\n"),
    ],
)
def test_what_needs_no_torch_does_not_import_it(arguments, code, out, error) -> None:
    script = f"""
import sys
from freemerge.cli import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (code, error)
    assert out in done.stdout


def test_the_methods_of_the_help_are_those_there_are() -> None:
    kinds = [getattr(merging, name) for name in merging.__all__]
    real = {
        kind.__name__: sys.modules[kind.__module__].__doc__.splitlines()[0]
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, merging.MergeMethod) and not inspect.isabstract(kind)
    }
    assert methods() == real
    assert {"Dare", "FRMerging", "PCBMerging", "Ties"} <= real.keys()


def test_the_help_of_merge_has_every_option_of_its_parser() -> None:
    text = described().help
    for option in set(options(build_parser())) - {"help", "method"}:
        assert re.search(rf"\n  --{option}[ ,]", text), option  # Python 3.13 writes "--overrides, --overrides+"
    assert "\n  --method METHOD" in text


def test_commands_have_methods() -> None:
    from freemerge.cli.suite import FreemergeCLI

    assert all(hasattr(FreemergeCLI, name) for name in COMMANDS if name not in OF_CHECKPOINTS)


def test_a_module_and_an_entry_are_a_command(monkeypatch, capsys) -> None:
    """As CONTRIBUTING.md says: a module with `build_parser`, `described` and `run`."""
    assert OF_CHECKPOINTS == ("merge", "advise", "export-experts", "doctor")
    module = types.ModuleType("freemerge.cli.sizes")
    module.build_parser, module.described = advise.build_parser, advise.described
    module.run = lambda config: print(config.base) or 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(commands, "OF_CHECKPOINTS", (*OF_CHECKPOINTS, "sizes"))
    assert main(["sizes", "--base", "a.safetensors", "--finetuned", "b.safetensors"]) == 0
    assert capsys.readouterr().out == "a.safetensors\n"
