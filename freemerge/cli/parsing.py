"""What the parsers of all commands share: one-line errors, environment variables, and a help that can be read.

Options come from three places, later ones win: the environment (`FREEMERGE_FIT__TRAINER__MAX_EPOCHS=3` sets
`fit`'s `--trainer.max_epochs`), then `--config` files and options in the order in which they are given.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, _typehints

from freemerge.cli.problems import closest, explain, options, subcommands

ENV_PREFIX = "FREEMERGE"


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """No line for each option's environment variable, classes by their short names; descriptions keep their lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 30})

    def _format_action_invocation(self, action: Action) -> str:
        return super(DefaultHelpFormatter, self)._format_action_invocation(action)

    def _expand_help(self, action: Action) -> str:
        text, found, known = super()._expand_help(action).partition(", known subclasses: ")
        return f"{text}, one of {re.sub('[a-zA-Z_][a-zA-Z0-9_.]*[.]', '', known)}" if found else text


class OneLineErrors(ArgumentParser):
    """A parser whose errors are one line; a base to be mixed into others.

    Args:
        as `jsonargparse.ArgumentParser`. Options cannot be abbreviated, and are read from the environment as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {"allow_abbrev": False, "default_env": True, "env_prefix": ENV_PREFIX}
        super().__init__(*args, **{**defaults, "formatter_class": HelpFormatter, **kwargs})

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parse; a class that replaces another starts from its own defaults."""
        with _fresh_arguments():
            return super().parse_args(*args, **kwargs)

    def check_environment(self, subcommand: str | None = None) -> None:
        """Exit with an error if a variable with this parser's prefix names no option.

        Args:
            subcommand: the one that is run; other commands' variables are theirs.
        """
        parser = self if subcommand is None else subcommands(self)[subcommand]
        prefix = f"{parser.env_prefix}_".upper()
        known = [prefix + option.replace(".", "__").upper() for option in options(parser)]
        for name in sorted(os.environ):
            if name.startswith(prefix) and name not in known:
                fail(f"the environment variable {name} names no option{closest(name, known)}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say in one line what is wrong, and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        fail(
            explain(
                message, getattr(ex, "subcommand_parser", None) or self, getattr(self, "args", None) or sys.argv[1:]
            )
        )


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 2."""
    print_error(message)
    sys.exit(2)


def print_error(message: object) -> None:
    """Print an error as one line on stderr, its first word in red where there is a terminal."""
    label = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(label, " ".join(str(message).split()), file=sys.stderr)


@contextmanager
def _fresh_arguments() -> Iterator[None]:
    """Within it, a class that replaces another takes over none of its arguments.

    jsonargparse keeps those that the new class knows too: the learning rate of the AdamW of one configuration file
    would silently become that of the SGD which a later one, or the command line, puts in its place.
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
