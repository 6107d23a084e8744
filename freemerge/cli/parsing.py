"""Base classes of all commands' parsers: one-line errors, environment variables, and readable help.

Options come from three places, and the last value wins: the environment (`FREEMERGE_FIT__TRAINER__MAX_EPOCHS=3` sets
`fit`'s `--trainer.max_epochs`), then `--config` files and options in the order in which they are given.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, _typehints
from jsonargparse._paths import change_to_path_dir

from freemerge.cli.arguments import kind_of, spell_out
from freemerge.cli.commands import COMMANDS, module_of
from freemerge.cli.names import closest
from freemerge.cli.options import groups, options, subcommands
from freemerge.cli.printing import fail
from freemerge.cli.problems import Problems, innermost
from freemerge.cli.yaml_text import read_configuration

ENV_PREFIX = "FREEMERGE"


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help without the options' environment variables and with short class names; line breaks are kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 30})

    def _format_action_invocation(self, action: Action) -> str:
        text = super(DefaultHelpFormatter, self)._format_action_invocation(action)
        kind = kind_of(action)
        if kind == "flag" and text.endswith("{true,false}"):
            return text.replace("{true,false}", "[true|false]")
        return f"{action.option_strings[0]} {action.dest.rpartition('.')[2].upper()} …" if kind else text

    def _expand_help(self, action: Action) -> str:
        text, found, known = super()._expand_help(action).partition(", known subclasses: ")
        return f"{text}, one of {re.sub('[a-zA-Z_][a-zA-Z0-9_.]*[.]', '', known)}" if found else text


def instantiate(parser: jsonargparse.ArgumentParser, config: jsonargparse.Namespace) -> jsonargparse.Namespace:
    """Instantiate the classes of a configuration; the method's name depends on the version of jsonargparse."""
    made: jsonargparse.Namespace = getattr(parser, "instantiate", parser.instantiate_classes)(config)
    return made


class OneLineErrors(ArgumentParser):
    """A mix-in for parsers that prints each error as one line.

    Takes the arguments of `jsonargparse.ArgumentParser`. Options cannot be abbreviated, and are also read from the
    environment.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {"allow_abbrev": False, "default_env": True, "env_prefix": ENV_PREFIX}
        super().__init__(*args, **{**defaults, "formatter_class": HelpFormatter, **kwargs})
        self._problems: Problems | None = None  # of the command line that is being parsed

    # The signature differs from argparse's, as jsonargparse's own does.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any
    ) -> Namespace:
        """Parse arguments; a class that replaces another one starts from its own defaults."""
        arguments = list(sys.argv[1:] if args is None else args)
        command = subcommands(self).get(arguments[0]) if arguments else None
        try:
            arguments = [arguments[0], *spell_out(arguments[1:], command)] if command else spell_out(arguments, self)
        except ValueError as error:
            fail(str(error))
        self._problems = Problems(command or self, arguments[1:] if command else arguments)
        if isinstance(command, OneLineErrors):
            command._problems = self._problems
        with _fresh_arguments(), _interpolations_in_one_line(arguments[0] if command else ""):
            return super().parse_args(arguments, *more, **kwargs)

    def parse_path(self, cfg_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Parse a configuration file in any Unicode encoding, regardless of the locale."""
        if os.fspath(cfg_path) == "-":
            return super().parse_path(cfg_path, *args, **kwargs)
        path = Path(cfg_path).expanduser()
        try:
            text = self.read_options(path)
        except ValueError as error:
            fail(str(error))
        for key, value in (yaml.safe_load(text) or {}).items():
            if key in groups(self) and not isinstance(value, (dict, str)):  # a string is the path of a file
                fail(f"{path}: {key}: expected a mapping of its options, got '{'null' if value is None else value}'")
        with change_to_path_dir(jsonargparse.Path(path, mode="fr")):
            return self.parse_string(text, path.name, *args, **kwargs)

    def read_options(self, path: Path) -> str:
        """The text of a configuration file, in the words of this parser's options.

        Raises:
            ValueError: see `read_configuration`.
        """
        return read_configuration(path)

    def check_environment(self, subcommand: str | None = None) -> None:
        """Exit with an error if an environment variable with this parser's prefix names no option.

        Args:
            subcommand: the command that is run; variables of other commands are ignored.
        """
        parser = self if subcommand is None else subcommands(self)[subcommand]
        prefix = f"{parser.env_prefix}_".upper()
        known = [prefix + option.replace(".", "__").upper() for option in options(parser)]
        for name in sorted(os.environ):
            if name.startswith(prefix) and name not in known:
                fail(f"the environment variable {name} names no option{closest(name, known)}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error as one line and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        fail(self._problems.explain(ex or message) if self._problems else innermost(ex or message))


def command_parser(
    command: str, arguments: str = "", epilog: str | None = None, kind: type[OneLineErrors] = OneLineErrors
) -> OneLineErrors:
    """The parser of a command with a module of its own, without options.

    Args:
        command: its name.
        arguments: the arguments, as the usage shows them.
        epilog: what its help ends with.
        kind: class of the parser.
    """
    prog = f"python -m freemerge {command}"
    return kind(
        prog=prog,
        usage=f"{prog} {arguments}".rstrip(),
        description=COMMANDS[command],
        epilog=epilog,
        env_prefix=f"{ENV_PREFIX}_{module_of(command).upper()}_",
    )


def add_config(parser: OneLineErrors, also: str = "") -> None:
    """Add the option of configuration files.

    Args:
        parser: the parser.
        also: what else the files may be, for the help.
    """
    about = f"A YAML file with any of the options below{also}; the last value wins."
    parser.add_argument("--config", action="config", help=about)


@contextmanager
def _interpolations_in_one_line(command: str) -> Iterator[None]:
    """Inside the block, a `${…}` that cannot be resolved ends the program with one line that names its key.

    Args:
        command: the subcommand, which is the first part of every key; empty if there is none.
    """
    try:
        yield
    except Exception as error:
        errors = sys.modules.get("omegaconf.errors")  # imported by jsonargparse, where interpolation is on
        if errors is None or not isinstance(error, errors.OmegaConfBaseException):
            raise
        key = str(getattr(error, "full_key", None) or "").removeprefix(f"{command}.")
        reason = str(error).partition("\n")[0]
        if missing := re.search(r"\(resolved to '(.+)'\)", reason):
            reason = f"${{…}} refers to {missing[1].removeprefix(f'{command}.')!r}, which is not in the configuration"
        elif isinstance(error, errors.GrammarParseError):
            reason = "${…} has a syntax error, or refers to itself"
        fail(f"{key}: {reason}")


@contextmanager
def _fresh_arguments() -> Iterator[None]:
    """Inside the block, a class that replaces another one inherits none of its arguments.

    jsonargparse keeps the arguments that the new class has too: if an SGD replaced the AdamW of an earlier file, it
    would silently get AdamW's learning rate.
    """
    original = _typehints.discard_init_args_on_class_path_change

    def discard(parser_or_action: Any, previous: Any, value: Any) -> None:
        if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
            previous["init_args"] = Namespace()
        original(parser_or_action, previous, value)

    _typehints.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = original
