"""`python -m freemerge doctor`: versions, devices and optional packages, for reports of problems."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import version as version_of
from typing import Any

from freemerge.cli.commands import version
from freemerge.cli.help_cache import CommandHelp
from freemerge.cli.options import command_help
from freemerge.cli.parsing import OneLineErrors, command_parser

_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*?)\s*(?:;(.*))?")
_NOT_FOR_USERS = ("test", "docs", "bench")  # extras of development


def build_parser() -> OneLineErrors:
    """Build the parser of `doctor`, which has no options; pass the result of its `parse_args` to `run`."""
    return command_parser("doctor")


def described() -> CommandHelp:
    """The help and the options of `doctor`."""
    return command_help(build_parser(), version())


def run(config: Any) -> int:
    """Print the report; the exit code is 0, or 2 if a required package is missing."""
    missing = False
    print(version())
    print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores")
    for extra, packages in _packages().items():
        print(f"\n{'needed' if not extra else f'extra {extra}'}:")
        for name, wanted in packages:
            found = _found(name)
            missing |= not extra and found is None
            print(f"  {name} {found or f'is not installed; {wanted or name} is wanted'}".rstrip())
    print("\ndevices:")
    for line in _devices():
        print(f"  {line}")
    if missing:
        print("\na needed package is missing; install freemerge again with pip", file=sys.stderr)
    return 2 if missing else 0


def _packages() -> dict[str, list[tuple[str, str]]]:
    """Extra, "" for what is always needed → name and wanted versions of its packages."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    try:
        lines = requires("freemerge") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        lines = []
    for line in lines:
        name, wanted, condition = _REQUIREMENT.fullmatch(line).groups()  # type: ignore[union-attr]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition or "")
        key = extra[1] if extra else ""
        if key not in _NOT_FOR_USERS:
            found.setdefault(key, []).append((name, f"{name}{wanted}"))
    return found


def _found(name: str) -> str | None:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """What torch can compute on."""
    try:
        import torch
    except ImportError as error:
        return [f"torch cannot be imported: {error}"]
    lines = [f"cpu, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return lines
