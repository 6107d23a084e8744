"""The command line, `python -m freemerge`: for a suite `fit`, `test`, …, for finished checkpoints `merge` and `advise`.

- `commands`, `help_cache`: answer help, version and unknown options before large packages are imported.
- `names`: suggest the right name for a wrong one.
- `suite`: Lightning's CLI, which runs a suite's pipeline.
- `merge`, `run_merge`: the merge of finished checkpoints, which starts without Lightning and transformers.
- `advise`, `run_advise`: advice on a merge from the finished checkpoints; starts as fast as `merge`.
- `parsing`, `arguments`, `options`, `yaml_text`: parse options, configuration files and help, for all commands.
- `problems`, `faults`, `syntax`: explain errors in one line, with suggestions in terms of options.
- `printing`, `showing`, `ending`: print notes, progress and errors, and end a command cleanly.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from freemerge.cli import commands, help_cache
from freemerge.cli.ending import ended_by_sigterm, run_to_end
from freemerge.cli.names import closest, unknown_option
from freemerge.cli.printing import escape_what_cannot_be_printed, fail
from freemerge.runtime.collector import without_collections

_OF_SUITES = ("FreemergeCLI", "quieten")  # loaded when they are first used: `merge` starts without Lightning

__all__ = ["main", *_OF_SUITES]


def __getattr__(name: str) -> Any:
    if name in _OF_SUITES:
        return getattr(import_module("freemerge.cli.suite"), name)
    raise AttributeError(f"module 'freemerge.cli' has no attribute {name!r}")


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 2 after an error, which is printed as one line on stderr; 130 after Ctrl-C, 143 after SIGTERM.
    """
    escape_what_cannot_be_printed()
    arguments = sys.argv[1:] if args is None else list(args)
    if os.getcwd() not in sys.path:  # `freemerge` finds classes in the working directory as `python -m freemerge` does
        sys.path.append(os.getcwd())
    return run_to_end(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        _show(commands.overview())
    if command == "--version" or (command in commands.COMMANDS and "--version" in arguments):
        _show(commands.version() + "\n")
    if command in commands.OF_CHECKPOINTS:
        return _of_checkpoints(command, arguments[1:])
    if not set(arguments) & commands.COMMANDS.keys() and "FREEMERGE_SUBCOMMAND" not in os.environ:
        known = ", ".join(commands.COMMANDS)
        if not command or command.startswith("-"):
            fail(f"name a command: {known}")
        fail(f"there is no command '{command}'{closest(command, commands.COMMANDS) or f'; commands: {known}'}")
    fresh = help_cache.is_fresh()
    if fresh and command in commands.COMMANDS and (described := help_cache.load(command)):
        if arguments[1:] in (["-h"], ["--help"]):
            _show(described.help)
        if option := described.unknown(arguments[1:]):
            fail(unknown_option(option, described.keys))
    with without_collections():
        from freemerge.cli import suite

    return suite.run(arguments, caches_help=fresh)


def _of_checkpoints(command: str, arguments: list[str]) -> int:
    """Run a command on finished checkpoints; torch, whose import takes seconds, is imported last."""
    name = commands.module_of(command)
    options = import_module(f"freemerge.cli.{name}")
    if (first := getattr(options, "FIRST", None)) and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]  # the option's name may be left out
    described = options.described()
    if {"-h", "--help"} & set(arguments):
        _show(described.help)
    if option := described.unknown(arguments):
        fail(unknown_option(option, described.keys))
    with ended_by_sigterm():
        parser = options.build_parser()
        config = parser.parse_args(arguments)
        parser.check_environment()
        module = options if hasattr(options, "run") else import_module(f"freemerge.cli.run_{name}")
        done: int = module.run(config)
        return done


def _show(text: str) -> None:
    """Print a text and exit with code 0."""
    sys.stdout.write(text)
    sys.stdout.flush()
    sys.exit(0)
