"""The commands, help and version of the command line, available before large packages are imported."""

from __future__ import annotations

import ast
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import cache
from pathlib import Path

import freemerge

COMMANDS = {
    "fit": "Fine-tune on every task, merge, train experts and the router, and report.",
    "validate": "Evaluate the finished FREE model on every task's validation data.",
    "test": "Evaluate the finished FREE model on every task's test data.",
    "predict": "Run the finished FREE model and write its predictions to a CSV file.",
    "tune": "Search for a merging method's parameters, λ of each task, on validation data.",
    "merge": "Merge finished checkpoints, without any data.",
    "advise": "Compare finished checkpoints, warn of what harms a merge, and name one to begin with.",
    "export-experts": "Write a FREE model's backbone and its low-rank experts as LoRA adapters.",
    "doctor": "Print versions, devices and optional packages, for reports of problems.",
}


def module_of(command: str) -> str:
    """The name of a command's module."""
    return command.replace("-", "_")


OF_CHECKPOINTS = tuple(name for name in COMMANDS if (Path(__file__).parent / f"{module_of(name)}.py").is_file())
"""The commands with a module of their own: they start without Lightning, as most work on checkpoints."""

ABOUT = "Fine-tune one backbone on several tasks, merge them, mend the merge with experts."

_MERGING = "freemerge.merging"
_METHODS = f"{_MERGING}.methods"
_METHOD = "MergeMethod"
_ABSTRACT = {_METHOD, "AngleMethod", "MatrixMethod", "MeasuredMethod", "MethodWrapper"}


def version() -> str:
    """The line that `--version` prints."""
    return f"freemerge {freemerge.__version__}"


def overview() -> str:
    """The text of `python -m freemerge --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    parser = ArgumentParser(
        prog="python -m freemerge",
        usage="python -m freemerge COMMAND [options]",
        description="\n".join([ABOUT, "", "commands:", *lines]),
        epilog="`python -m freemerge COMMAND --help` lists the options of a command.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show freemerge's version and exit")
    return parser.format_help()


@cache
def methods() -> dict[str, str]:
    """Class name of each merging method → its description, the first line of its module.

    They are parsed from the source files, because importing the classes needs torch, which takes seconds.
    """
    homes: dict[str, str] = {}
    for node in _parsed(_MERGING).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith(_MERGING):
            homes |= dict.fromkeys((alias.name for alias in node.names), node.module)
    # Also the base classes that are not exported, which stand beside the methods
    beside = (f"{_METHODS}.{path.stem}" for path in _folder(_METHODS).glob("[!_]*.py"))
    modules = {module: _parsed(module) for module in dict.fromkeys([*homes.values(), *beside])}
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for module in modules.values()
        for node in module.body
        if isinstance(node, ast.ClassDef)
    }
    found = {_METHOD}
    while more := {name for name, parents in bases.items() if name not in found and parents & found}:
        found |= more
    return {
        name: (ast.get_docstring(modules[homes[name]]) or "").partition("\n")[0]
        for name in sorted(found & homes.keys() - _ABSTRACT, key=str.lower)
    }


def _folder(module: str) -> Path:
    return Path(freemerge.__file__).parent.joinpath(*module.split(".")[1:])


def _parsed(module: str) -> ast.Module:
    path = _folder(module)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))
